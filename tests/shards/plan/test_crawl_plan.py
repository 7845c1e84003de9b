"""Crawl plans: what is planned, that a repeated plan is identical, and which changes are refused."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lavic.errors import ConfigError, DataError
from lavic.shards.image.normalize import PhotoSettings
from lavic.shards.plan.crawl_plan import load_plan, make_plan, read_tasks, tasks_path
from tests.shards.plan.plan_files import (
    SETTINGS,
    planned_keys,
    write_items,
    write_links,
)


def test_photos_are_split_into_shards_in_order(tmp_path: Path) -> None:
    items = write_items(tmp_path / "c.json", {f"B{n}": n % 3 for n in range(9)})
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
    all_photos = make_plan(items, tmp_path / "all", replace(SETTINGS, photos="all"))
    assert all_photos.counts.photos == 9 and [task.key for task in read_tasks(all_photos.shard(0))] == [
        "B1_0",
        "B2_0",
        "B2_1",
        "B4_0",
    ]


def test_repeated_photos_are_planned_once(tmp_path: Path) -> None:
    items = write_items(tmp_path / "a.json", {"B1": 1, "B2": 1}) + write_items(tmp_path / "b.json", {"B2": 2, "B3": 1})
    plan = make_plan(items, tmp_path / "out", replace(SETTINGS, photos="all"))
    assert [task.key for task in read_tasks(plan.shard(0))] == [
        "B1_0",
        "B2_0",
        "B2_1",
        "B3_0",
    ] and plan.counts.repeated == 1


def test_the_same_input_gives_the_same_plan(tmp_path: Path) -> None:
    items = write_items(tmp_path / "c.json", {f"B{n}": 1 for n in range(9)})
    plan = make_plan(items, tmp_path / "out", SETTINGS)
    assert make_plan(items, tmp_path / "out", SETTINGS) == plan
    assert make_plan(items, tmp_path / "other", SETTINGS).digest == plan.digest
    assert make_plan(items, tmp_path / "third", replace(SETTINGS, photo={"check": "header"})).digest != plan.digest


def test_changed_input_is_refused_and_named(tmp_path: Path) -> None:
    items = write_items(tmp_path / "c.json", {f"B{n}": 1 for n in range(9)})
    make_plan(items, tmp_path / "out", SETTINGS)
    with pytest.raises(ConfigError, match="--photos-per-shard was 4 and is 5"):
        make_plan(items, tmp_path / "out", replace(SETTINGS, photos_per_shard=5))
    with pytest.raises(ConfigError, match=r"--photo\.check was decode and is header"):
        make_plan(items, tmp_path / "out", replace(SETTINGS, photo={"check": "header"}))
    with pytest.raises(ConfigError, match=r"the catalogue was .*c\.json and is .*c\.json, .*d\.json"):
        make_plan(items + write_items(tmp_path / "d.json", {"B1": 1}), tmp_path / "out", SETTINGS)
    write_items(tmp_path / "c.json", {"B1": 1})
    with pytest.raises(ConfigError, match=r"the content of .*c\.json has changed"):
        make_plan(items, tmp_path / "out", SETTINGS)


def test_a_new_settings_default_does_not_change_an_old_plan(tmp_path: Path) -> None:
    """A plan of an older version lacks settings that this version has: their defaults apply."""
    items, photo = write_items(tmp_path / "c.json", {"B1": 3, "B2": 2}), asdict(PhotoSettings())
    current = replace(SETTINGS, photo=photo)
    plan = make_plan(items, tmp_path / "out", current)
    path = tmp_path / "out/plan/plan.json"
    body = json.loads(path.read_text())
    for name in ("duplicates", "splits", "text", "photo.max_pixels"):
        del body["settings"][name]
    digested = json.dumps(body["settings"], sort_keys=True).encode() + tasks_path(plan.shard(0)).read_bytes()
    body["generations"][0]["shards"] = [hashlib.sha256(digested).hexdigest()]
    path.write_text(json.dumps(body))
    old = make_plan(items, tmp_path / "out", current)
    assert old.digests == body["generations"][0]["shards"] and len(old.tasks(0)) == 2
    extended = make_plan(write_items(tmp_path / "c.json", {"B9": 1}), tmp_path / "out", current, extend=True)
    assert len(extended.digests) == 2 and [len(extended.tasks(n)) for n in range(2)] == [2, 1]
    path.write_text(json.dumps(body))
    for other in (replace(current, duplicates="referenced"), replace(current, photo={**photo, "max_pixels": 7})):
        with pytest.raises(ConfigError, match=r"--(duplicates was stored|photo.max-pixels was \d+) and is"):
            make_plan(items, tmp_path / "out", other)


def test_an_incomplete_plan_is_made_again(tmp_path: Path) -> None:
    items = write_items(tmp_path / "c.json", {f"B{n}": 1 for n in range(9)})
    plan = make_plan(items, tmp_path / "out", SETTINGS)
    (tmp_path / "out/plan/plan.json").unlink()
    (tmp_path / "out/plan/cups-train-000001.jsonl").write_text("half a li")
    assert load_plan(tmp_path / "out") is None
    assert make_plan(items, tmp_path / "out", SETTINGS) == plan and len(read_tasks(plan.shard(1))) == 4


@pytest.mark.parametrize("damage", ["cut at a line", "cut within a line", "edited", "missing"])
def test_a_changed_file_of_tasks_is_refused(tmp_path: Path, damage: str) -> None:
    items = write_items(tmp_path / "c.json", {f"B{n}": 1 for n in range(9)})
    make_plan(items, tmp_path / "out", SETTINGS)
    path = tmp_path / "out/plan/cups-train-000001.jsonl"
    data = path.read_bytes()
    changed = {
        "cut at a line": data[: data.index(b"\n") + 1],
        "cut within a line": data[:-9],
        "edited": data.replace(b"http://x/B5", b"http://x/B6"),
    }
    path.unlink()
    if damage in changed:
        path.write_bytes(changed[damage])
    plan = load_plan(tmp_path / "out")
    assert plan and len(plan.tasks(0)) == 4
    with pytest.raises(DataError, match=r"plan/cups-train-000001\.jsonl (is missing|is not the file that was planned)"):
        plan.tasks(1)
    # An extension would plan the photos that the file lacks again.
    write_items(tmp_path / "c.json", {f"B{n}": 1 for n in range(12)})
    with pytest.raises(DataError, match="cups-train-000001"):
        make_plan(items, tmp_path / "out", SETTINGS, extend=True)


def test_an_extended_set_counts_every_item_and_record_once(tmp_path: Path) -> None:
    def catalogue(*items: tuple[str, list[str]]) -> tuple[str, ...]:
        (path,) = write_links(tmp_path / "c.jsonl", *items)
        Path(path).write_text(Path(path).read_text() + "{\n")
        return (path,)

    first = [("B0", ["http://x/0"]), ("B1", []), ("B2", ["None"])]
    (tmp_path / "ids").write_text("\n".join([f"B{n}" for n in range(6)]))
    settings = replace(SETTINGS, ids=str(tmp_path / "ids"))
    make_plan(catalogue(*first), tmp_path / "out", settings)
    items = catalogue(*first, ("B3", ["http://x/3"]), ("B4", []))
    counts = make_plan(items, tmp_path / "out", settings, extend=True).counts
    assert (counts.items, counts.without_photo, counts.photos, counts.unlinked) == (5, 3, 2, 1)
    assert (counts.rejected, counts.ids_missing) == (1, 1)
    # B1 has a photo now.
    items = catalogue(first[0], ("B1", ["http://x/1"]), first[2], ("B3", ["http://x/3"]), ("B4", []))
    plan = make_plan(items, tmp_path / "out", settings, extend=True)
    assert (plan.counts.items, plan.counts.without_photo, plan.counts.photos) == (5, 2, 3)
    assert planned_keys(plan) == ["B0_0", "B3_0", "B1_0"] and make_plan(items, tmp_path / "out", settings) == plan


AMAZON = "https://m.media-amazon.com/images/I/"


def test_photos_with_one_url_are_in_one_shard(tmp_path: Path) -> None:
    items = write_links(
        tmp_path / "c.jsonl",
        ("B0", [AMAZON + "71a._SX1500_.jpg", "http://x/0.jpg"]),
        ("B1", ["http://x/1.jpg", "http://x/2.jpg"]),
        ("B2", ["http://x/3.jpg", AMAZON + "71a.jpg", "http://x/0.jpg"]),
        ("B3", ["http://x/4.jpg"]),
    )
    plan = make_plan(items, tmp_path / "out", replace(SETTINGS, photos="all", photos_per_shard=3))
    shards = [[task.key for task in read_tasks(plan.shard(n))] for n in range(len(plan.digests))]
    assert shards == [["B0_0", "B2_1"], ["B0_1", "B2_2", "B1_0"], ["B1_1", "B2_0", "B3_0"]]
    assert (plan.counts.photos, plan.counts.shared, plan.counts.repeated) == (8, 2, 0)


def test_a_url_of_many_items_does_not_overfill_a_shard(tmp_path: Path) -> None:
    items = write_links(tmp_path / "c.jsonl", *((f"B{n:02d}", ["http://x/no-image.jpg"]) for n in range(10)))
    plan = make_plan(items, tmp_path / "out", SETTINGS)
    assert [len(read_tasks(plan.shard(n))) for n in range(len(plan.digests))] == [4, 4, 2]
    assert planned_keys(plan) == [f"B{n:02d}_0" for n in range(10)]


def test_photos_per_item_are_limited(tmp_path: Path) -> None:
    items = write_items(tmp_path / "c.json", {"B1": 5, "B2": 1})
    two = make_plan(items, tmp_path / "two", replace(SETTINGS, photos="2"))
    assert planned_keys(two) == ["B1_0", "B1_1", "B2_0"]


def test_every_item_is_in_one_split(tmp_path: Path) -> None:
    all_items = {f"B{n}": 2 for n in range(400)}
    items = write_items(tmp_path / "c.json", all_items)
    splits = {"train": 0.8, "valid": 0.1, "test": 0.1}
    parts = {}
    for split in splits:
        settings = replace(SETTINGS, photos="all", split=split, splits=splits)
        parts[split] = {key.partition("_")[0] for key in planned_keys(make_plan(items, tmp_path / split, settings))}
    assert sum(map(len, parts.values())) == 400 and set.union(*parts.values()) == set(all_items)
    assert 280 < len(parts["train"]) < 360 and len(parts["valid"]) > 15 and len(parts["test"]) > 15
    # A smaller catalogue leaves each item in its split.
    fewer = write_items(tmp_path / "d.json", dict.fromkeys(list(all_items)[::-3], 1))
    subset = make_plan(fewer, tmp_path / "again", replace(SETTINGS, split="valid", splits=splits))
    assert {key.partition("_")[0] for key in planned_keys(subset)} <= parts["valid"]


def test_new_items_become_new_shards(tmp_path: Path) -> None:
    items = write_items(tmp_path / "c.json", {f"B{n}": 1 for n in range(6)})
    old = make_plan(items, tmp_path / "out", SETTINGS)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out/plan").glob("*.jsonl")}
    write_items(tmp_path / "c.json", {f"B{n}": 2 for n in range(-3, 9)})
    with pytest.raises(ConfigError, match=r"the content of .*c\.json has changed.*--extend"):
        make_plan(items, tmp_path / "out", SETTINGS)
    plan = make_plan(items, tmp_path / "out", SETTINGS, extend=True)
    assert plan.digests[:2] == old.digests and len(plan.digests) == 4 and plan.digest != old.digest
    assert planned_keys(plan)[6:] == [f"B{n}_0" for n in (-3, -2, -1, 6, 7, 8)]
    assert (plan.counts.photos, plan.counts.items, plan.counts.known) == (12, 12, 6)
    assert {name: (tmp_path / "out/plan" / name).read_bytes() for name in before} == before
    # A repeated run, with or without --extend, adds nothing.
    for extend in (False, True):
        assert make_plan(items, tmp_path / "out", SETTINGS, extend=extend) == plan
    wider = make_plan(items, tmp_path / "out", replace(SETTINGS, limit=2), extend=True)
    assert wider.digests == plan.digests
    with pytest.raises(ConfigError, match="--limit was 2 and is not given"):
        make_plan(items, tmp_path / "out", SETTINGS)
    with pytest.raises(ConfigError, match=r"--photos was first and is all; use another --out, or the same input$"):
        make_plan(items, tmp_path / "out", replace(SETTINGS, photos="all"), extend=True)


def test_an_edit_of_equal_size_is_noticed_but_not_a_new_mtime(tmp_path: Path) -> None:
    items = write_items(tmp_path / "c.json", {"B1": 1})
    plan = make_plan(items, tmp_path / "out", SETTINGS)
    os.utime(items[0], (1, 1))
    assert make_plan(items, tmp_path / "out", SETTINGS) == plan
    write_items(tmp_path / "c.json", {"B2": 1})
    with pytest.raises(ConfigError, match="has changed"):
        make_plan(items, tmp_path / "out", SETTINGS)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.sampled_from("abcdefgh"), st.lists(st.sampled_from("uvwxyz"), max_size=4)), max_size=12),
    st.integers(1, 6),
)
def test_every_photo_of_any_catalogue_is_planned_once(
    tmp_path: Path, items_urls: list[tuple[str, list[str]]], photos_per_shard: int
) -> None:
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    items = write_links(folder / "c.jsonl", *((id, [f"http://x/{url}" for url in urls]) for id, urls in items_urls))
    expected: dict[str, str] = {}
    for id, urls in items_urls:
        for n, url in enumerate(urls):
            expected.setdefault(f"{id}_{n}", url)
    if not expected:
        with pytest.raises(DataError):
            make_plan(items, folder / "out", replace(SETTINGS, photos="all", photos_per_shard=photos_per_shard))
        return
    plan = make_plan(items, folder / "out", replace(SETTINGS, photos="all", photos_per_shard=photos_per_shard))
    shards = [read_tasks(plan.shard(n)) for n in range(len(plan.digests))]
    assert sorted(planned_keys(plan)) == sorted(expected)
    assert all(1 <= len(shard) <= photos_per_shard for shard in shards)
    for url in set(expected.values()):
        shard_numbers = [n for n, shard in enumerate(shards) for task in shard if task.url == f"http://x/{url}"]
        # In one shard, or in as few as they fit into.
        assert len(set(shard_numbers)) == -(-len(shard_numbers) // photos_per_shard)
