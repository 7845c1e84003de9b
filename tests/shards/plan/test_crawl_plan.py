"""Plans: what is planned, that it is the same every time, and that another one is refused."""

from __future__ import annotations

import gzip
import json
import os
import re
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lavic.errors import ConfigError, DataError
from lavic.shards.crawl_settings import CrawlSettings
from lavic.shards.image.normalize import PhotoSettings
from lavic.shards.plan import external_dedup
from lavic.shards.plan.crawl_plan import Plan, load_plan, make_plan, read_tasks
from lavic.shards.plan.external_dedup import ExternalDedup, hash64
from lavic.shards.plan.photo_tasks import PlanSettings

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


def test_a_setting_that_is_new_since_changes_nothing_by_its_default(tmp_path: Path) -> None:
    """A plan of an older version lacks settings that this one has: it stands for their defaults."""
    items, photo = write(tmp_path / "c.json", {"B1": 3, "B2": 2}), asdict(PhotoSettings())
    chosen = replace(SETTINGS, photo=photo)
    plan = make_plan(items, tmp_path / "out", chosen)
    path = tmp_path / "out/plan/plan.json"
    body = json.loads(path.read_text())
    for name in ("duplicates", "splits", "text", "photo.max_pixels"):
        del body["settings"][name]
    path.write_text(json.dumps(body))
    assert make_plan(items, tmp_path / "out", chosen).digest == plan.digest
    assert len(make_plan(write(tmp_path / "c.json", {"B9": 1}), tmp_path / "out", chosen, extend=True).digests) == 2
    path.write_text(json.dumps(body))
    for other in (replace(chosen, duplicates="referenced"), replace(chosen, photo={**photo, "max_pixels": 7})):
        with pytest.raises(ConfigError, match=r"--(duplicates was stored|photo.max-pixels was \d+) and is"):
            make_plan(items, tmp_path / "out", other)


def test_a_plan_that_was_cut_short_is_made_again(tmp_path: Path) -> None:
    items = write(tmp_path / "c.json", {f"B{n}": 1 for n in range(9)})
    plan = make_plan(items, tmp_path / "out", SETTINGS)
    (tmp_path / "out/plan/plan.json").unlink()
    (tmp_path / "out/plan/cups-train-000001.jsonl").write_text("half a li")
    assert load_plan(tmp_path / "out") is None
    assert make_plan(items, tmp_path / "out", SETTINGS) == plan and len(read_tasks(plan.shard(1))) == 4


def test_nothing_to_fetch(tmp_path: Path) -> None:
    items = write(tmp_path / "c.json", {"B1": 0, "B2": 0})
    with pytest.raises(DataError, match=r"no photo to fetch: 2 items, 2 of them without a photo URL$"):
        make_plan(items, tmp_path / "out", SETTINGS)
    (path,) = rows(tmp_path / "d.jsonl", ("B1", ["None", " "]), ("B2", []))
    Path(path).write_text(Path(path).read_text() + "{\n")
    (tmp_path / "ids").write_text("B1\nB3\nB4\n")
    with pytest.raises(DataError) as caught:
        make_plan((path,), tmp_path / "out", replace(SETTINGS, ids=str(tmp_path / "ids")))
    assert str(caught.value) == (
        f"{path}: no photo to fetch: 1 items, 1 of them without a photo URL, 2 entries of their lists of images "
        f"without a link, 2 ids of {tmp_path}/ids are not in the catalogue, 1 records cannot be read, see "
        f"{tmp_path}/out/rejected.jsonl"
    )
    assert len((tmp_path / "out/rejected.jsonl").read_text().splitlines()) == 1
    with pytest.raises(DataError, match="no item of the catalogue falls into the split cups-only"):
        parts = {"train": 1 - 1e-9, "cups-only": 1e-9}
        make_plan(items, tmp_path / "out", replace(SETTINGS, splits=parts, split="cups-only"))


def test_ids_saved_by_other_programs(tmp_path: Path) -> None:
    items = write(tmp_path / "c.json", {f"B{n}": 1 for n in range(9)})
    digests = set()
    for data in (b"B7\nB2\n", b"\xef\xbb\xbfB7\r\nB2\r\n\r\n", "B7\r\nB2".encode("utf-16"), gzip.compress(b"B7\nB2")):
        (tmp_path / "ids").write_bytes(data)
        plan = make_plan(items, tmp_path / "out", replace(SETTINGS, ids=str(tmp_path / "ids")))
        assert keys(plan) == ["B2_0", "B7_0"] and plan.counts.ids_missing == 0
        digests.add(plan.generations[0].ids)
    assert len(digests) == 1
    (tmp_path / "ids").write_bytes(b"B7\ncaf\xe9\n")
    with pytest.raises(DataError, match=r"--ids .*ids:2: not UTF-8 .byte 0xe9"):
        make_plan(items, tmp_path / "out", replace(SETTINGS, ids=str(tmp_path / "ids")))


def described(path: Path, texts: dict[str, str]) -> tuple[str, ...]:
    """A catalogue of items with one photo each, and its description where there is one."""
    metas = {
        id: {
            "title": f"Title {id}",
            "images": [{"large": f"http://x/{id}.jpg"}],
            "image_descriptions_llava_cleaned": {f"{id}_0.jpg": text} if text else {},
        }
        for id, text in texts.items()
    }
    path.write_text(json.dumps(metas))
    return (str(path),)


def captions(plan: Plan) -> dict[str, str]:
    return {task.item_id: task.text for number in range(len(plan.digests)) for task in read_tasks(plan.shard(number))}


def test_titles_stand_in_only_where_the_catalogue_describes_nothing(tmp_path: Path) -> None:
    ids = [f"B{n}" for n in range(9)]
    bare = described(tmp_path / "bare.json", dict.fromkeys(ids, ""))
    auto = replace(SETTINGS, text="auto")
    titled = make_plan(bare, tmp_path / "bare", auto)
    assert captions(titled) == {id: f"Title {id}" for id in ids} and titled.settings["text"] == "title"
    assert titled.digest == make_plan(bare, tmp_path / "title", replace(SETTINGS, text="title")).digest
    # Wherever the first description is, the plan is that of a catalogue with descriptions.
    for at in (0, 4, 8):
        items = described(tmp_path / f"{at}.json", {id: "A cup." if id == f"B{at}" else "" for id in ids})
        plan = make_plan(items, tmp_path / str(at), auto)
        assert captions(plan) == {id: "A cup." if id == f"B{at}" else "" for id in ids}
        assert plan.digest == make_plan(items, tmp_path / f"{at}-explicit", SETTINGS).digest
        wanted = replace(auto, limit=None, splits={"train": 0.5}, photos_per_shard=2)
        assert make_plan(items, tmp_path / f"{at}-part", wanted).settings["text"] == "catalogue"
    # A follower of an earlier link, and an item that is not wanted, count as any other.
    (path,) = rows(tmp_path / "shared.jsonl", ("A", ["http://x/1"]), ("B", ["http://x/2"]), ("C", ["http://x/1"]))
    last = {"image_name": "D_0.jpg", "image": "http://x/4", "image_description_llava_cleaned": "A cup."}
    Path(path).write_text(Path(path).read_text() + json.dumps(last) + "\n")
    (tmp_path / "ids").write_text("A\nB\nC\n")
    plan = make_plan((path,), tmp_path / "shared", replace(auto, ids=str(tmp_path / "ids")))
    assert captions(plan) == {"A": "", "B": "", "C": ""}


def test_what_was_decided_about_captions_stays(tmp_path: Path) -> None:
    auto = replace(SETTINGS, text="auto")
    items = described(tmp_path / "c.json", {"B0": "", "B1": ""})
    # A plan made before titles were taken: no caption, and none comes.
    old = make_plan(items, tmp_path / "old", SETTINGS)
    assert make_plan(items, tmp_path / "old", auto) == old and set(captions(old).values()) == {""}
    new = make_plan(items, tmp_path / "new", auto)
    assert make_plan(items, tmp_path / "new", auto) == new
    described(tmp_path / "c.json", {"B0": "", "B1": "", "B2": "A cup."})
    assert captions(make_plan(items, tmp_path / "old", auto, extend=True))["B2"] == "A cup."
    assert captions(make_plan(items, tmp_path / "new", auto, extend=True))["B2"] == "Title B2"
    with pytest.raises(ConfigError, match="--text was title and is catalogue"):
        make_plan(items, tmp_path / "new", SETTINGS)
    none = make_plan(items, tmp_path / "none", replace(SETTINGS, text="none"))
    assert set(captions(none).values()) == {""}
    with pytest.raises(ConfigError, match="--text was none and is auto"):
        make_plan(items, tmp_path / "none", auto)


def test_a_table_of_links_is_planned(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("sku,link,caption\nA,http://x/1,red\nA,http://x/2,\nB,http://x/1,\n")
    columns = {"id": "sku", "url": "link", "text": "caption"}
    chosen = replace(SETTINGS, photos="all", text="auto", columns=columns)
    plan = make_plan((str(path),), tmp_path / "out", chosen)
    assert keys(plan) == ["A_0", "B_0", "A_1"] and captions(plan) == {"A": "", "B": ""}
    assert read_tasks(plan.shard(0))[0].text == "red" and plan.counts.items == 2
    assert make_plan((str(path),), tmp_path / "out", chosen) == plan
    other = replace(chosen, columns={"id": "sku", "url": "link"})
    with pytest.raises(
        ConfigError, match="--columns was id=sku url=link text=caption and is id=sku url=link; use another"
    ):
        make_plan((str(path),), tmp_path / "out", other)
    # A plan of a catalogue says nothing about columns.
    assert "columns" not in make_plan(write(tmp_path / "c.json", {"B1": 1}), tmp_path / "c", SETTINGS).settings


@pytest.mark.parametrize("words", [("id=a",), ("url=",), ("url=a", "url=b"), ("url=a", "link=b"), ("url",)])
def test_columns_that_cannot_be_meant(words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"--columns takes url=NAME and maybe id=, title= and text=, each once"):
        CrawlSettings(items=("a.csv",), out="out", columns=words)
    chosen = CrawlSettings(items=("a.csv",), out="out", columns=("url=a=b", "id=c d"))
    assert chosen.planned.columns == {"url": "a=b", "id": "c d"}


def test_an_extended_set_counts_every_item_and_record_once(tmp_path: Path) -> None:
    def catalogue(*items: tuple[str, list[str]]) -> tuple[str, ...]:
        (path,) = rows(tmp_path / "c.jsonl", *items)
        Path(path).write_text(Path(path).read_text() + "{\n")
        return (path,)

    first = [("B0", ["http://x/0"]), ("B1", []), ("B2", ["None"])]
    (tmp_path / "ids").write_text("\n".join([f"B{n}" for n in range(6)]))
    chosen = replace(SETTINGS, ids=str(tmp_path / "ids"))
    make_plan(catalogue(*first), tmp_path / "out", chosen)
    items = catalogue(*first, ("B3", ["http://x/3"]), ("B4", []))
    counts = make_plan(items, tmp_path / "out", chosen, extend=True).counts
    assert (counts.items, counts.without_photo, counts.photos, counts.unlinked) == (5, 3, 2, 1)
    assert (counts.rejected, counts.ids_missing) == (1, 1)
    # One of those without a photo has one now.
    items = catalogue(first[0], ("B1", ["http://x/1"]), first[2], ("B3", ["http://x/3"]), ("B4", []))
    plan = make_plan(items, tmp_path / "out", chosen, extend=True)
    assert (plan.counts.items, plan.counts.without_photo, plan.counts.photos) == (5, 2, 3)
    assert keys(plan) == ["B0_0", "B3_0", "B1_0"] and make_plan(items, tmp_path / "out", chosen) == plan


def rows(path: Path, *items: tuple[str, list[str]]) -> tuple[str, ...]:
    """A catalogue of items with the photos' links."""
    lines = [{"parent_asin": id, "title": id, "images": [{"large": url} for url in urls]} for id, urls in items]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return (str(path),)


AMAZON = "https://m.media-amazon.com/images/I/"


def test_photos_of_one_picture_stand_together_in_one_shard(tmp_path: Path) -> None:
    items = rows(
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


def test_a_picture_that_everything_shows_does_not_fill_one_shard(tmp_path: Path) -> None:
    items = rows(tmp_path / "c.jsonl", *((f"B{n:02d}", ["http://x/no-image.jpg"]) for n in range(10)))
    plan = make_plan(items, tmp_path / "out", SETTINGS)
    assert [len(read_tasks(plan.shard(n))) for n in range(len(plan.digests))] == [4, 4, 2]
    assert keys(plan) == [f"B{n:02d}_0" for n in range(10)]


def test_photos_of_an_item(tmp_path: Path) -> None:
    items = write(tmp_path / "c.json", {"B1": 5, "B2": 1})
    two = make_plan(items, tmp_path / "two", replace(SETTINGS, photos="2"))
    assert keys(two) == ["B1_0", "B1_1", "B2_0"]


def test_every_item_is_in_one_split(tmp_path: Path) -> None:
    every = {f"B{n}": 2 for n in range(400)}
    items = write(tmp_path / "c.json", every)
    splits = {"train": 0.8, "valid": 0.1, "test": 0.1}
    parts = {}
    for split in splits:
        settings = replace(SETTINGS, photos="all", split=split, splits=splits)
        parts[split] = {key.partition("_")[0] for key in keys(make_plan(items, tmp_path / split, settings))}
    assert sum(map(len, parts.values())) == 400 and set.union(*parts.values()) == set(every)
    assert 280 < len(parts["train"]) < 360 and len(parts["valid"]) > 15 and len(parts["test"]) > 15
    # Another catalogue with the same items leaves each where it is.
    fewer = write(tmp_path / "d.json", dict.fromkeys(list(every)[::-3], 1))
    again = make_plan(fewer, tmp_path / "again", replace(SETTINGS, split="valid", splits=splits))
    assert {key.partition("_")[0] for key in keys(again)} <= parts["valid"]


def test_descriptions_may_be_left_out(tmp_path: Path) -> None:
    lavic = {"B1": {"title": "x", "details": {"b": 1, "a": 2}, "images": [{"large": "http://x/1.jpg"}]}}
    lavic["B1"]["image_descriptions_llava_cleaned"] = {"B1_0.jpg": "A cup."}
    (tmp_path / "lavic.json").write_text(json.dumps(lavic))
    row = {"parent_asin": "B1", "title": "x", "details": '{"a": 2, "b": 1}', "price": "1", "images": {"thumb": ["t"]}}
    row["images"]["large"] = ["http://x/1.jpg"]
    (tmp_path / "amazon.jsonl").write_text(json.dumps(row) + "\n")
    digests = {}
    for name in ("lavic.json", "amazon.jsonl"):
        for text in ("catalogue", "none"):
            plan = make_plan((str(tmp_path / name),), tmp_path / name[:3] / text, replace(SETTINGS, text=text))
            digests[name, text] = plan.digest
    assert digests["lavic.json", "none"] == digests["amazon.jsonl", "none"]
    assert digests["lavic.json", "catalogue"] != digests["amazon.jsonl", "catalogue"]


def test_broken_records_are_counted_and_named(tmp_path: Path) -> None:
    (path,) = rows(tmp_path / "c.jsonl", *((f"B{n}", [f"http://x/{n}.jpg"]) for n in range(3)))
    Path(path).write_text('{"title": "no id"}\n' + Path(path).read_text() + "{\n")
    plan = make_plan((path,), tmp_path / "out", SETTINGS, max_rejected=2)
    assert plan.counts.rejected == 2 and keys(plan) == ["B0_0", "B1_0", "B2_0"]
    named = [json.loads(line) for line in (tmp_path / "out/rejected.jsonl").read_text().splitlines()]
    assert [(row["file"], row["line"]) for row in named] == [(path, 1), (path, 5)]
    assert "no item id" in named[0]["reason"]
    out = tmp_path / "out2"
    with pytest.raises(DataError, match=r"more than 1 records .*c\.jsonl:5: not JSON .*out2/rejected\.jsonl"):
        make_plan((path,), out, SETTINGS, max_rejected=1)
    assert load_plan(out) is None and len((out / "rejected.jsonl").read_text().splitlines()) == 2


def test_what_follows_packed_data_is_no_record(tmp_path: Path) -> None:
    (path,) = rows(tmp_path / "c.jsonl", ("B0", ["http://x/0.jpg"]))
    Path(path).write_bytes(gzip.compress(Path(path).read_bytes()) + b"<html>")
    plan = make_plan((path,), tmp_path / "out", SETTINGS, max_rejected=0)
    assert keys(plan) == ["B0_0"] and plan.counts.rejected == 0
    (row,) = map(json.loads, (tmp_path / "out/rejected.jsonl").read_text().splitlines())
    assert row["line"] == 0 and row["reason"].startswith("6 bytes after the end of the compressed data")


def test_new_items_become_new_shards(tmp_path: Path) -> None:
    items = write(tmp_path / "c.json", {f"B{n}": 1 for n in range(6)})
    old = make_plan(items, tmp_path / "out", SETTINGS)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out/plan").glob("*.jsonl")}
    write(tmp_path / "c.json", {f"B{n}": 2 for n in range(-3, 9)})
    with pytest.raises(ConfigError, match=r"the content of .*c\.json has changed.*--extend"):
        make_plan(items, tmp_path / "out", SETTINGS)
    plan = make_plan(items, tmp_path / "out", SETTINGS, extend=True)
    assert plan.digests[:2] == old.digests and len(plan.digests) == 4 and plan.digest != old.digest
    assert keys(plan)[6:] == [f"B{n}_0" for n in (-3, -2, -1, 6, 7, 8)]
    assert (plan.counts.photos, plan.counts.items, plan.counts.known) == (12, 12, 6)
    assert {name: (tmp_path / "out/plan" / name).read_bytes() for name in before} == before
    # Run again, with and without the word: nothing is new.
    for extend in (False, True):
        assert make_plan(items, tmp_path / "out", SETTINGS, extend=extend) == plan
    wider = make_plan(items, tmp_path / "out", replace(SETTINGS, limit=2), extend=True)
    assert wider.digests == plan.digests
    with pytest.raises(ConfigError, match="--limit was 2 and is not given"):
        make_plan(items, tmp_path / "out", SETTINGS)
    with pytest.raises(ConfigError, match=r"--photos was first and is all; use another --out, or the same input$"):
        make_plan(items, tmp_path / "out", replace(SETTINGS, photos="all"), extend=True)


def test_a_touched_file_is_the_same_and_a_changed_one_of_its_size_is_not(tmp_path: Path) -> None:
    items = write(tmp_path / "c.json", {"B1": 1})
    plan = make_plan(items, tmp_path / "out", SETTINGS)
    os.utime(items[0], (1, 1))
    assert make_plan(items, tmp_path / "out", SETTINGS) == plan
    write(tmp_path / "c.json", {"B2": 1})
    with pytest.raises(ConfigError, match="has changed"):
        make_plan(items, tmp_path / "out", SETTINGS)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.sampled_from("abcdefgh"), st.lists(st.sampled_from("uvwxyz"), max_size=4)), max_size=12),
    st.integers(1, 6),
)
def test_any_catalogue_is_dealt_whole(tmp_path: Path, found: list[tuple[str, list[str]]], most: int) -> None:
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    items = rows(folder / "c.jsonl", *((id, [f"http://x/{url}" for url in urls]) for id, urls in found))
    wanted: dict[str, str] = {}
    for id, urls in found:
        for n, url in enumerate(urls):
            wanted.setdefault(f"{id}_{n}", url)
    if not wanted:
        with pytest.raises(DataError):
            make_plan(items, folder / "out", replace(SETTINGS, photos="all", photos_per_shard=most))
        return
    plan = make_plan(items, folder / "out", replace(SETTINGS, photos="all", photos_per_shard=most))
    shards = [read_tasks(plan.shard(n)) for n in range(len(plan.digests))]
    assert sorted(keys(plan)) == sorted(wanted) and all(1 <= len(shard) <= most for shard in shards)
    for url in set(wanted.values()):
        places = [n for n, shard in enumerate(shards) for task in shard if task.url == f"http://x/{url}"]
        # In one shard; in more only where there are more than fit into one.
        assert len(set(places)) == -(-len(places) // most)


@pytest.mark.parametrize("id", ["../../etc/passwd", "a.b", "\u00e9charpe", "x" * 10_000, "\ud800", "a/b c\n", "."])
def test_ids_from_a_catalogue_never_become_paths(tmp_path: Path, id: str) -> None:
    items = rows(tmp_path / "c.jsonl", (id, ["http://x/1.jpg"]), ("B1", ["http://x/2.jpg"]))
    plan = make_plan(items, tmp_path / "out", SETTINGS)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,90}", key) for key in keys(plan)) and len(keys(plan)) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.jsonl", "out"]


def test_more_hashes_than_the_buffer_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external_dedup, "_BUFFER", 64)
    dedup, texts = ExternalDedup(tmp_path / "r"), [str(n * n % 97) for n in range(500)]
    for text in texts:
        dedup.add(hash64(text))
    assert len(dedup) == 500
    assert dedup.firsts().tolist() == [texts.index(text) for text in texts]
    assert ExternalDedup(tmp_path / "none").firsts().tolist() == []
