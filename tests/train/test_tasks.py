"""What the stages learn from: photos with descriptions, lists with one right answer."""

from __future__ import annotations

import copy
import multiprocessing
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lavic.data.conversations import read_conversations
from lavic.data.shard_dataset import ShardDataset
from lavic.distributed.context import DistributedContext
from lavic.errors import DataError
from lavic.model.config import LoraSettings, ModelSettings
from lavic.model.inputs.label_mask import IGNORED
from lavic.model.item_store import ItemStore
from lavic.model.loading import Backbone
from lavic.model.lora import add_adapter
from lavic.model.visual_tokens import all_tokens, count_patch_tokens
from lavic.train.config import LoopSettings
from lavic.train.distillation.dataset import DistillDataset
from lavic.train.input.data_loader import TrainDataLoader
from lavic.train.input.shuffle_order import ShuffleOrder
from lavic.train.recommendation.dataset import TuneDataset
from lavic.train.recommendation.task import TuneTask
from tests.train.assets import KEY, Assets


@pytest.fixture
def backbone(assets: Assets) -> Backbone:
    return Backbone.load(ModelSettings(name=str(assets.base)))


def distill_data(assets: Assets, backbone: Backbone, **options) -> DistillDataset:
    options = {"max_length": 64, **options}
    return DistillDataset(ShardDataset(assets.photos), backbone.geometry, backbone.encoder, **options)


def tune_data(assets: Assets, backbone: Backbone, **options) -> TuneDataset:
    rows = read_conversations(assets.rows)
    options = {"candidates": KEY, "max_length": 400, **options}
    return TuneDataset(rows, ItemStore.open(assets.store), backbone.encoder, **options)


def split(example) -> tuple[list[int], list[int]]:
    target = [label for label in example.labels if label != IGNORED]
    return example.input_ids[: -len(target)], target


def randomize_adapter(model: nn.Module) -> None:
    """Random values for a new adapter, so that both LoRA matrices have gradients."""
    torch.manual_seed(9)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.05)


# --- stage 1 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(100, 100), (300, 40), (40, 300), (97, 96), (31, 30), (1000, 1), (7, 900)])
def test_patch_tokens_are_counted_without_a_model(backbone: Backbone, size: tuple[int, int]) -> None:
    views = torch.zeros(1, 5, 3, backbone.geometry.size, backbone.geometry.size)
    with torch.no_grad():
        assert count_patch_tokens(backbone.geometry, size) == len(all_tokens(backbone.model, views, [size])[0])


def test_photos_without_a_usable_description_have_no_targets(assets: Assets, backbone: Backbone) -> None:
    data = distill_data(assets, backbone)
    batch = data.collate([data[0], data[len(data) - 1]])
    assert batch.targets[0] > 0
    assert batch.targets[1] == 0
    short = distill_data(assets, backbone, max_length=20)
    targets = [short.collate([short[p]]).targets[0] for p in range(len(short))]
    lengths = [data[p].length - 5 for p in range(len(data))]
    assert 1 < targets.count(0) < len(targets)
    assert [n > 20 for n in lengths[:-1]] == [n == 0 for n in targets[:-1]]


def test_every_epoch_has_each_photo_once_in_another_order(assets: Assets, backbone: Backbone) -> None:
    data = distill_data(assets, backbone, order=ShuffleOrder(24, 3))
    first, second = ([data[p].key for p in range(e * 24, e * 24 + 24)] for e in (0, 1))
    assert sorted(first) == sorted(second) == sorted(ShardDataset(assets.photos).keys)
    assert first != second


def test_lengths_and_keys_equal_those_of_the_samples(assets: Assets, backbone: Backbone) -> None:
    """For both stages: micro-batches are formed by these lengths, so a wrong one may exceed a GPU's memory."""
    for data in (
        distill_data(assets, backbone, order=ShuffleOrder(24, 3), max_length=30),
        distill_data(assets, backbone, tokens="all"),
        tune_data(assets, backbone, shuffle=True),
        tune_data(assets, backbone, tokens="none"),
    ):
        lengths = data.lengths(range(30))
        assert lengths == [data[p].length for p in range(30)]
        assert [data.key(p) for p in range(30)] == [data[p].key for p in range(30)]
        assert len(set(lengths)) > 3


# --- stage 2 ----------------------------------------------------------------------------------------


def candidates_in_prompt(data: TuneDataset, position: int) -> list[str]:
    """The candidates in the prompt of a sample."""
    text = data.encoder.tokenizer.decode(data[position].example.input_ids)
    ids = data.store.ids
    positions = sorted((text.replace(" ", "").find(f"{id}:"), id) for id in ids)
    return [id for position_in_text, id in positions if position_in_text >= 0]


def test_each_list_has_exactly_one_target(assets: Assets, backbone: Backbone) -> None:
    data = tune_data(assets, backbone)
    before = copy.deepcopy(data.conversations)
    assert len(data) == sum(len(c.targets) for c in data.conversations) > len(data.conversations)
    for position, (row, target) in enumerate(data.pairs):
        conversation, shown = data.conversations[row], candidates_in_prompt(data, position)
        assert shown.count(target) == 1
        assert not set(shown) & (set(conversation.targets) - {target})
        original = conversation.candidates[KEY]
        if target in original:
            assert shown == [item for item in original if item == target or item not in conversation.targets]
        else:
            assert len(shown) == len(original), "the target takes the place of a candidate"
            assert sum(a != b for a, b in zip(shown, original, strict=True)) == 1
        ids = data[position].example
        answer = data.encoder.tokenizer.decode(split(ids)[1], skip_special_tokens=True)
        assert answer.replace(" ", "") == target
    assert data.conversations == before, "conversations must not change: a row is read in every epoch"


def test_a_sample_depends_only_on_seed_and_position(assets: Assets, backbone: Backbone) -> None:
    data, same_seed, other_seed = (tune_data(assets, backbone, shuffle=True, seed=seed) for seed in (1, 1, 2))
    epoch = len(data)
    backwards = {p: same_seed[p].example for p in reversed(range(2 * epoch))}
    assert all(data[p].example == backwards[p] for p in range(2 * epoch))
    assert any(other_seed[p].example != data[p].example for p in range(epoch))
    data.order = ShuffleOrder(epoch, 0)
    assert sorted(data[p].key for p in range(epoch)) == sorted(same_seed[p].key for p in range(epoch))


def test_shuffled_lists_put_the_target_at_every_position(assets: Assets, backbone: Backbone) -> None:
    data = tune_data(assets, backbone, shuffle=True)
    data.order = ShuffleOrder(len(data), 0)
    target_positions = [candidates_in_prompt(data, p).index(data[p].key.partition(":")[2]) for p in range(300)]
    share = [target_positions.count(index) / 300 for index in range(4)]
    assert min(share) > 0.12, share


def test_tokens_none_has_no_image_tokens(assets: Assets, backbone: Backbone) -> None:
    model = add_adapter(backbone, "language", LoraSettings(r=2, dropout=0.0))
    data = tune_data(assets, backbone, tokens="none")
    batch = data.collate([data[0], data[1]])
    assert batch.items is None
    assert not (batch.text.input_ids == backbone.model.config.image_token_id).any()
    assert torch.isfinite(TuneTask(model)(batch)).all()


def test_losses_do_not_depend_on_batch_mates(assets: Assets, backbone: Backbone) -> None:
    model = add_adapter(backbone, "language", LoraSettings(r=2, dropout=0.0))
    randomize_adapter(model)
    data, task = tune_data(assets, backbone), TuneTask(model.eval())
    samples = [data[p] for p in range(8)]
    with torch.no_grad():
        together = task(data.collate(samples))
        alone = torch.cat([task(data.collate([sample])) for sample in samples])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_items_missing_from_the_store_are_named(assets: Assets, backbone: Backbone, tmp_path: Path) -> None:
    text = assets.rows.read_text().replace(assets.ids[3], "B000NOSUCH")
    (tmp_path / "rows.jsonl").write_text(text)
    rows = read_conversations(tmp_path / "rows.jsonl")
    options = {"candidates": KEY, "max_length": 400}
    with pytest.raises(DataError, match=r"rows.jsonl:\d+: B000NOSUCH is not in the item store"):
        TuneDataset(rows, ItemStore.open(assets.store), backbone.encoder, **options)
    with pytest.raises(DataError, match=r"rows.jsonl:1: no list 'candidates_x', only candidates_st"):
        TuneDataset(rows, ItemStore.open(assets.store), backbone.encoder, **{**options, "candidates": "candidates_x"})


# --- both stages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [distill_data, tune_data])
@pytest.mark.slow
def test_forkserver_workers_give_the_same_batches(assets: Assets, backbone: Backbone, stage: Any) -> None:
    """The start method of Python 3.14: workers are not sent the set or the store."""
    data = stage(assets, backbone)
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        loops = [LoopSettings(global_batch_size=4, num_workers=workers) for workers in (0, 1)]
        steps = [list(TrainDataLoader(data, DistributedContext(), loop).steps(0, 2)) for loop in loops]
    finally:
        multiprocessing.set_start_method(before, force=True)
    for expected, loaded in zip(*steps, strict=True):
        for a, b in zip(expected, loaded, strict=True):
            assert a.keys == b.keys and torch.equal(a.text.input_ids, b.text.input_ids)
    stored = data.photos if stage is distill_data else data.store
    assert len(ForkingPickler.dumps(stored)) < 500
