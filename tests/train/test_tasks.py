"""The two stages against the method written out plainly: one sample at a time, the vision tower in the loop."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from lavic.data.conversations import read_conversations
from lavic.data.dataset import Order, ShardDataset
from lavic.errors import DataError
from lavic.model.adapters import add_adapter, merge_adapter
from lavic.model.backbone import Backbone
from lavic.model.compress import all_tokens
from lavic.model.inputs import IGNORED
from lavic.model.itemstore import ItemStore
from lavic.model.settings import LoraSettings, ModelSettings
from lavic.train.tasks import DistillData, DistillTask, TeacherTask, TuneData, TuneTask, count_tokens
from tests.train.ground import KEY, Ground


@pytest.fixture
def backbone(ground: Ground) -> Backbone:
    return Backbone.load(ModelSettings(name=str(ground.base)))


def distill_data(ground: Ground, backbone: Backbone, **how) -> DistillData:
    how = {"max_length": 64, **how}
    return DistillData(ShardDataset(ground.photos), backbone.geometry, backbone.encoder, **how)


def tune_data(ground: Ground, backbone: Backbone, **how) -> TuneData:
    rows = read_conversations(ground.rows)
    how = {"candidates": KEY, "max_length": 400, **how}
    return TuneData(rows, ItemStore.open(ground.store), backbone.encoder, **how)


def plain_losses(llava: nn.Module, ids: list[int], target: list[int], photos: torch.Tensor) -> torch.Tensor:
    """Losses of a target's tokens, in words: embed, put photos where the image token stands, read, compare."""
    everything = torch.tensor([*ids, *target])
    embeds = llava.get_input_embeddings()(everything).clone()
    embeds[everything == llava.config.image_token_id] = photos
    hidden = llava.model.language_model(inputs_embeds=embeds[None]).last_hidden_state[0]
    said = torch.log_softmax(llava.lm_head(hidden).float(), -1)
    return torch.stack([-said[len(ids) + i - 1, token] for i, token in enumerate(target)])


def plain_cls(llava: nn.Module, views: torch.Tensor) -> torch.Tensor:
    return torch.stack([llava.model.vision_tower(view[None]).last_hidden_state[0, 0] for view in views])


def split(example) -> tuple[list[int], list[int]]:
    target = [label for label in example.labels if label != IGNORED]
    return example.input_ids[: -len(target)], target


def gradients(module: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    module.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.requires_grad}


def assert_close(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-4, atol=1e-6, msg=name)


def awaken(model: nn.Module) -> None:
    """A fresh adapter does nothing; this one does, so that both of its matrices have gradients."""
    torch.manual_seed(9)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.05)


# --- stage 1 ----------------------------------------------------------------------------------------


def test_distillation_is_the_plain_method(ground: Ground, backbone: Backbone) -> None:
    model = add_adapter(backbone, "vision", LoraSettings(r=2, dropout=0.0))
    awaken(model)
    data, task, llava = distill_data(ground, backbone), DistillTask(model), backbone.model
    samples = [data[p] for p in range(6)]
    batched = task(data.collate(samples))
    ours = gradients(model, batched.sum())

    plain = []
    for sample in samples:
        projected = llava.model.multi_modal_projector(plain_cls(llava, sample.views))
        plain.append(plain_losses(llava, *split(sample.example), projected))
    torch.testing.assert_close(batched, torch.cat(plain), rtol=1e-5, atol=1e-6)
    assert_close(ours, gradients(model, torch.cat(plain).sum()))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("vision_tower" in name or "multi_modal_projector" in name for name in trained)


def test_the_teacher_reads_every_patch(ground: Ground, backbone: Backbone) -> None:
    data = distill_data(ground, backbone, tokens="all")
    samples = [data[p] for p in range(8)]
    with torch.no_grad():
        batched = TeacherTask(backbone.model)(data.collate(samples))
        plain = [
            plain_losses(
                backbone.model,
                *split(sample.example),
                all_tokens(backbone.model, sample.views[None], [sample.size])[0],
            )
            for sample in samples
        ]
    torch.testing.assert_close(batched, torch.cat(plain), rtol=1e-5, atol=1e-6)
    assert len({sample.length for sample in samples}) > 2


@pytest.mark.parametrize("size", [(100, 100), (300, 40), (40, 300), (97, 96), (31, 30), (1000, 1), (7, 900)])
def test_patch_tokens_are_counted_without_a_model(backbone: Backbone, size: tuple[int, int]) -> None:
    views = torch.zeros(1, 5, 3, backbone.geometry.size, backbone.geometry.size)
    with torch.no_grad():
        assert count_tokens(backbone.geometry, size) == len(all_tokens(backbone.model, views, [size])[0])


def test_photos_without_a_usable_description_weigh_nothing(ground: Ground, backbone: Backbone) -> None:
    data = distill_data(ground, backbone)
    batch = data.collate([data[0], data[len(data) - 1]])
    assert batch.targets[0] > 0
    assert batch.targets[1] == 0
    short = distill_data(ground, backbone, max_length=20)
    targets = [short.collate([short[p]]).targets[0] for p in range(len(short))]
    lengths = [data[p].length - 5 for p in range(len(data))]
    assert 1 < targets.count(0) < len(targets)
    assert [n > 20 for n in lengths[:-1]] == [n == 0 for n in targets[:-1]]


def test_every_epoch_holds_each_photo_once_in_another_order(ground: Ground, backbone: Backbone) -> None:
    data = distill_data(ground, backbone, order=Order(24, 3))
    first, second = ([data[p].key for p in range(e * 24, e * 24 + 24)] for e in (0, 1))
    assert sorted(first) == sorted(second) == sorted(ShardDataset(ground.photos).keys)
    assert first != second


def test_lengths_are_told_without_making_samples(ground: Ground, backbone: Backbone) -> None:
    """Of both stages: a step is dealt by them, so that a wrong one costs a GPU's memory."""
    for data in (
        distill_data(ground, backbone, order=Order(24, 3), max_length=30),
        distill_data(ground, backbone, tokens="all"),
        tune_data(ground, backbone, shuffle=True),
        tune_data(ground, backbone, tokens="none"),
    ):
        told = [data.length(p) for p in range(30)]
        assert told == [data[p].length for p in range(30)]
        assert len(set(told)) > 3


# --- stage 2 ----------------------------------------------------------------------------------------


def test_tuning_from_the_store_is_tuning_with_the_vision_tower(ground: Ground, backbone: Backbone) -> None:
    """Also: the tower is not there in the first, and only language adapters are trained."""
    blind = Backbone.load(ModelSettings(name=str(ground.base)), vision=False)
    merge_adapter(blind, ground.vision, "vision")
    model = add_adapter(blind, "language", LoraSettings(r=2, dropout=0.0))
    awaken(model)
    data, task = tune_data(ground, blind, shuffle=True, seed=1), TuneTask(model)
    samples = [data[p] for p in range(6)]
    batched = task(data.collate(samples))
    ours = gradients(model, batched.sum())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("language_model" in name for name in trained)
    assert not hasattr(blind.model.model, "vision_tower")

    merge_adapter(backbone, ground.vision, "vision")
    seeing = add_adapter(backbone, "language", LoraSettings(r=2, dropout=0.0))
    awaken(seeing)
    photos = ShardDataset(ground.photos)
    by_id = {photos[i].item_id: photos[i].image for i in range(len(photos))}
    plain = []
    for position, sample in enumerate(samples):
        views = [torch.from_numpy(backbone.geometry.cut(by_id[item])) for item in listed(data, position)]
        with torch.no_grad():
            cls = torch.cat([plain_cls(backbone.model, view) for view in views])
            projected = backbone.model.model.multi_modal_projector(cls)
        plain.append(plain_losses(backbone.model, *split(sample.example), projected))
    torch.testing.assert_close(batched, torch.cat(plain), rtol=1e-5, atol=1e-5)
    theirs = gradients(seeing, torch.cat(plain).sum())
    assert_close(ours, theirs)


def listed(data: TuneData, position: int) -> list[str]:
    """The candidates of a sample, read out of its prompt."""
    words = data.encoder.tokenizer.decode(data[position].example.input_ids)
    ids = data.store.ids
    found = sorted((words.replace(" ", "").find(f"{id}:"), id) for id in ids)
    return [id for at, id in found if at >= 0]


def test_each_list_has_exactly_one_right_answer(ground: Ground, backbone: Backbone) -> None:
    data = tune_data(ground, backbone)
    before = copy.deepcopy(data.conversations)
    assert len(data) == sum(len(c.targets) for c in data.conversations) > len(data.conversations)
    for position, (row, target) in enumerate(data.pairs):
        conversation, shown = data.conversations[row], listed(data, position)
        assert shown.count(target) == 1
        assert not set(shown) & (set(conversation.targets) - {target})
        original = conversation.candidates[KEY]
        if target in original:
            assert shown == [item for item in original if item == target or item not in conversation.targets]
        else:
            assert len(shown) == len(original), "the target takes the place of a candidate"
            assert sum(a != b for a, b in zip(shown, original, strict=True)) == 1
        ids = data[position].example
        said = data.encoder.tokenizer.decode(split(ids)[1], skip_special_tokens=True)
        assert said.replace(" ", "") == target
    assert data.conversations == before, "conversations must not change: a row is read in every epoch"


def test_a_sample_depends_on_seed_and_position_alone(ground: Ground, backbone: Backbone) -> None:
    one, two, other = (tune_data(ground, backbone, shuffle=True, seed=seed) for seed in (1, 1, 2))
    epoch = len(one)
    backwards = {p: two[p].example for p in reversed(range(2 * epoch))}
    assert all(one[p].example == backwards[p] for p in range(2 * epoch))
    assert any(other[p].example != one[p].example for p in range(epoch))
    one.order = Order(epoch, 0)
    assert sorted(one[p].key for p in range(epoch)) == sorted(two[p].key for p in range(epoch))


def test_shuffled_lists_put_the_answer_everywhere(ground: Ground, backbone: Backbone) -> None:
    data = tune_data(ground, backbone, shuffle=True)
    data.order = Order(len(data), 0)
    places = [listed(data, p).index(data[p].key.partition(":")[2]) for p in range(300)]
    share = [places.count(place) / 300 for place in range(4)]
    assert min(share) > 0.12, share


def test_titles_only_has_no_photo_tokens(ground: Ground, backbone: Backbone) -> None:
    model = add_adapter(backbone, "language", LoraSettings(r=2, dropout=0.0))
    data = tune_data(ground, backbone, tokens="none")
    batch = data.collate([data[0], data[1]])
    assert batch.items is None
    assert not (batch.text.input_ids == backbone.model.config.image_token_id).any()
    assert torch.isfinite(TuneTask(model)(batch)).all()


def test_batch_mates_change_nothing(ground: Ground, backbone: Backbone) -> None:
    model = add_adapter(backbone, "language", LoraSettings(r=2, dropout=0.0))
    awaken(model)
    data, task = tune_data(ground, backbone), TuneTask(model.eval())
    samples = [data[p] for p in range(8)]
    with torch.no_grad():
        together = task(data.collate(samples))
        alone = torch.cat([task(data.collate([sample])) for sample in samples])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_items_that_are_not_in_the_store_are_named(ground: Ground, backbone: Backbone, tmp_path: Path) -> None:
    text = ground.rows.read_text().replace(ground.ids[3], "B000NOSUCH")
    (tmp_path / "rows.jsonl").write_text(text)
    rows = read_conversations(tmp_path / "rows.jsonl")
    how = {"candidates": KEY, "max_length": 400}
    with pytest.raises(DataError, match=r"rows.jsonl:\d+: B000NOSUCH is not in the item store"):
        TuneData(rows, ItemStore.open(ground.store), backbone.encoder, **how)
    with pytest.raises(DataError, match=r"rows.jsonl:1: no list 'candidates_x', only candidates_st"):
        TuneData(rows, ItemStore.open(ground.store), backbone.encoder, **{**how, "candidates": "candidates_x"})
