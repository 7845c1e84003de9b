"""Numbers are those of `docs/differences.md`, last section: what taught or measured the wrong thing."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path

import pytest
import torch

from lavic.data.conversations import read_conversations
from lavic.data.schema import Conversation, Turn
from lavic.data.shard_dataset import ShardDataset
from lavic.distributed.context import DistributedContext
from lavic.evaluation.test_set import TestSet
from lavic.metrics.ranking_metrics import compute_metrics
from lavic.metrics.relevance import Prediction, judge
from lavic.model.bundle import Bundle, save_bundle
from lavic.model.config import LoraSettings, ModelSettings
from lavic.model.generation import generate
from lavic.model.inputs.label_mask import IGNORED
from lavic.model.item_store import ItemStore
from lavic.model.loading import Backbone
from lavic.model.lora import add_adapter
from lavic.model.prompts import NONE, Candidate
from lavic.recommend.ranking.ranker import MAX_NEW_TOKENS, Ranker
from lavic.recommend.ranking.request import Request
from lavic.train.distillation.dataset import DistillDataset
from lavic.train.distillation.task import DistillTask
from lavic.train.evaluation import evaluate
from lavic.train.recommendation.dataset import TuneDataset
from lavic.train.recommendation.task import TuneTask
from tests.train.assets import KEY, Assets


@pytest.fixture
def backbone(assets: Assets) -> Backbone:
    return Backbone.load(ModelSettings(name=str(assets.base)))


def distill_data(assets: Assets, backbone: Backbone) -> DistillDataset:
    return DistillDataset(ShardDataset(assets.photos), backbone.geometry, backbone.encoder, max_length=64)


def tune_data(assets: Assets, backbone: Backbone, **options) -> TuneDataset:
    rows, store = read_conversations(assets.rows), ItemStore.open(assets.store)
    return TuneDataset(rows, store, backbone.encoder, **{"candidates": KEY, "max_length": 400, **options})


def test_b06_each_row_is_masked_by_its_own_prompt(assets: Assets, backbone: Backbone) -> None:
    for data in (distill_data(assets, backbone), tune_data(assets, backbone)):
        samples = [data[n] for n in range(8)]
        assert len({sample.length for sample in samples}) > 2, "the rows need different lengths"
        batch = data.collate(samples).text
        for row, sample in enumerate(samples):
            labelled = batch.input_ids[row][batch.labels[row] != IGNORED].tolist()
            assert labelled == [label for label in sample.example.labels if label != IGNORED]
            assert labelled[-1] == backbone.encoder.eos
            assert backbone.encoder.image_token_id not in labelled


def test_b06_a_batchs_losses_equal_those_of_its_rows(assets: Assets, backbone: Backbone) -> None:
    data, task = distill_data(assets, backbone), DistillTask(backbone.model)
    samples = [data[n] for n in range(8)]
    with torch.no_grad():
        together = task(data.collate(samples))
        alone = torch.cat([task(data.collate([sample])) for sample in samples])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_b07_validation_has_targets(assets: Assets, backbone: Backbone) -> None:
    data = tune_data(assets, backbone)
    result = evaluate(TuneTask(backbone.model), data, DistributedContext(), batch_size=4, device=torch.device("cpu"))
    assert result.tokens == sum(len(backbone.encoder.target(target)) for _, target in data.pairs)
    assert 0 < result.loss < 100


def test_b08_a_truncated_prompt_keeps_candidates_cue_and_target(assets: Assets, backbone: Backbone) -> None:
    encoder = backbone.encoder
    conversation = Conversation(
        id="t", turns=(Turn("seeker", "word " * 900), *[Turn("comment", "Any word") for _ in range(99)])
    )
    listed = [Candidate(item, "Acme mug") for item in assets.ids[:10]]
    example = encoder.recommendation(conversation, listed, photo_tokens=5, target=assets.ids[3], max_length=400)
    assert len(example.input_ids) <= 400
    assert example.input_ids.count(encoder.image_token_id) == 50
    labels = [label for label in example.labels if label != IGNORED]
    assert labels == example.input_ids[-len(labels) :] == encoder.target(assets.ids[3])
    assert "[/INST]" in encoder.tokenizer.decode(example.input_ids[-len(labels) - 2 : -len(labels)])


def test_b09_every_target_ends_with_eos(assets: Assets, backbone: Backbone) -> None:
    for data in (distill_data(assets, backbone), tune_data(assets, backbone)):
        batch = data.collate([data[n] for n in range(6)]).text
        ends = [ids[labels != IGNORED][-1].item() for ids, labels in zip(batch.input_ids, batch.labels, strict=True)]
        assert ends == [backbone.encoder.eos] * 6


@pytest.fixture
def ranker(assets: Assets, backbone: Backbone, tmp_path: Path) -> Ranker:
    language = add_adapter(backbone, "language", LoraSettings(r=2))
    save_bundle(tmp_path / "bundle", backbone, vision=assets.vision, language=language)
    return Ranker(Bundle.load(tmp_path / "bundle"), ItemStore.open(assets.store))


def test_b10_ids_are_not_truncated(assets: Assets, ranker: Ranker) -> None:
    assert MAX_NEW_TOKENS >= 10 + 6, "an ASIN needs up to 10 tokens and may follow a few words"
    row = read_conversations(assets.rows)[0]
    encoded = ranker.encode(Request(conversation=row, candidates=assets.ids[:4]))
    assert encoded.targets == [ranker.encoder.target(item) for item in assets.ids[:4]]


def test_b11_ids_of_any_form_are_parsed(ranker: Ranker) -> None:
    assert ranker._parse_id("I choose 0123456789 of them", ["0123456789", "B0MN010001"]) == "0123456789"
    assert ranker._parse_id("BATHROOM1 B0MN010001", ["B0MN010001"]) == "B0MN010001"
    assert ranker._parse_id(f"'{ranker.store.ids[2]}'.", ["B0MN010001"]) == ranker.store.ids[2], "not a candidate"


def test_b12_a_row_with_two_targets_can_be_a_hit() -> None:
    row = Prediction(targets=("a", "b"), candidates=("a", "b", "c"), ranking=("a", "c", "b"))
    values = {name: terms.value for name, terms in compute_metrics(judge([row])).items()}
    assert values["hit_rate"] == 1.0
    assert values["recall_micro"] == 0.5


def test_b13_reading_a_row_does_not_change_it(assets: Assets, backbone: Backbone) -> None:
    data = tune_data(assets, backbone)
    before = copy.deepcopy(data.conversations)
    several = [n for n, (row, _) in enumerate(data.pairs) if len(before[row].targets) > 1]
    assert several
    for n in (*several, *reversed(several)):
        _, target = data.pairs[n]
        others = set(before[data.pairs[n][0]].targets) - {target}
        shown = data._list(data.conversations[data.pairs[n][0]], target, random.Random(0))
        assert target in shown and not others & set(shown)
    assert data.conversations == before


def test_b14_targets_are_not_added_to_test_lists(assets: Assets, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in assets.rows.read_text().splitlines()]
    absent = [n for n, row in enumerate(rows) if not set(row["gt_items"]) & set(row[KEY])]
    assert absent
    test_set = TestSet.read("t", assets.rows, candidates=KEY, stores=[ItemStore.open(assets.store)])
    assert [list(listed) for listed in test_set.lists] == [row[KEY] for row in rows]


def test_b15_generated_text_does_not_depend_on_the_batch(assets: Assets, backbone: Backbone) -> None:
    prompts = [backbone.encoder.prompt(("[INST] ", "word " * n, "[/INST]")) for n in (1, 9, 4, 30)]
    together = generate(backbone.model, backbone.encoder, prompts, None, max_new_tokens=12)
    alone = [generate(backbone.model, backbone.encoder, [prompt], None, max_new_tokens=12)[0] for prompt in prompts]
    assert [continuation.text for continuation in together] == [continuation.text for continuation in alone]
    for batched, single in zip(together, alone, strict=True):
        assert batched.logprob == pytest.approx(single.logprob, abs=1e-4)


def test_b14_training_lists_may_lack_their_target(assets: Assets, backbone: Backbone) -> None:
    data = tune_data(assets, backbone, none_share=0.5)
    none = backbone.encoder.target(NONE)
    labels = [[label for label in data[n].example.labels if label != IGNORED] for n in range(40)]
    assert 5 < labels.count(none) < 35
