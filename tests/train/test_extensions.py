"""Extensions of the released method: the teacher's probabilities, fewer tokens per item, "none of these"."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from lavic.data.conversations import read_conversations
from lavic.data.shard_dataset import ShardDataset
from lavic.distributed.context import DistributedContext
from lavic.evaluation.none_of_these import none_of_these_metrics
from lavic.evaluation.test_set import TestSet
from lavic.model.bundle import Bundle, BundleInfo, save_bundle
from lavic.model.config import LoraSettings, ModelSettings
from lavic.model.inputs.label_mask import collate
from lavic.model.inputs.token_loss import target_logits, target_tokens, token_losses
from lavic.model.item_store import ItemStore
from lavic.model.loading import Backbone
from lavic.model.lora import add_adapter
from lavic.model.prompts import NONE, Candidate
from lavic.model.visual_tokens import all_tokens, cls_tokens, project
from lavic.recommend.ranking.ranked_list import RankedList
from lavic.recommend.ranking.ranker import Ranker
from lavic.recommend.ranking.request import Request
from lavic.train.config import LoopSettings
from lavic.train.deepspeed.engine import Engine
from lavic.train.distillation.dataset import DistillDataset
from lavic.train.distillation.losses import patch_distance, patch_means, top_k_divergence
from lavic.train.distillation.task import DistillTask
from lavic.train.recommendation.dataset import TuneDataset
from lavic.train.train_step import train_step
from tests.fork_server import ForkServer
from tests.train.assets import KEY, Assets

LORA = LoraSettings(r=2, dropout=0.0)


def load(assets: Assets) -> Backbone:
    return Backbone.load(ModelSettings(name=str(assets.base)))


def add_random_adapter(backbone: Backbone, kind: str) -> nn.Module:
    model = add_adapter(backbone, kind, LORA)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.05)
    return model


def distill_data(assets: Assets, backbone: Backbone, **options) -> DistillDataset:
    return DistillDataset(ShardDataset(assets.photos), backbone.geometry, backbone.encoder, max_length=64, **options)


def tune_data(assets: Assets, backbone: Backbone, **options) -> TuneDataset:
    rows, store = read_conversations(assets.rows), ItemStore.open(assets.store)
    return TuneDataset(rows, store, backbone.encoder, **{"candidates": KEY, "max_length": 400, **options})


# --- the teacher's probabilities ------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10**6), size=st.integers(2, 40), top_k=st.integers(1, 60), scale=st.floats(0.1, 8))
@example(seed=4580, size=2, top_k=1, scale=5.0)  # one token has nearly all of the probability
def test_top_k_divergence_bounds_the_kl_divergence(seed: int, size: int, top_k: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    teacher, student = (scale * torch.randn(5, size, generator=generator) for _ in range(2))
    full_kl = functional.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    top_k_kl = top_k_divergence(teacher, student, top_k)
    assert (top_k_kl >= -1e-5).all() and (top_k_kl <= full_kl + 1e-4).all(), (
        "merging tokens cannot increase the divergence"
    )
    if top_k >= size:
        torch.testing.assert_close(top_k_kl, full_kl, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(top_k_divergence(teacher, teacher, top_k), torch.zeros(5), atol=1e-5, rtol=0)


def test_teacher_probabilities_are_mixed_in_training_only(assets: Assets) -> None:
    backbone = load(assets)
    model = add_random_adapter(backbone, "vision")
    data = distill_data(assets, backbone, teach=True)
    batch = data.collate([data[n] for n in range(6)])
    plain = DistillTask(model)(batch)
    task = DistillTask(model, top_k=7, weight=0.25)

    teacher = load(assets).model  # without any adapter
    teacher_tokens = torch.cat(all_tokens(teacher, batch.views, batch.sizes, batch.grids))
    theirs = target_logits(teacher, batch.teacher_text, teacher_tokens)
    assert torch.equal(target_tokens(batch.teacher_text), target_tokens(batch.text))
    ours = target_logits(model, batch.text, project(model, cls_tokens(model, batch.views)))
    expected = 0.75 * plain + 0.25 * top_k_divergence(theirs, ours, 7)
    mixed = task.train()(batch)
    torch.testing.assert_close(mixed, expected)
    assert not torch.allclose(mixed, plain)
    torch.testing.assert_close(task.eval()(batch), plain)
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())


def test_patch_distance_is_added_in_training_only(assets: Assets) -> None:
    """Also if the student sees only some views; the validation loss is the token loss alone."""
    backbone = load(assets)
    model = add_random_adapter(backbone, "vision")
    data = distill_data(assets, backbone, nested=(1, 2, 5))
    batch = data.collate([data[n] for n in range(8)])
    assert len({*batch.views_shown}) > 1 and len({*batch.targets}) > 1
    plain = DistillTask(model)(batch)
    task = DistillTask(model, patches=0.3)

    teacher, llava = load(assets).model, model.base_model.model.model
    seen = torch.cat([views[:n] for views, n in zip(batch.views.split(5), batch.views_shown, strict=True)])
    layers = teacher.model.vision_tower(seen, output_hidden_states=True).hidden_states
    patches = teacher.model.multi_modal_projector(layers[teacher.config.vision_feature_layer][:, 1:]).mean(1)
    torch.testing.assert_close(patch_means(model, seen), patches)
    tokens = llava.multi_modal_projector(cls_tokens(model, seen))
    expected, view, target = plain.clone(), 0, 0
    for shown, targets in zip(batch.views_shown, batch.targets, strict=True):
        ours, theirs = tokens[view : view + shown], patches[view : view + shown]
        distances = (ours - theirs).square().mean(1) / theirs.square().mean(1)  # per view, relative to its patches
        expected[target : target + targets] += 0.3 * distances.mean()
        view, target = view + shown, target + targets
    torch.testing.assert_close(task.train()(batch), expected)
    torch.testing.assert_close(task.eval()(batch), plain)
    assert patch_distance(patches, patches).abs().max() == 0

    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=1e-2)
    before = patch_distance(patches, tokens).mean().item()
    for _ in range(10):
        optimizer.zero_grad()
        task.train()(batch).mean().backward()
        optimizer.step()
    with torch.no_grad():
        after = patch_distance(patches, project(model, cls_tokens(model, seen))).mean().item()
    assert after < before


def test_disabling_the_adapter_for_the_teacher_keeps_deepspeed_updates(
    assets: Assets, world: DistributedContext
) -> None:
    """Against AdamW on the same task; PEFT disables and enables the adapter in every step."""
    results = []
    for deepspeed in (True, False):
        backbone = load(assets)
        model = add_random_adapter(backbone, "vision")
        data, task = distill_data(assets, backbone, teach=True), DistillTask(model, top_k=5, weight=0.5)
        loop = LoopSettings(global_batch_size=4, micro_batch=2, max_grad_norm=0.0)
        engine = Engine(task, world, loop) if deepspeed else None
        adam = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
        for step in range(3):
            micros = [data.collate([data[n] for n in (first, first + 1)]) for first in (4 * step, 4 * step + 2)]
            if engine:
                train_step(engine, micros, 1e-3, world)
            else:
                adam.zero_grad()
                losses = torch.cat([task.train()(micro) for micro in micros])
                losses.mean().backward()
                adam.step()
        if engine:
            engine.state_dict()
            engine.close()
        results.append({name: p.detach().clone() for name, p in task.named_parameters() if p.requires_grad})
    for name, weight in results[0].items():
        torch.testing.assert_close(weight, results[1][name], rtol=0, atol=1e-6, msg=name)


# --- fewer tokens per item ------------------------------------------------------------------------------


def test_nested_samples_use_the_first_views(assets: Assets) -> None:
    backbone = load(assets)
    data = distill_data(assets, backbone, nested=(1, 2, 5), seed=3)
    samples = [data[n] for n in range(12)]
    assert {sample.views_shown for sample in samples} == {1, 2, 5}
    assert [data[n].views_shown for n in range(12)] == [sample.views_shown for sample in samples], "drawn by position"
    for sample in samples:
        assert sample.example.input_ids.count(backbone.encoder.image_token_id) == sample.views_shown
        assert len(sample.views) == 5
    with torch.no_grad():
        together = DistillTask(backbone.model)(data.collate(samples))
        alone = []
        for sample in samples:
            vectors = project(backbone.model, cls_tokens(backbone.model, sample.views[: sample.views_shown]))
            alone.append(token_losses(backbone.model, collate([sample.example], 0), vectors))
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_tokens_per_item_uses_the_first_tokens(assets: Assets) -> None:
    backbone = load(assets)
    data = tune_data(assets, backbone, tokens_per_item=(1, 2))
    counts = set()
    for position in range(16):
        sample = data[position]
        image_tokens = sample.example.input_ids.count(backbone.encoder.image_token_id)
        candidates = sample.items.shape[0]
        row, target = data.pairs[position]
        listed = data._list(data.conversations[row], target, random.Random(f"0/{position}"))
        assert image_tokens == candidates and candidates % len(listed) == 0
        tokens_per_item = candidates // len(listed)
        counts.add(tokens_per_item)
        assert torch.equal(sample.items, data.store.lookup(listed)[:, :tokens_per_item].flatten(0, 1))
    assert counts == {1, 2}


@pytest.fixture
def bundle(assets: Assets, tmp_path: Path) -> Path:
    """A bundle for two tokens per item and the answer "none of these"."""
    backbone = load(assets)
    language = add_random_adapter(backbone, "language")
    save_bundle(tmp_path / "bundle", backbone, vision=assets.vision, language=language, tokens_per_item=2, none=True)
    return tmp_path / "bundle"


@pytest.mark.parametrize("tokens", [None, 1, 5])
def test_ranking_equals_likelihoods_with_any_tokens_per_item(assets: Assets, bundle: Path, tokens: int | None) -> None:
    loaded, store = Bundle.load(bundle), ItemStore.open(assets.store)
    assert loaded.info.tokens_per_item == 2 and loaded.info.none
    encoder, model = loaded.backbone.encoder, loaded.backbone.model
    rows = read_conversations(assets.rows)[:5]
    ranker = Ranker(loaded, store, tokens_per_item=tokens)
    requests = [Request(conversation=row, candidates=row.candidates[KEY]) for row in rows]
    for row, ranking in zip(rows, ranker.rank(requests), strict=True):
        candidates = row.candidates[KEY]
        listed = [Candidate(item, store.title(item)) for item in candidates]
        vectors = project(model, store.tokens(candidates, tokens or 2))
        logprobs = {}
        for item in (*candidates, NONE):
            example = encoder.recommendation(
                row, listed, photo_tokens=tokens or 2, target=item, max_length=400, none=True
            )
            with torch.no_grad():
                logprobs[item] = -float(token_losses(model, collate([example], encoder.pad), vectors).double().sum())
        assert dict(zip(ranking.ids, ranking.logprobs, strict=True)) == pytest.approx(
            {item: logprobs[item] for item in candidates}, abs=1e-4
        )
        probabilities = torch.tensor(list(logprobs.values())).softmax(0)
        assert ranking.none == pytest.approx(float(probabilities[-1]), abs=1e-4)


# --- none of these --------------------------------------------------------------------------------------


def test_none_share_removes_the_target_from_some_lists(assets: Assets) -> None:
    backbone = load(assets)
    tokenizer = backbone.encoder.tokenizer
    plain, data = tune_data(assets, backbone), tune_data(assets, backbone, none_share=0.4, seed=1)
    none = backbone.encoder.target(NONE)
    count, without_target = 300, 0
    for position in range(count):
        example = data[position].example
        row, target = data.pairs[position % len(data)]
        listed = data._list(data.conversations[row], target, random.Random(f"1/{position}"))
        labels = [label for label in example.labels if label != -100]
        assert len(listed) == len(plain._list(data.conversations[row], target, random.Random(0)))
        assert len(set(listed)) == len(listed)
        assert not (set(data.conversations[row].targets) - {target}) & set(listed)
        assert labels == (backbone.encoder.target(target) if target in listed else none)
        without_target += target not in listed
        if target not in data.conversations[row].candidates[KEY] and target not in listed:
            others = [i for i in data.conversations[row].candidates[KEY] if i not in data.conversations[row].targets]
            assert listed == others, "a list without its target is unchanged"
    assert 0.3 < without_target / count < 0.5
    none_line = tokenizer(f"{NONE}: none of these", add_special_tokens=False).input_ids
    text = data[0].example.input_ids
    assert any(text[n : n + len(none_line)] == none_line for n in range(len(text)))
    assert len(plain[0].example.input_ids) < len(text)


def ranked_list(none: float, *probabilities: float) -> RankedList:
    return RankedList(ids=tuple("abc"), probabilities=probabilities, none=none)


def test_none_of_these_metrics_by_hand(assets: Assets, tmp_path: Path) -> None:
    ids = list(assets.ids[:4])
    rows = [{"context": "x", "gt_items": [ids[3 * (n < 2)]], KEY: ids[:3]} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    test_set = TestSet.read("t", tmp_path / "rows.jsonl", candidates=KEY, stores=[ItemStore.open(assets.store)])
    metrics = none_of_these_metrics(
        test_set,
        [
            ranked_list(0.9, 0.5, 0.3, 0.2),
            ranked_list(0.2, 0.9, 0.1, 0.0),
            ranked_list(0.1, 0.9, 0.1, 0.0),
            ranked_list(0.45, 0.8, 0.2, 0.0),
        ],
    )
    assert metrics == {
        "lists_without": 2,
        "lists_with": 2,
        "said_none_without": 0.5,
        "said_none_with": 0.5,
        "auc": 0.75,
    }
    assert none_of_these_metrics(test_set, [RankedList(ids=())] * 4) is None
    with_empty_list = replace(test_set, conversations=test_set.conversations[:1] * 5, lists=(*test_set.lists, ()))
    rankings = [ranked_list(0.9, 0.5, 0.3, 0.2), *[ranked_list(0.2, 0.9, 0.1, 0.0)] * 3, RankedList(ids=())]
    metrics = none_of_these_metrics(with_empty_list, rankings)
    assert metrics is not None and metrics["lists_without"] + metrics["lists_with"] == 4


# --- through the commands -------------------------------------------------------------------------------


@pytest.mark.dist
def test_commands_from_distill_to_recommend(assets: Assets, tmp_path: Path, fork_server: ForkServer) -> None:
    def lavic(*argv: str | Path, ranks: int = 1) -> str:
        result = fork_server.lavic(*argv, ranks=ranks)
        assert result.returncode == 0, result.stderr
        return result.stdout

    base = ("--model.name", assets.base)
    loop = (*base, "--loop.steps", "4", "--loop.global-batch-size", "8", "--loop.lr", "0.01", "--lora.r", "4")
    sets = ("--shards", assets.photos, "--valid", assets.valid)
    method_args = ("--teacher-top-k", "8", "--teacher-patches", "0.5", "--nested", "1", "2", "5")
    lavic("distill", *sets, *loop, *method_args, "--out", tmp_path / "distill", ranks=2)
    captions = json.loads((tmp_path / "distill" / "captions.json").read_text())
    assert captions.keys() == {"full", "cls_before", "cls_after", *(f"cls_after_{n}" for n in (1, 2, 5))}
    assert captions["cls_after_5"] == captions["cls_after"]
    store = ("--store", tmp_path / "store")
    lavic("embed", *base, "--shards", assets.photos, "--adapter", tmp_path / "distill", "--out", tmp_path / "store")
    rows = ("--train", assets.rows, "--valid", assets.rows, "--max-length", "400")
    method_args = ("--tokens-per-item", "1", "2", "--none-share", "0.3")
    lavic("tune", *store, *rows, *loop, *method_args, "--out", tmp_path / "tune")
    info = BundleInfo.read(tmp_path / "tune" / "bundle")
    assert (info.tokens_per_item, info.none) == (2, True)
    bundle_and_store = ("--bundle", tmp_path / "tune" / "bundle", *store)
    tested = ("--test", assets.rows, "--tokens-per-item", "1", "--out", tmp_path / "evaluation")
    lavic("evaluate", *bundle_and_store, *tested)
    (result_set,) = json.loads((tmp_path / "evaluation" / "results.json").read_text())["sets"].values()
    assert result_set["none"]["lavic"]["lists_with"] + result_set["none"]["lavic"]["lists_without"] == 24
    output = lavic("recommend", *bundle_and_store, "--conversation", assets.rows, "--tokens-per-item", "1")
    assert output.count("none of these") == 24
