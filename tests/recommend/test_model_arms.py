"""The arms beside the tuned model: what each is shown, all image tokens in groups, and several orders of a list."""

from __future__ import annotations

import io
import json
import math
import random
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from lavic.data.shard_dataset import ShardDataset
from lavic.data.tar_shards import Sample
from lavic.distributed.context import DistributedContext
from lavic.errors import ConfigError, DataError
from lavic.evaluation.model_arms.arms import Arm
from lavic.evaluation.model_arms.control_tokens import BlankTokens, NoiseTokens
from lavic.evaluation.model_arms.list_orders import average, order_bias, reordered
from lavic.evaluation.model_arms.model_rankings import rank_test_sets
from lavic.evaluation.model_arms.photo_tokens import GroupSize, PhotoTokens
from lavic.evaluation.test_set import TestSet
from lavic.launch import evaluate
from lavic.model import prompts
from lavic.model.bundle import Bundle
from lavic.model.item_store import ItemStore
from lavic.recommend.ranking.ranked_list import RankedList
from lavic.recommend.ranking.ranker import Ranker
from lavic.recommend.ranking.request import Request
from tests.crawled_sets import write_set

from .conftest import KEY, Assets

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shards(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A photo with a description for every item of the store."""
    folder, rng, samples = tmp_path_factory.mktemp("photos") / "set", random.Random(7), []
    for number, item in enumerate(ItemStore.open(assets.store).ids):
        size = (60 + 7 * (number % 5), 60)
        photo = Image.frombytes("RGB", size, rng.randbytes(3 * size[0] * size[1])).resize((90, 80))
        data = io.BytesIO()
        photo.save(data, "JPEG", quality=90)
        samples.append(
            Sample.of(
                item_id=item, n=0, jpg=data.getvalue(), title="Acme mug", width=90, height=80, text=f"dotted {number}"
            )
        )
    write_set(folder, samples)
    return folder


@pytest.fixture(scope="module")
def test_set(assets: Assets) -> TestSet:
    return TestSet.read("test", assets.test, candidates=KEY, stores=[ItemStore.open(assets.store)], limit=6)


def photo_of(shards: Path):
    data = ShardDataset(shards)
    return lambda item: data[data.index.find_stored(f"{item}_0")].jpg


def test_blank_tokens_are_the_mean_and_noise_has_mean_and_deviation(assets: Assets) -> None:
    store = ItemStore.open(assets.store)
    items = list(store.ids)
    tokens = store.lookup(items).float()
    blank = BlankTokens(nn.Linear(1, 1), store, None, items)
    rows = blank.raw(items[:3]).unflatten(0, (3, -1))
    assert torch.allclose(rows[0], tokens.mean(0), atol=1e-5)
    assert torch.equal(rows[0], rows[1])
    assert torch.allclose(blank.deviation, tokens.std(0, unbiased=False), atol=1e-4)
    noise = NoiseTokens(nn.Linear(1, 1), store, 2, items, seed=1)
    rows = noise.raw(items).unflatten(0, (len(items), 2))
    assert torch.allclose(rows.mean((0, 1)), tokens[:, :2].mean((0, 1)), atol=0.5)
    assert rows.std() == pytest.approx(tokens.std().item(), rel=0.05)
    assert not torch.equal(rows[0], rows[1])
    noise_of_subset = NoiseTokens(nn.Linear(1, 1), store, 2, items[:30], seed=1)
    drawn = (noise_of_subset.raw(items[:1]) - noise_of_subset.mean[:2]) / noise_of_subset.deviation[:2]
    assert torch.allclose(drawn, (rows[0] - noise.mean[:2]) / noise.deviation[:2], atol=1e-4)
    other = NoiseTokens(nn.Linear(1, 1), store, 2, items, seed=2)
    assert not torch.equal(other.raw(items[:1]), rows[0])


def test_photo_token_scores_equal_the_hugging_face_forward_pass(
    assets: Assets, shards: Path, test_set: TestSet
) -> None:
    """Against Hugging Face's forward pass of the base model from pixels, without adapters."""
    bundle = Bundle.load(assets.bundle, vision=True, language=False, adapted=False)
    store, photo = ItemStore.open(assets.store), photo_of(shards)
    ranker = Ranker(bundle, store, tokens=PhotoTokens(bundle.backbone, photo), max_length=1024)
    conversation, listed = test_set.conversations[0], test_set.lists[0][:3]
    (ranking,) = ranker.rank([Request(conversation=conversation, candidates=listed)])

    encoder, geometry = bundle.backbone.encoder, bundle.backbone.geometry
    photos = [Image.open(io.BytesIO(photo(item))) for item in listed]
    counts = [PhotoTokens(bundle.backbone, photo).count(item) for item in listed]
    assert min(counts) > 50
    pieces = prompts.recommend(
        [(turn.role, turn.text) for turn in conversation.turns],
        [prompts.Candidate(item, store.title(item)) for item in listed],
        photo_tokens=counts,
        style=encoder.style,
        chat=encoder.chat,
    )
    prompt = encoder.prompt(pieces)
    pixels = torch.stack([torch.from_numpy(geometry.cut(image)) for image in photos])
    sizes = torch.tensor([[image.height, image.width] for image in photos])
    for item, logprob in zip(ranking.ids, ranking.logprobs, strict=True):
        target = encoder.target(item)
        with torch.no_grad():
            logits = bundle.backbone.model(
                input_ids=torch.tensor([[*prompt, *target]]), pixel_values=pixels, image_sizes=sizes
            ).logits[0]
        scores = logits[len(prompt) - 1 : -1].log_softmax(-1)
        expected = sum(scores[position, token].item() for position, token in enumerate(target))
        assert logprob == pytest.approx(expected, abs=1e-3)


def test_group_size_fits_the_context(assets: Assets) -> None:
    bundle = Bundle.load(assets.bundle, language=False, adapted=False)
    size = GroupSize.of(bundle, None)
    assert (size.context, size.text, size.photo) == (1024, 512, 16 + 8 * 9)
    assert size.size == (1024 - 512) // 88
    assert GroupSize.of(bundle, 700).size == 2
    assert GroupSize.of(bundle, 10**6).context == 1024
    with pytest.raises(ConfigError, match="raise --photo-context"):
        GroupSize.of(bundle, 600)


def rank_first_candidate_highest(listed: tuple[str, ...]) -> RankedList:
    """A model that always answers with the first candidate."""
    probabilities = [0.5, *[0.5 / (len(listed) - 1)] * (len(listed) - 1)]
    return RankedList(
        ids=listed, probabilities=tuple(probabilities), logprobs=tuple(math.log(p) - 3 for p in probabilities)
    )


def test_order_bias_detects_a_position_biased_model(test_set: TestSet) -> None:
    orders = [[reordered(test_set, row, number, 0) for row in range(len(test_set))] for number in range(4)]
    assert orders[0] == list(test_set.lists)
    assert all(sorted(a) == sorted(b) for lists in orders for a, b in zip(lists, test_set.lists, strict=True))
    assert len({tuple(lists) for lists in orders}) == 4

    biased = [[rank_first_candidate_highest(listed) for listed in lists] for lists in orders]
    bias = order_bias(test_set, biased, 0)
    assert bias["orders"] == 4 and bias["position_lists"] == 3 * len(test_set)
    assert bias["positions"] == [1.0] + [0.0] * 9 and bias["uniform"] == 0.1
    assert bias["same_first"] < 1
    assert bias["spread"] == max(bias["hit_rate"]) - min(bias["hit_rate"])

    fair = [[rank_first_candidate_highest(tuple(sorted(listed))) for listed in lists] for lists in orders]
    bias = order_bias(test_set, fair, 0)
    assert (bias["spread"], bias["deviation"], bias["same_first"]) == (0, 0, 1)
    assert max(bias["positions"]) < 0.5


def test_average_over_orders_averages_probabilities() -> None:
    first = RankedList(ids=("a", "b"), probabilities=(0.9, 0.1), logprobs=(-1.0, -3.0), none=0.2)
    second = RankedList(ids=("b", "a"), probabilities=(0.6, 0.4), logprobs=(-2.0, -2.5), none=0.4)
    averaged = average([first, second])
    assert averaged.ids == ("a", "b")
    assert averaged.probabilities == pytest.approx((0.65, 0.35))
    assert averaged.scores == averaged.probabilities
    assert averaged.none == pytest.approx(0.3)
    assert average([first]) is first


@pytest.fixture(scope="module")
def evaluated(assets: Assets, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation of all arms that need a model, in two orders."""
    out = tmp_path_factory.mktemp("evaluated")
    argv = ["--bundle", assets.bundle, "--store", assets.store, "--shards", shards, "--test", assets.test]
    argv += ["--out", out, "--limit", 6, "--draws", 50, "--orders", 2, "--compare", f"text_only={assets.titles_only}"]
    arms = ["lavic", "shuffled", "blank", "noise", "words", "before_tuning", "base_titles", "words_before_tuning"]
    assert evaluate.main([*map(str, argv), "--arms", *arms, "base_photos", "random"]) == 0
    return out


def scores_of(folder: Path) -> dict[str, list[dict[str, float]]]:
    rows: dict[str, list[dict[str, float]]] = {}
    for line in (folder / "predictions.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows.setdefault(row["arm"], []).append(dict(zip(row["ranking"], row["probabilities"], strict=True)))
    return rows


def test_every_arm_gives_different_scores(evaluated: Path) -> None:
    scores = scores_of(evaluated)
    assert len(scores) == 10
    rows = list(scores.values())
    assert all(a != b for n, a in enumerate(rows) for b in rows[:n])
    assert all(len(row) == 10 and math.isclose(sum(row.values()), 1, abs_tol=1e-6) for arm in rows for row in arm)


def test_results_hold_order_bias_and_groups(evaluated: Path) -> None:
    results = json.loads((evaluated / "results.json").read_text())
    order = results["sets"]["test"]["order"]
    assert set(order) == set(scores_of(evaluated))
    assert order["lavic"]["orders"] == 2
    assert order["lavic"]["hit_rate"][0] == pytest.approx(results["hit_rate"]["lavic"]["value"])
    groups = results["groups"]["base_photos"]
    assert (groups["size"], groups["context"], groups["photo"]) == (5, 1024, 88)
    assert "assigned round-robin to groups" in groups["rule"]


def test_the_words_arm_uses_descriptions_of_the_shards(
    assets: Assets, shards: Path, tmp_path: Path, evaluated: Path
) -> None:
    data = ShardDataset(shards)
    looks = [{"id": data[row].item_id, "look": data[row].text} for row in range(len(data))]
    (tmp_path / "looks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in looks))
    argv = ["--bundle", assets.bundle, "--store", assets.store, "--test", assets.test, "--out", tmp_path / "out"]
    argv += ["--limit", 6, "--draws", 50, "--words", tmp_path / "looks.jsonl", "--arms", "words"]
    assert evaluate.main([*map(str, argv)]) == 0
    for a, b in zip(scores_of(tmp_path / "out")["words"], scores_of(evaluated)["words"], strict=True):
        assert a == pytest.approx(b, abs=1e-5)


def test_averaged_orders_are_ranked(assets: Assets, test_set: TestSet) -> None:
    arm = Arm(name="lavic", bundle=assets.bundle, store=ItemStore.open(assets.store))
    ranked = rank_test_sets([arm], [test_set], DistributedContext(), orders=3, averaged=True)
    lists = ranked.orders["test"]["lavic"]
    for row, ranking in enumerate(ranked.rankings["test"]["lavic"]):
        assert ranking is not None
        mean = {
            item: sum(dict(zip(r[row].ids, r[row].probabilities, strict=True))[item] for r in lists) / 3
            for item in ranking.ids
        }
        assert dict(zip(ranking.ids, ranking.probabilities, strict=True)) == pytest.approx(mean)
        assert list(ranking.probabilities) == sorted(ranking.probabilities, reverse=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--average-orders",), "--average-orders needs --orders N"),
        (("--average-orders", "--orders", "3", "--decode", "generate"), "--average-orders needs --decode likelihood"),
        (("--arms", "base_photos"), "--arms base_photos needs --shards"),
        (("--arms", "words"), "--arms words needs --words FILE, or --shards"),
    ],
)
def test_incompatible_options_are_refused(
    assets: Assets, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    argv = ["--bundle", assets.bundle, "--store", assets.store, "--test", assets.test, "--out", tmp_path]
    with pytest.raises(ConfigError, match=message):
        evaluate.main([*map(str, argv), *options])


def test_a_candidate_without_a_photo_is_named(assets: Assets, shards: Path, tmp_path: Path) -> None:
    data = ShardDataset(shards)
    absent = assets.conversations[1].candidates[KEY][4]
    write_set(tmp_path / "fewer", [data[row] for row in range(len(data)) if data[row].item_id != absent])
    argv = ["--bundle", assets.bundle, "--store", assets.store, "--test", assets.test, "--out", tmp_path / "out"]
    with pytest.raises(DataError, match=f"no photo of the candidate {absent} is in --shards"):
        evaluate.main([*map(str, argv), "--shards", str(tmp_path / "fewer"), "--arms", "base_photos"])
