"""Every stage on bases of other families: their own role tags, from descriptions to a bundle that recommends."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from lavic.data.conversations import read_conversations
from lavic.data.descriptions import described_by, descriptions_path
from lavic.errors import DataError
from lavic.model.bundle import FILE, Bundle, BundleInfo
from lavic.model.item_store import ItemStore
from lavic.model.visual_tokens import project
from lavic.tracking.journal import read_journal
from lavic.train.recommendation.dataset import TuneDataset
from tests.fork_server import ForkServer
from tests.model.chat_bases import KINDS, make_base
from tests.train.assets import KEY, Assets


def run(fork_server: ForkServer, log: Path, *argv: object, code: int = 0) -> str:
    ranks = fork_server.start([str(arg) for arg in argv], log)
    codes, output = fork_server.wait(ranks), ranks[0].log.read_text()
    ranks[0].log.unlink()
    assert codes == [code], output[-3000:]
    return output


@pytest.mark.dist
@pytest.mark.parametrize("name", ["vicuna", "llama3"])
def test_all_stages_use_the_chat_template_of_the_base(
    assets: Assets, tmp_path: Path, fork_server: ForkServer, name: str
) -> None:
    """The base has no template: one is given for training, and the bundle keeps it."""
    base, log, template = make_base(tmp_path / "base", name, template=False), tmp_path / "log", tmp_path / "chat.jinja"
    shutil.copytree(assets.valid, tmp_path / "photos")
    model = ["--model.name", base]
    describe = ["describe", "--shards", tmp_path / "photos", "--max-new-tokens", 4]
    error = run(fork_server, log, *describe, *model, code=2)
    assert error.count("\n") == 1 and "--model.chat-template FILE" in error
    template.write_text(KINDS[name].template)
    model += ["--model.chat-template", template]
    run(fork_server, log, *describe, *model)
    (shard,) = (tmp_path / "photos").glob("*.tar")
    assert descriptions_path(shard).is_file()
    (row,) = described_by(shard)

    loop = ["--loop.steps", 2, "--loop.global-batch-size", 8, "--loop.lr", 0.01]
    sets = ["--shards", assets.photos, "--valid", assets.valid, "--out", tmp_path / "distill"]
    run(fork_server, log, "distill", *sets, *model, *loop)
    embed_args = ["--adapter", tmp_path / "distill", "--out", tmp_path / "store"]
    run(fork_server, log, "embed", "--shards", assets.photos, *embed_args, *model)
    store = ["--store", tmp_path / "store"]
    sets = ["--train", assets.rows, "--valid", assets.rows, "--max-length", 1000, "--out", tmp_path / "tune"]
    run(fork_server, log, "tune", *store, *sets, *model, *loop)

    bundle = tmp_path / "tune" / "bundle"
    info = BundleInfo.read(bundle)
    assert info.prompt_version == row["prompt"] == ItemStore.open(tmp_path / "store").manifest.prompt_version
    assert info.prompt_version not in ("1", "1-lavic")
    check_loss(assets, tmp_path)
    template.unlink()  # the bundle has its own copy
    ask = ["recommend", "--bundle", bundle, *store, "--conversation", assets.rows, "--json"]
    ranked = [json.loads(line) for line in run(fork_server, log, *ask).splitlines() if line.startswith("{")]
    assert len(ranked) == 24 and all(row["ranking"] for row in ranked)
    out = ["--out", tmp_path / "evaluation", "--arms", "lavic"]
    run(fork_server, log, "evaluate", "--bundle", bundle, *store, "--test", assets.rows, *out)

    text = json.loads((bundle / FILE).read_text())
    (bundle / FILE).write_text(json.dumps({**text, "chat": {**text["chat"], "prefix": "HUMAN: "}}))
    with pytest.raises(DataError, match="chat tags do not match its prompt version"):
        BundleInfo.read(bundle)


def check_loss(assets: Assets, folder: Path) -> None:
    """The last validation loss against the stock forward pass over prompts that `apply_chat_template` makes."""
    bundle = Bundle.load(folder / "tune" / "bundle")
    model, tokenizer = bundle.backbone.model, bundle.backbone.tokenizer
    store, rows = ItemStore.open(folder / "store"), read_conversations(assets.rows)
    data = TuneDataset(rows, store, bundle.backbone.encoder, candidates=KEY, max_length=1000)
    template, losses = (folder / "chat.jinja").read_text(), []
    for position in range(len(data)):
        row, target, listed, _ = data._draw(position)
        lines = "".join(f"{item}: {store.title(item)} {'<image>' * 5}\n" for item in listed)
        request = "".join(f"{turn.role.title()}: {turn.text}\n" for turn in rows[row].turns)
        content = [{"type": "text", "text": f"{request}Candidates:\n{lines}Which ID fits?"}]
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], chat_template=template, tokenize=False, add_generation_prompt=True
        )
        answer = [*tokenizer(target, add_special_tokens=False).input_ids, bundle.backbone.encoder.eos]
        ids = torch.tensor([[*tokenizer(prompt).input_ids, *answer]])
        with torch.no_grad():
            embeds = model.get_input_embeddings()(ids).clone()
            embeds[ids == model.config.image_token_id] = project(model, store.tokens(listed))
            logits = model(inputs_embeds=embeds, attention_mask=torch.ones_like(ids)).logits[0, -len(answer) - 1 : -1]
        losses.append(functional.cross_entropy(logits, torch.tensor(answer), reduction="none"))
    journal = [row for row in read_journal(folder / "tune" / "metrics.jsonl") if "valid_loss" in row]
    assert torch.cat(losses).mean().item() == pytest.approx(journal[-1]["valid_loss"], rel=1e-5)
