"""The packaged base model: what it can do, what it cannot, and that its making runs."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from lavic.cli import main
from lavic.errors import DataError
from lavic.mini import catalog, curriculum, lessons
from lavic.mini.architecture import Architecture, adopt, build
from lavic.mini.catalog import CatalogueSize, converse, make_products, pick_candidates, write_catalogue
from lavic.mini.curriculum import LEVELS, PHOTO_LEVELS, Level, Listing
from lavic.mini.drawing import COLOURS, KINDS, PATTERNS, draw
from lavic.mini.pretrain import Pretrainer
from lavic.mini.settings import PretrainSettings
from lavic.mini.tokenizer import SPACE, make_tokenizer
from lavic.model.backbone import Backbone
from lavic.model.compress import all_tokens, cls_tokens, patch_tokens, project
from lavic.model.inputs import IGNORED, Batch, collate, token_losses
from lavic.model.prompts import Candidate, describe, recommend
from lavic.model.settings import ModelSettings
from lavic.model.source import resolve


@pytest.fixture(scope="module")
def mini() -> Backbone:
    return Backbone.load(ModelSettings(name="mini"))


@pytest.fixture(scope="module")
def products() -> list[catalog.Product]:
    looks = [(k, c, p) for k in KINDS for c in COLOURS for p in PATTERNS]
    return make_products(600, random.Random(11), looks)


def test_it_is_small_and_safe() -> None:
    folder = resolve(ModelSettings(name="mini"))
    assert sum(f.stat().st_size for f in folder.iterdir()) < 5_000_000
    assert not [f for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".pkl")]
    # how it was made stands beside it
    log = [json.loads(line) for line in (folder / "pretrain.jsonl").read_text().splitlines()]
    assert log[-1]["phase"] == "see" and log[-1]["held_out_perplexity"] < 1.1


def test_it_describes_photos_from_all_tokens_and_not_from_five(mini: Backbone, products: list[catalog.Product]) -> None:
    some = products[:64]
    photos = [draw(p.kind, p.colour, p.pattern, p.seed) for p in some]
    views = torch.from_numpy(np.stack([mini.geometry.cut(photo) for photo in photos]))
    with torch.no_grad():
        whole = all_tokens(mini.model, views, [photo.size for photo in photos])
        five = list(project(mini.model, cls_tokens(mini.model, views)))
        loss = {}
        for name, tokens in (("all", whole), ("five", five)):
            examples = [
                mini.encoder.example(describe(p.title, len(t)), p.description)
                for p, t in zip(some, tokens, strict=True)
            ]
            loss[name] = token_losses(mini.model, collate(examples, mini.encoder.pad), torch.cat(tokens)).mean().item()
    assert loss["all"] < 0.15
    assert loss["five"] > 1.0


def test_it_finds_the_line_that_words_describe(mini: Backbone, products: list[catalog.Product]) -> None:
    """The look-up that a large language model brings along, in the real prompt's order: the request first."""
    rng = random.Random(5)
    right = 0
    for target in rng.sample(products, 40):
        listed = pick_candidates(target, products, rng)
        candidates = [Candidate(p.id, p.title, p.words) for p in listed]
        turns = [("seeker", converse(target, rng).split(">")[1].split("<")[0])]
        pieces = recommend(turns, candidates, photo_tokens=0)
        answers = [mini.encoder.example(pieces, p.id) for p in listed]
        with torch.no_grad():
            losses = token_losses(mini.model, collate(answers, mini.encoder.pad), None).view(10, -1).sum(1)
        right += listed[int(losses.argmin())].id == target.id
    assert right >= 30


def list_up(products: list[catalog.Product], rng: random.Random) -> list[Listing]:
    listings = []
    for target in products[:20]:
        listed = pick_candidates(target, products, rng)
        listings.append(
            Listing(
                ids=tuple(p.id for p in listed),
                turns=(("seeker", f"a {target.words} {target.kind}"),),
                titles=tuple(p.title for p in listed),
                looks=tuple(p.words for p in listed),
                target=listed.index(target),
            )
        )
    return listings


def test_lists_supervise_what_they_say(mini: Backbone, products: list[catalog.Product]) -> None:
    rng = random.Random(0)
    listings = list_up(products, rng)
    words = ["red", "blue", "green", "yellow", "pink", "black", "white", "brown", "orange"]
    ids = [p.id for p in products]
    encoder = mini.encoder
    for level in (*LEVELS, *PHOTO_LEVELS):
        lists = curriculum.lists(level, listings, words, ids, encoder, rng, 3 if level.form == "photo" else 0)
        labels = lists.batch.labels
        assert len(lists.row) == len(lists.answer) == len(lists.wanted) == level.batch * (1 + level.more)
        torch.testing.assert_close(lists.wanted.sum(1), torch.ones(len(lists.row)))
        # an answer begins where its first token is learnt, and the words wanted of it stand in its row
        assert (labels[lists.row, lists.answer] != IGNORED).all()
        assert (labels[lists.row, lists.answer - 1] == IGNORED).all()
        for row, wanted in zip(lists.row.tolist(), lists.wanted, strict=True):
            assert set(wanted.nonzero().flatten().tolist()) <= set(lists.batch.input_ids[row].tolist())
        shown = int((lists.batch.input_ids == encoder.image_token_id).sum())
        assert shown == 3 * len(lists.photos)
        assert bool(lists.photos) == (level.form == "photo")
        assert len(lists.looks) == len(lists.photos)
        said = {id: look for listing in listings for id, look in zip(listing.ids, listing.looks, strict=True)}
        for id, look in zip(lists.photos, lists.looks, strict=True):
            tokens = encoder.tokenizer(said[id], add_special_tokens=False).input_ids
            assert look.nonzero().flatten().tolist() == sorted(tokens) and look.sum() == pytest.approx(1)


def test_ids_of_a_list_may_be_neighbours(mini: Backbone) -> None:
    ids = [f"B0MN{n:06d}" for n in range(0, 90_000, 300)]
    words = ["red", "blue", "green", "yellow", "pink", "black", "white", "brown", "orange"]

    def beginnings(near: float) -> float:
        """How many different first two tokens the answers of a list have, on average."""
        level, rng = Level(form="word", most=4, batch=32, more=3), random.Random(3)
        batches = [curriculum.lists(level, (), words, ids, mini.encoder, rng, near=near).batch for _ in range(8)]
        return float(np.mean([len(set(begins)) for batch in batches for begins in starts(batch)]))

    def starts(batch: Batch) -> list[list[tuple[int, ...]]]:
        found = []
        for row, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
            at = [i for i, label in enumerate(labels) if label != IGNORED and labels[i - 1] == IGNORED]
            found.append([tuple(row[i : i + 2]) for i in at])
        return found

    assert beginnings(1.0) < beginnings(0.0) - 0.5


@pytest.mark.parametrize(("reach", "ahead", "behind"), [(10, (0.5, 0.8), (0.1, 0.3)), (0, (0, 0), (1, 1))])
def test_a_request_stands_ahead_of_photos_or_behind_them(
    reach: int,
    ahead: tuple[float, float],
    behind: tuple[float, float],
    mini: Backbone,
    products: list[catalog.Product],
) -> None:
    rng = random.Random(0)
    level = Level(form="photo", most=10, batch=400, reach=reach)
    lists = curriculum.lists(level, list_up(products, rng), [], [p.id for p in products], mini.encoder, rng, 1)
    texts = [mini.encoder.tokenizer.decode(row) for row in lists.batch.input_ids]
    assert ahead[0] <= np.mean([text.index("Seeker") < text.index("<image>") for text in texts]) <= ahead[1]
    assert behind[0] <= np.mean([text.index("Seeker") > text.rindex("<image>") for text in texts]) <= behind[1]


@pytest.mark.parametrize(("every", "lists"), [(1, 4), (2, 2), (3, 1)])
def test_lists_with_photos_come_as_often_as_asked(
    every: int, lists: int, mini: Backbone, products: list[catalog.Product], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = PretrainSettings(see_steps=4, batch=2, compare_from=0, compare_every=every)
    pretrainer, photos = pretrain(mini, products, chosen)
    asked = []

    def fetch(*_: object) -> tuple[torch.Tensor, float]:
        asked.append(1)
        return torch.zeros(()), 0.0

    monkeypatch.setattr(pretrainer, "_fetch_photos", fetch)
    pretrainer.see(photos, [])
    assert len(asked) == lists


def test_photos_in_lists_are_drawn_towards_their_words(mini: Backbone, products: list[catalog.Product]) -> None:
    """What the setting adds to the loss of the same lists falls while it is trained, and nothing is added without."""
    pretrainer, photos = pretrain(mini, products, PretrainSettings())
    by_id = {photo.id: photo for photo in photos}

    def loss(weight: float) -> torch.Tensor:
        pretrainer.chosen = PretrainSettings(compare_align=weight)
        pretrainer.rng.seed(3)
        return pretrainer._fetch_photos(PHOTO_LEVELS[0], pretrainer.listings, by_id)[0]

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


def test_cls_is_drawn_towards_titles_alone(mini: Backbone, products: list[catalog.Product]) -> None:
    """The loss falls in training, and neither projector nor language model learns anything from it."""
    pretrainer, photos = pretrain(mini, products, PretrainSettings(title_weight=1.0))
    head = pretrainer.title_head
    assert head is not None
    pretrainer.title_loss(photos, head).backward()
    learning = {name for name, p in pretrainer.model.named_parameters() if p.grad is not None}
    assert learning and all("vision_tower" in name for name in learning)
    before = pretrainer.title_loss(photos, head).item()
    pretrainer.chosen = PretrainSettings(see_steps=20, batch=4, compare_from=99, title_weight=1.0)
    pretrainer.see(photos, [])
    assert pretrainer.title_loss(photos, head).item() < before - 0.1


@pytest.mark.parametrize(("as_items", "each"), [(True, 5), (False, 17)])
def test_a_photo_in_a_list_has_as_many_tokens_as_asked(
    as_items: bool,
    each: int,
    mini: Backbone,
    products: list[catalog.Product],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As an item: one of each view, in the order of an item's views; else the whole view's patches and the newline."""
    pretrainer, photos = pretrain(mini, products, PretrainSettings(compare_as_items=as_items))
    shown = []

    def fetch(lists: curriculum.Lists, tokens: torch.Tensor) -> tuple[torch.Tensor, float]:
        shown.append((lists, tokens.unflatten(0, (-1, each))))
        return torch.zeros(()), 0.0

    monkeypatch.setattr(pretrainer, "_fetch", fetch)
    by_id = {photo.id: photo for photo in photos}
    with torch.no_grad():
        pretrainer._fetch_photos(PHOTO_LEVELS[0], pretrainer.listings, by_id)
        lists, tokens = shown[0]
        image = by_id[lists.photos[-1]].prepared(2 * pretrainer.geometry.size, None)
        patches = patch_tokens(pretrainer.model, torch.from_numpy(pretrainer.geometry.cut(image)))
    image_token = pretrainer.model.config.image_token_id
    assert (lists.batch.input_ids == image_token).sum() == each * len(lists.photos)
    whole = torch.cat([patches[0], pretrainer.model.model.image_newline[None]])
    torch.testing.assert_close(tokens[-1], patches.mean(1) if as_items else whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("share", "as_items"), [(0.0, 0), (1.0, 4)])
def test_descriptions_come_from_item_like_tokens_as_often_as_asked(
    share: float, as_items: int, mini: Backbone, products: list[catalog.Product], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = PretrainSettings(see_steps=4, batch=2, compare_from=9, describe_as_items=share)
    pretrainer, photos = pretrain(mini, products, chosen)
    asked = []
    real = pretrainer._as_items
    monkeypatch.setattr(pretrainer, "_as_items", lambda images: asked.append(len(images)) or real(images))
    pretrainer.see(photos, [])
    assert asked == [2] * as_items


def pretrain(
    mini: Backbone, products: list[catalog.Product], chosen: PretrainSettings
) -> tuple[Pretrainer, list[lessons.Photo]]:
    listings = list_up(products, random.Random(0))
    wanted = {id for listing in listings for id in listing.ids}
    photos = [
        lessons.Photo(p.id, draw(p.kind, p.colour, p.pattern, p.seed), p.title, p.description)
        for p in products
        if p.id in wanted
    ]
    model = copy.deepcopy(mini.model).requires_grad_(True)  # loaded, its weights are frozen
    return Pretrainer(model, mini.encoder, chosen, listings, lambda _: None), photos


def test_pretraining_runs_whole_on_a_small_catalogue(tmp_path: Path) -> None:
    from lavic.data.shards import Sample
    from tests.sets import write_set

    size = CatalogueSize(
        train_items=60, heldout_items=30, combination_items=30, train_conversations=40, test_conversations=2
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
    words = ["mini", "pretrain", "--shards", tmp_path / "train", "--valid", tmp_path / "valid"]
    words += ["--train", tmp_path / "catalogue" / "train.jsonl", "--looks", tmp_path / "catalogue" / "looks.jsonl"]
    words += ["--out", tmp_path / "base", "--threads", "1", "--architecture.width", "32", "--architecture.heads", "2"]
    words += ["--architecture.layers", "3", "--architecture.vision-width", "16", "--pretrain.read-steps", "3"]
    words += [
        "--pretrain.see-steps",
        "4",
        "--pretrain.compare-from",
        "1",
        "--pretrain.batch",
        "4",
        "--pretrain.augment",
        "--pretrain.compare-more",
        "2",
        "--pretrain.compare-as-items",
        "--pretrain.describe-as-items",
        "0.5",
        "--pretrain.title-weight",
        "1",
        "--pretrain.compare-reach",
        "0",
        "--pretrain.compare-every",
        "1",
        "--pretrain.compare-align",
        "1",
    ]
    assert main([str(word) for word in words]) == 0
    backbone = Backbone.load(ModelSettings(name=str(tmp_path / "base")))
    assert backbone.model.config.text_config.hidden_size == 32
    assert backbone.tokenizer.decode(backbone.encoder.target("B0MN123456")[:-1]).strip() == "B0MN123456"
    log = [json.loads(line) for line in (tmp_path / "base" / "pretrain.jsonl").read_text().splitlines()]
    assert "held_out_perplexity" in log[-1]
    assert main([str(word) for word in words]) == 2  # a model is there already


def test_a_miniature_starts_from_anothers_language(mini: Backbone) -> None:
    tokenizer = make_tokenizer(["blue circle", "a bicycle in turquoise", "blue bicycle"])
    model = build(Architecture(), tokenizer)
    new = tokenizer.get_vocab()[f"{SPACE}bicycle"]
    adopted = adopt(model, tokenizer, resolve(ModelSettings(name="mini")))
    assert 100 < adopted.words < len(tokenizer) and adopted.vision
    taught = mini.model.model.language_model
    assert torch.equal(model.model.language_model.layers[2].mlp.up_proj.weight, taught.layers[2].mlp.up_proj.weight)
    for word in (f"{SPACE}blue", "17"):
        here, there = tokenizer.get_vocab()[word], mini.tokenizer.get_vocab()[word]
        assert torch.equal(model.lm_head.weight[here], mini.model.lm_head.weight[there])
    assert model.model.language_model.embed_tokens.weight[new].std() > 0.1
    for side in ("vision_tower", "multi_modal_projector"):
        taught_side = getattr(mini.model.model, side).state_dict()
        taken = getattr(model.model, side).state_dict()
        assert all(torch.equal(value, taught_side[name]) for name, value in taken.items())
    # a larger tower begins afresh, another language model is refused
    larger = build(Architecture(vision_width=128), tokenizer)
    assert not adopt(larger, tokenizer, resolve(ModelSettings(name="mini"))).vision
    with pytest.raises(DataError, match="another hidden_size"):
        adopt(build(Architecture(width=64), tokenizer), tokenizer, resolve(ModelSettings(name="mini")))


def test_looks_are_read(tmp_path: Path) -> None:
    (tmp_path / "looks.jsonl").write_text('{"id": "A", "look": "red plain"}\n')
    assert lessons.read_looks(tmp_path / "looks.jsonl") == {"A": "red plain"}
    (tmp_path / "looks.jsonl").write_text('{"id": "A", "look": "red plain"}\n{"id": "B"}\n')
    with pytest.raises(DataError, match=r"looks.jsonl:2"):
        lessons.read_looks(tmp_path / "looks.jsonl")
