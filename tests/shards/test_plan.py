"""Plans: what is planned, that it is the same every time, and that another one is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lavic.errors import ConfigError, DataError
from lavic.shards.plan import Plan, load_plan, make_plan, read_tasks
from lavic.shards.tasks import PlanSettings

SETTINGS = PlanSettings(
    set="cups",
    split="train",
    photos_per_shard=4,
    photos="first",
    image_size="hi_res",
    photo={"check": "decode"},
)


def write(path: Path, items: dict[str, int]) -> tuple[str, ...]:
    """A LaViC catalogue of items with so many photos each."""
    metas = {
        id: {
            "title": id,
            "categories": ["a", "b"],
            "images": [{"large": f"http://x/{id}/{n}.jpg"} for n in range(count)],
        }
        for id, count in items.items()
    }
    path.write_text(json.dumps(metas))
    return (str(path),)


def keys(plan: Plan) -> list[str]:
    return [task.key for number in range(len(plan.digests)) for task in read_tasks(plan.shard(number))]


def test_photos_are_dealt_into_shards_in_order(tmp_path: Path) -> None:
    items = write(tmp_path / "c.json", {f"B{n}": n % 3 for n in range(9)})
    plan = make_plan(items, tmp_path / "out", SETTINGS)
    assert (plan.counts.items, plan.counts.photos, plan.counts.without_photo, len(plan.digests)) == (9, 6, 3, 2)
    assert [task.key for number in range(2) for task in read_tasks(plan.shard(number))] == [
        f"B{n}_0" for n in (1, 2, 4, 5, 7, 8)
    ]
    task = read_tasks(plan.shard(1))[0]
    assert (task.url, task.categories) == ("http://x/B7/0.jpg", "a > b") and json.loads(task.details)["categories"] == [
        "a",
        "b",
    ]
    assert plan.shard(1).name == "cups-train-000001.tar"
    every = make_plan(items, tmp_path / "all", replace(SETTINGS, photos="all"))
    assert every.counts.photos == 9 and [task.key for task in read_tasks(every.shard(0))] == [
        "B1_0",
        "B2_0",
        "B2_1",
        "B4_0",
    ]


def test_limits_and_ids(tmp_path: Path) -> None:
    items = write(tmp_path / "c.json", {f"B{n}": 1 for n in range(9)})
    assert make_plan(items, tmp_path / "limit", replace(SETTINGS, limit=3)).counts.photos == 3
    (tmp_path / "ids").write_text("B7\nB2\n\nnone\n")
    plan = make_plan(items, tmp_path / "ids-out", replace(SETTINGS, ids=str(tmp_path / "ids")))
    assert [task.key for task in read_tasks(plan.shard(0))] == ["B2_0", "B7_0"] and plan.counts.ids_missing == 1
    (tmp_path / "ids").write_text("none\n")
    with pytest.raises(DataError, match="none of the ids"):
        make_plan(items, tmp_path / "no-out", replace(SETTINGS, ids=str(tmp_path / "ids")))


def test_repeated_photos_are_planned_once(tmp_path: Path) -> None:
    items = write(tmp_path / "a.json", {"B1": 1, "B2": 1}) + write(tmp_path / "b.json", {"B2": 2, "B3": 1})
    plan = make_plan(items, tmp_path / "out", replace(SETTINGS, photos="all"))
    assert [task.key for task in read_tasks(plan.shard(0))] == [
        "B1_0",
        "B2_0",
        "B2_1",
        "B3_0",
    ] and plan.counts.repeated == 1


def test_the_same_input_gives_the_same_plan_and_is_taken_up_again(tmp_path: Path) -> None:
    items = write(tmp_path / "c.json", {f"B{n}": 1 for n in range(9)})
    plan = make_plan(items, tmp_path / "out", SETTINGS)
    assert make_plan(items, tmp_path / "out", SETTINGS) == plan
    assert make_plan(items, tmp_path / "other", SETTINGS).digest == plan.digest
    assert make_plan(items, tmp_path / "third", replace(SETTINGS, photo={"check": "header"})).digest != plan.digest


def test_another_input_is_refused_by_name(tmp_path: Path) -> None:
    items = write(tmp_path / "c.json", {f"B{n}": 1 for n in range(9)})
    make_plan(items, tmp_path / "out", SETTINGS)
    with pytest.raises(ConfigError, match="--photos-per-shard was 4 and is 5"):
        make_plan(items, tmp_path / "out", replace(SETTINGS, photos_per_shard=5))
    with pytest.raises(ConfigError, match=r"--photo\.check was decode and is header"):
        make_plan(items, tmp_path / "out", replace(SETTINGS, photo={"check": "header"}))
    with pytest.raises(ConfigError, match=r"the catalogue was .*c\.json and is .*c\.json, .*d\.json"):
        make_plan(items + write(tmp_path / "d.json", {"B1": 1}), tmp_path / "out", SETTINGS)
    write(tmp_path / "c.json", {"B1": 1})
    with pytest.raises(ConfigError, match=r"the content of .*c\.json has changed"):
        make_plan(items, tmp_path / "out", SETTINGS)


def test_a_plan_that_was_cut_short_is_made_again(tmp_path: Path) -> None:
    items = write(tmp_path / "c.json", {f"B{n}": 1 for n in range(9)})
    plan = make_plan(items, tmp_path / "out", SETTINGS)
    (tmp_path / "out/plan/plan.json").unlink()
    (tmp_path / "out/plan/cups-train-000001.jsonl").write_text("half a li")
    assert load_plan(tmp_path / "out") is None
    assert make_plan(items, tmp_path / "out", SETTINGS) == plan and len(read_tasks(plan.shard(1))) == 4


def test_nothing_to_fetch(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no photo to fetch: 2 items, 2 of them without"):
        make_plan(write(tmp_path / "c.json", {"B1": 0, "B2": 0}), tmp_path / "out", SETTINGS)
