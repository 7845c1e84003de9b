"""Numbers are those of `docs/differences.md`, last section: what went wrong between photos and tokens."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lavic.data.conversations import read_conversations
from lavic.data.shard_dataset import ShardDataset
from lavic.errors import DataError
from lavic.evaluation.test_set import TestSet
from lavic.model.config import LoraSettings, ModelSettings
from lavic.model.inputs.token_loss import splice
from lavic.model.item_store import ItemStore, write_manifest, write_part
from lavic.model.loading import Backbone
from lavic.model.lora import add_adapter
from lavic.model.visual_tokens import cls_tokens, project
from lavic.shards.image.normalize import PhotoSettings
from lavic.storage.atomic import atomic_open
from lavic.train.distillation.dataset import DistillDataset
from lavic.train.distillation.task import DistillTask
from lavic.train.recommendation.dataset import TuneDataset
from lavic.train.recommendation.task import TuneTask
from tests.shards.image.to_jpeg import to_jpeg
from tests.train.assets import KEY, Assets

NARROW, SQUARE = (60, 20), (50, 50)


def photo(size: tuple[int, int], seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def load(assets: Assets, views: str = "five") -> Backbone:
    return Backbone.load(ModelSettings(name=str(assets.base), views=views))


@pytest.fixture
def uneven_store(assets: Assets, tmp_path: Path) -> ItemStore:
    """A store in which items have three, four or five tokens."""
    backbone = load(assets, "lavic")
    (tmp_path / "store").mkdir()
    items = [{"id": item, "key": f"{item}_0", "title": "Acme mug"} for item in assets.ids]
    tokens = torch.randn(len(items), 5, backbone.vision_width, generator=torch.Generator().manual_seed(1))
    for n, item in enumerate(items):
        if n % 3:
            item["views"] = 5 - n % 3
            tokens[n, 5 - n % 3 :] = 0
    write_manifest(tmp_path / "store", backbone, None, [write_part(tmp_path / "store", "00000", items, tokens)])
    return ItemStore.open(tmp_path / "store")


@pytest.mark.parametrize("size", [NARROW, SQUARE, (20, 60), (7, 300), (1000, 10)])
def test_b16_every_photo_has_five_views(assets: Assets, size: tuple[int, int]) -> None:
    assert len(load(assets).geometry.cut(photo(size))) == 5


def test_b16_the_released_views_are_available(assets: Assets) -> None:
    geometry = load(assets, "lavic").geometry
    sizes = (NARROW, SQUARE, (20, 20), (20, 30), (90, 20))
    assert [len(geometry.cut(photo(size))) for size in sizes] == [4, 5, 3, 3, 4]


@pytest.mark.parametrize("views", ["five", "lavic"])
def test_b17_tokens_do_not_depend_on_batch_mates(assets: Assets, views: str) -> None:
    backbone = load(assets, views)
    data = DistillDataset(ShardDataset(assets.photos), backbone.geometry, backbone.encoder, max_length=64)
    task, samples = DistillTask(backbone.model), [data[n] for n in range(12)]
    counts = {len(sample.views) for sample in samples}
    assert counts == {5} if views == "five" else len(counts) > 1
    for sample in samples:
        assert sample.example.input_ids.count(backbone.encoder.image_token_id) == len(sample.views), (
            "one image token per view"
        )
    with torch.no_grad():
        together = task(data.collate(samples))
        alone = torch.cat([task(data.collate([sample])) for sample in samples])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_b18_each_candidates_tokens_follow_its_title(assets: Assets, uneven_store: ItemStore) -> None:
    backbone = load(assets, "lavic")
    data = TuneDataset(read_conversations(assets.rows), uneven_store, backbone.encoder, candidates=KEY, max_length=400)
    sample = data[0]
    batch = data.collate([sample])
    embeds = splice(backbone.model, batch.text.input_ids, project(backbone.model, batch.items))[0]
    tokenizer = backbone.encoder.tokenizer
    is_image_token = torch.tensor(sample.example.input_ids) == backbone.encoder.image_token_id
    counts = []
    for item in data._list(data.conversations[data.pairs[0][0]], data.pairs[0][1], None):
        name = tokenizer(f"{item}:", add_special_tokens=False).input_ids
        start = next(n for n in range(len(is_image_token)) if sample.example.input_ids[n : n + len(name)] == name)
        first = start + int(is_image_token[start:].int().argmax())
        count = uneven_store.count(item)
        assert is_image_token[first : first + count].all() and not is_image_token[first + count]
        torch.testing.assert_close(embeds[first : first + count], project(backbone.model, uneven_store.tokens([item])))
        counts.append(count)
    assert len(set(counts)) > 1, "items need different numbers of tokens"


def test_b19_lists_of_different_lengths_share_a_batch(assets: Assets, uneven_store: ItemStore) -> None:
    backbone = load(assets, "lavic")
    rows = read_conversations(assets.rows)
    for n, row in enumerate(rows):
        row.candidates[KEY] = row.candidates[KEY][: 2 + n % 4]
    data = TuneDataset(rows, uneven_store, backbone.encoder, candidates=KEY, max_length=400)
    task, samples = TuneTask(backbone.model), [data[n] for n in range(8)]
    with torch.no_grad():
        together = task(data.collate(samples))
        alone = torch.cat([task(data.collate([sample])) for sample in samples])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_b20_item_tokens_are_cls_before_the_final_norm(assets: Assets) -> None:
    """The method, not a fault: the last hidden layer before the final norm."""
    backbone = load(assets)
    views = torch.from_numpy(backbone.geometry.cut(photo(SQUARE)))
    tower = backbone.model.model.vision_tower
    output = tower(views, output_hidden_states=True)
    torch.testing.assert_close(cls_tokens(backbone.model, views), output.hidden_states[-1][:, 0])
    assert not torch.allclose(output.pooler_output, output.hidden_states[-1][:, 0])


def test_b21_teacher_probabilities_can_be_distilled(assets: Assets) -> None:
    """By default only the teacher's text is used, as released; `lavic describe` writes it."""
    backbone = load(assets)
    model = add_adapter(backbone, "vision", LoraSettings(r=2, dropout=0.0))
    data = DistillDataset(ShardDataset(assets.photos), backbone.geometry, backbone.encoder, max_length=64, teach=True)
    batch = data.collate([data[n] for n in range(4)])
    token_loss, mixed_loss = DistillTask(model).train()(batch), DistillTask(model, top_k=8, weight=0.5).train()(batch)
    assert mixed_loss.shape == token_loss.shape and not torch.allclose(token_loss, mixed_loss)


def test_b22_an_item_without_a_photo_is_refused_or_counted(assets: Assets, tmp_path: Path) -> None:
    store = ItemStore.open(assets.store)
    (tmp_path / "rows.jsonl").write_text(assets.rows.read_text().replace(assets.ids[3], "B000NOSUCH"))
    rows = read_conversations(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="B000NOSUCH is not in the item store"):
        TuneDataset(rows, store, load(assets).encoder, candidates=KEY, max_length=400)
    with pytest.raises(DataError, match="candidate B000NOSUCH of 5 is not in the item store"):
        TestSet.read("t", tmp_path / "rows.jsonl", candidates=KEY, stores=[store])
    test_set = TestSet.read("t", tmp_path / "rows.jsonl", candidates=KEY, stores=[store], missing="drop")
    assert test_set.left_out["candidates_not_in_store"] > 0


def test_b23_transparent_photos_become_jpegs_and_partial_writes_are_removed(tmp_path: Path) -> None:
    clear = io.BytesIO()
    Image.new("RGBA", (40, 40), (9, 9, 9, 0)).save(clear, "PNG")
    assert Image.open(io.BytesIO(to_jpeg(clear.getvalue(), PhotoSettings()).jpg)).getpixel((3, 3)) == (255, 255, 255)
    with pytest.raises(KeyboardInterrupt), atomic_open(tmp_path / "photo.jpg") as file:
        file.write(b"half of it")
        raise KeyboardInterrupt
    assert not (tmp_path / "photo.jpg").exists()
