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


@pytest.fixture
def photos(products: list[catalog.Product], listings: list[Listing]) -> list[pretrain_data.Photo]:
    """The photos of all that is listed."""
    wanted = {id for listing in listings for id in listing.ids}
    return [
        pretrain_data.Photo(p.id, draw(p.kind, p.colour, p.pattern, p.seed), p.title, p.description)
        for p in products
        if p.id in wanted
    ]


Begin = Callable[[PretrainSettings], Pretrainer]


@pytest.fixture
def begin(mini: Backbone, listings: list[Listing]) -> Begin:
    """Go on pretraining the packaged miniature, with other settings."""

    def begin(chosen: PretrainSettings) -> Pretrainer:
        model = copy.deepcopy(mini.model).requires_grad_(True)  # loaded, its weights are frozen
        return Pretrainer(model, mini.encoder, chosen, listings, lambda _: None)

    return begin


@pytest.mark.parametrize(("every", "lists"), [(1, 4), (2, 2), (3, 1)])
def test_lists_with_photos_come_as_often_as_asked(
    every: int, lists: int, begin: Begin, photos: list[pretrain_data.Photo], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = PretrainSettings(see_steps=4, batch_size=2, compare_from=0, compare_every=every)
    pretrainer = begin(chosen)
    asked = []

    def fetch(*_: object) -> tuple[torch.Tensor, float]:
        asked.append(1)
        return torch.zeros(()), 0.0

    monkeypatch.setattr(pretrainer, "_photo_lookup_loss", fetch)
    pretrainer.train_vision(photos, [])
    assert len(asked) == lists


def test_photos_in_lists_are_drawn_towards_their_words(begin: Begin, photos: list[pretrain_data.Photo]) -> None:
    """What the setting adds to the loss of the same lists falls while it is trained, and nothing is added without."""
    pretrainer = begin(PretrainSettings())
    by_id = {photo.id: photo for photo in photos}

    def loss(weight: float) -> torch.Tensor:
        pretrainer.settings = PretrainSettings(compare_align=weight)
        pretrainer.rng.seed(3)
        return pretrainer._photo_lookup_loss(PHOTO_LEVELS[0], pretrainer.listings, by_id)[0]

    def added() -> float:
        with torch.no_grad():
            return (loss(1.0) - loss(0.0)).item()

    with torch.no_grad():
        torch.testing.assert_close(loss(2.0) - loss(0.0), 2 * (loss(1.0) - loss(0.0)), rtol=1e-3, atol=1e-4)
    before = added()
    projector = torch.optim.Adam(pretrainer.model.model.multi_modal_projector.parameters(), lr=1e-3)
    for _ in range(10):
        projector.zero_grad()
        loss(1.0).backward()
        projector.step()
    assert 0 < added() < before


def test_cls_is_drawn_towards_titles_alone(begin: Begin, photos: list[pretrain_data.Photo]) -> None:
    """The loss falls in training, and neither projector nor language model learns anything from it."""
    pretrainer = begin(PretrainSettings(title_weight=1.0))
    head = pretrainer.title_head
    assert head is not None
    pretrainer.title_loss(photos, head).backward()
    learning = {name for name, p in pretrainer.model.named_parameters() if p.grad is not None}
    assert learning and all("vision_tower" in name for name in learning)
    before = pretrainer.title_loss(photos, head).item()
    pretrainer.settings = PretrainSettings(see_steps=20, batch_size=4, compare_from=99, title_weight=1.0)
    pretrainer.train_vision(photos, [])
    assert pretrainer.title_loss(photos, head).item() < before - 0.1


@pytest.mark.parametrize(("as_items", "each"), [(True, 5), (False, 17)])
def test_a_photo_in_a_list_has_as_many_tokens_as_asked(
    as_items: bool,
    each: int,
    begin: Begin,
    photos: list[pretrain_data.Photo],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As an item: one of each view, in the order of an item's views; else the whole view's patches and the newline."""
    pretrainer = begin(PretrainSettings(compare_as_items=as_items))
    shown = []

    def fetch(lists: curriculum.LookupBatch, tokens: torch.Tensor) -> tuple[torch.Tensor, float]:
        shown.append((lists, tokens.unflatten(0, (-1, each))))
        return torch.zeros(()), 0.0

    monkeypatch.setattr(pretrainer, "_lookup_loss", fetch)
    by_id = {photo.id: photo for photo in photos}
    with torch.no_grad():
        pretrainer._photo_lookup_loss(PHOTO_LEVELS[0], pretrainer.listings, by_id)
        lists, tokens = shown[0]
        image = by_id[lists.photos[-1]].prepare(None)
        patches = patch_tokens(pretrainer.model, torch.from_numpy(pretrainer.geometry.cut(image)))
    image_token = pretrainer.model.config.image_token_id
    assert (lists.batch.input_ids == image_token).sum() == each * len(lists.photos)
    whole = torch.cat([patches[0], pretrainer.model.model.image_newline[None]])
    torch.testing.assert_close(tokens[-1], patches.mean(1) if as_items else whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("share", "as_items"), [(0.0, 0), (1.0, 4)])
def test_descriptions_come_from_item_like_tokens_as_often_as_asked(
    share: float, as_items: int, begin: Begin, photos: list[pretrain_data.Photo], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = PretrainSettings(see_steps=4, batch_size=2, compare_from=9, describe_as_items=share)
    pretrainer = begin(chosen)
    asked = []
    real = pretrainer._as_items
    monkeypatch.setattr(pretrainer, "_as_items", lambda images: asked.append(len(images)) or real(images))
    pretrainer.train_vision(photos, [])
    assert asked == [2] * as_items


def test_pretraining_runs_whole_on_a_small_catalogue(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
        made = Sample.of(item_id=id, n=0, jpg=jpg, title=item["title"], width=96, height=96, text=text or "A photo.")
        samples["train" if text else "valid"].append(made)
    for name, some in samples.items():
        write_set(tmp_path / name, some)
    words = f"""mini pretrain --out {tmp_path}/base --shards {tmp_path}/train --valid {tmp_path}/valid
        --train {tmp_path}/catalogue/train.jsonl --looks {tmp_path}/catalogue/looks.jsonl --threads 1
        --architecture.width 32 --architecture.heads 2 --architecture.layers 3 --architecture.vision-width 16
        --pretrain.read-steps 3 --pretrain.see-steps 4 --pretrain.batch-size 4 --pretrain.augment
        --pretrain.describe-as-items .5 --pretrain.title-weight 1 --pretrain.compare-from 1 --pretrain.compare-every 1
        --pretrain.compare-more 2 --pretrain.compare-as-items --pretrain.compare-reach 0
        --pretrain.compare-align 1""".split()
    assert main([*words, "--minimum", "1000"]) == 2
    assert "words besides the prompt's own" in capsys.readouterr().err
    assert main(words) == 0
    backbone = Backbone.load(ModelSettings(name=str(tmp_path / "base")))
    assert backbone.model.config.text_config.hidden_size == 32
    assert backbone.tokenizer.decode(backbone.encoder.target("B0MN123456")[:-1]).strip() == "B0MN123456"
    log = [json.loads(line) for line in (tmp_path / "base" / "pretrain.jsonl").read_text().splitlines()]
    assert "held_out_perplexity" in log[-1]
    assert main(words) == 2  # a model is there already
