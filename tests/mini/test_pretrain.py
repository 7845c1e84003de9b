"""Pretraining a miniature: what each setting of its second phase does, and the whole command."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lavic.cli import main
from lavic.mini import catalog, curriculum, pretrain_data
from lavic.mini.catalog import CatalogueSize, write_catalogue
from lavic.mini.curriculum import PHOTO_LEVELS, Listing
from lavic.mini.drawing import draw
from lavic.mini.pretrain import Pretrainer
from lavic.mini.pretrain_settings import PretrainSettings
from lavic.model.config import ModelSettings
from lavic.model.loading import Backbone
from lavic.model.visual_tokens import patch_tokens

pytestmark = pytest.mark.slow


@pytest.fixture
def photos(products: list[catalog.Product], listings: list[Listing]) -> list[pretrain_data.Photo]:
    """The photos of all listed items."""
    listed_ids = {id for listing in listings for id in listing.ids}
    return [
        pretrain_data.Photo(p.id, draw(p.kind, p.colour, p.pattern, p.seed), p.title, p.description)
        for p in products
        if p.id in listed_ids
    ]


Begin = Callable[[PretrainSettings], Pretrainer]


@pytest.fixture
def begin(mini: Backbone, listings: list[Listing]) -> Begin:
    """Continues the pretraining of the packaged miniature with other settings."""

    def begin(settings: PretrainSettings) -> Pretrainer:
        model = copy.deepcopy(mini.model).requires_grad_(True)  # loaded, its weights are frozen
        return Pretrainer(model, mini.encoder, settings, listings, lambda _: None)

    return begin


@pytest.mark.parametrize(("every", "lists"), [(1, 4), (2, 2), (3, 1)])
def test_photo_lookup_every_sets_the_number_of_photo_lists(
    every: int, lists: int, begin: Begin, photos: list[pretrain_data.Photo], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = PretrainSettings(vision_steps=4, batch_size=2, photo_lookup_start=0, photo_lookup_every=every)
    pretrainer = begin(settings)
    calls = []

    def count_call(*_: object) -> tuple[torch.Tensor, float]:
        calls.append(1)
        return torch.zeros(()), 0.0

    monkeypatch.setattr(pretrainer, "_photo_lookup_loss", count_call)
    pretrainer.train_vision(photos, [])
    assert len(calls) == lists


def test_photo_lookup_alignment_loss_falls_in_training(begin: Begin, photos: list[pretrain_data.Photo]) -> None:
    """The loss that photo_lookup_alignment adds is proportional to it and falls in training."""
    pretrainer = begin(PretrainSettings())
    by_id = {photo.id: photo for photo in photos}

    def loss(weight: float) -> torch.Tensor:
        pretrainer.settings = PretrainSettings(photo_lookup_alignment=weight)
        pretrainer.rng.seed(3)
        return pretrainer._photo_lookup_loss(PHOTO_LEVELS[0], pretrainer.listings, by_id)[0]

    def align_loss() -> float:
        with torch.no_grad():
            return (loss(1.0) - loss(0.0)).item()

    with torch.no_grad():
        torch.testing.assert_close(loss(2.0) - loss(0.0), 2 * (loss(1.0) - loss(0.0)), rtol=1e-3, atol=1e-4)
    before = align_loss()
    projector = torch.optim.Adam(pretrainer.model.model.multi_modal_projector.parameters(), lr=1e-3)
    for _ in range(10):
        projector.zero_grad()
        loss(1.0).backward()
        projector.step()
    assert 0 < align_loss() < before


def test_title_loss_trains_the_vision_tower_only(begin: Begin, photos: list[pretrain_data.Photo]) -> None:
    """The loss falls in training; projector and language model get no gradient from it."""
    pretrainer = begin(PretrainSettings(title_weight=1.0))
    head = pretrainer.title_head
    assert head is not None
    pretrainer.title_loss(photos, head).backward()
    with_gradient = {name for name, p in pretrainer.model.named_parameters() if p.grad is not None}
    assert with_gradient and all("vision_tower" in name for name in with_gradient)
    before = pretrainer.title_loss(photos, head).item()
    pretrainer.settings = PretrainSettings(vision_steps=20, batch_size=4, photo_lookup_start=99, title_weight=1.0)
    pretrainer.train_vision(photos, [])
    assert pretrainer.title_loss(photos, head).item() < before - 0.1


@pytest.mark.parametrize(("as_items", "tokens_per_photo"), [(True, 5), (False, 17)])
def test_photo_lookup_as_items_sets_the_tokens_of_a_photo(
    as_items: bool,
    tokens_per_photo: int,
    begin: Begin,
    photos: list[pretrain_data.Photo],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As an item: one token per view, in the order of an item's views; else the thumbnail's patches and the newline."""
    pretrainer = begin(PretrainSettings(photo_lookup_as_items=as_items))
    calls = []

    def record_call(lists: curriculum.LookupBatch, tokens: torch.Tensor) -> tuple[torch.Tensor, float]:
        calls.append((lists, tokens.unflatten(0, (-1, tokens_per_photo))))
        return torch.zeros(()), 0.0

    monkeypatch.setattr(pretrainer, "_lookup_loss", record_call)
    by_id = {photo.id: photo for photo in photos}
    with torch.no_grad():
        pretrainer._photo_lookup_loss(PHOTO_LEVELS[0], pretrainer.listings, by_id)
        lists, tokens = calls[0]
        image = by_id[lists.photos[-1]].prepare(None)
        patches = patch_tokens(pretrainer.model, torch.from_numpy(pretrainer.geometry.cut(image)))
    image_token = pretrainer.model.config.image_token_id
    assert (lists.batch.input_ids == image_token).sum() == tokens_per_photo * len(lists.photos)
    thumbnail = torch.cat([patches[0], pretrainer.model.model.image_newline[None]])
    torch.testing.assert_close(tokens[-1], patches.mean(1) if as_items else thumbnail, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("share", "as_items"), [(0.0, 0), (1.0, 4)])
def test_describe_as_items_sets_the_share_of_item_tokens(
    share: float, as_items: int, begin: Begin, photos: list[pretrain_data.Photo], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = PretrainSettings(vision_steps=4, batch_size=2, photo_lookup_start=9, describe_as_items=share)
    pretrainer = begin(settings)
    batch_sizes = []
    real = pretrainer._as_items
    monkeypatch.setattr(pretrainer, "_as_items", lambda images: batch_sizes.append(len(images)) or real(images))
    pretrainer.train_vision(photos, [])
    assert batch_sizes == [2] * as_items


def test_pretrain_command_on_a_small_catalogue(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lavic.data.tar_shards import Sample
    from tests.crawled_sets import write_set

    size = CatalogueSize(
        train_items=60,
        valid_items=20,
        heldout_items=20,
        combination_items=20,
        train_conversations=40,
        test_conversations=2,
    )
    write_catalogue(tmp_path / "catalogue", base_url="http://127.0.0.1:1", size=size, seed=0)
    meta = json.loads((tmp_path / "catalogue" / "item2meta_train.json").read_text())
    samples = {"train": [], "valid": []}
    for id, item in meta.items():
        text = item["image_descriptions_llava_cleaned"].get(f"{id}_0.jpg", "")
        jpg = (tmp_path / "catalogue" / "images" / f"{id}_0.jpg").read_bytes()
        sample = Sample.of(item_id=id, n=0, jpg=jpg, title=item["title"], width=96, height=96, text=text or "A photo.")
        samples["train" if text else "valid"].append(sample)
    for name, split_samples in samples.items():
        write_set(tmp_path / name, split_samples)
    argv = f"""mini pretrain --out {tmp_path}/base --shards {tmp_path}/train --valid {tmp_path}/valid
        --train {tmp_path}/catalogue/train.jsonl --looks {tmp_path}/catalogue/looks.jsonl --threads 1
        --architecture.width 32 --architecture.heads 2 --architecture.layers 3 --architecture.vision-width 16
        --pretrain.language-steps 3 --pretrain.vision-steps 4 --pretrain.batch-size 4 --pretrain.augment
        --pretrain.describe-as-items .5 --pretrain.title-weight 1 --pretrain.photo-lookup-start 1
        --pretrain.photo-lookup-every 1 --pretrain.photo-lookup-extra-requests 2 --pretrain.photo-lookup-as-items
        --pretrain.photo-lookup-max-distance 0 --pretrain.photo-lookup-alignment 1""".split()
    assert main([*argv, "--minimum", "1000"]) == 2
    assert "words besides the prompt's own" in capsys.readouterr().err
    assert main(argv) == 0
    backbone = Backbone.load(ModelSettings(name=str(tmp_path / "base")))
    assert backbone.model.config.text_config.hidden_size == 32
    assert backbone.tokenizer.decode(backbone.encoder.target("B0MN123456")[:-1]).strip() == "B0MN123456"
    log = [json.loads(line) for line in (tmp_path / "base" / "pretrain.jsonl").read_text().splitlines()]
    assert "held_out_perplexity" in log[-1]
    assert main(argv) == 2  # the output folder has a model already
