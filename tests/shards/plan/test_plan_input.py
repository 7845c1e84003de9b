"""Input of a crawl plan: id lists, broken records, unsafe ids, tables of links, a catalogue without photos."""

from __future__ import annotations

import gzip
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from lavic.errors import ConfigError, DataError
from lavic.shards.crawl import _plan as plan_set
from lavic.shards.crawl_settings import CrawlSettings
from lavic.shards.plan.crawl_plan import load_plan, make_plan, read_tasks
from tests.shards.plan.plan_files import (
    SETTINGS,
    planned_captions,
    planned_keys,
    write_described,
    write_items,
    write_links,
)


def test_limit_and_ids_select_items(tmp_path: Path) -> None:
    items = write_items(tmp_path / "c.json", {f"B{n}": 1 for n in range(9)})
    assert make_plan(items, tmp_path / "limit", replace(SETTINGS, limit=3)).counts.photos == 3
    (tmp_path / "ids").write_text("B7\nB2\n\nnone\n")
    plan = make_plan(items, tmp_path / "ids-out", replace(SETTINGS, ids=str(tmp_path / "ids")))
    assert [task.key for task in read_tasks(plan.shard(0))] == ["B2_0", "B7_0"] and plan.counts.ids_missing == 1
    few = make_plan(items, tmp_path / "few-out", replace(SETTINGS, ids=str(tmp_path / "ids"), limit=1))
    assert planned_keys(few) == ["B2_0"] and few.counts.ids_missing == 0, "the others were not looked for"
    (tmp_path / "ids").write_text("none\n")
    with pytest.raises(DataError, match="none of the ids"):
        make_plan(items, tmp_path / "no-out", replace(SETTINGS, ids=str(tmp_path / "ids")))


def test_a_catalogue_without_photos_is_refused_with_counts(tmp_path: Path) -> None:
    items = write_items(tmp_path / "c.json", {"B1": 0, "B2": 0})
    with pytest.raises(DataError, match="no photo to fetch: 2 items, 2 of them without a photo URL; --columns url=KEY"):
        make_plan(items, tmp_path / "out", SETTINGS)
    links = tmp_path / "links.jsonl"
    links.write_text(json.dumps({"asin": "B1", "imageURLHighRes": []}) + "\n")
    with pytest.raises(DataError, match=r"1 entries of their lists of images without a link$"):
        make_plan((str(links),), tmp_path / "out", replace(SETTINGS, columns={"url": "imageURLHighRes", "id": "asin"}))
    (path,) = write_links(tmp_path / "d.jsonl", ("B1", ["None", " "]), ("B2", []))
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


def test_id_files_in_other_encodings_are_read(tmp_path: Path) -> None:
    items = write_items(tmp_path / "c.json", {f"B{n}": 1 for n in range(9)})
    digests = set()
    for data in (b"B7\nB2\n", b"\xef\xbb\xbfB7\r\nB2\r\n\r\n", "B7\r\nB2".encode("utf-16"), gzip.compress(b"B7\nB2")):
        (tmp_path / "ids").write_bytes(data)
        plan = make_plan(items, tmp_path / "out", replace(SETTINGS, ids=str(tmp_path / "ids")))
        assert planned_keys(plan) == ["B2_0", "B7_0"] and plan.counts.ids_missing == 0
        digests.add(plan.generations[0].ids)
    assert len(digests) == 1
    (tmp_path / "ids").write_bytes(b"B7\ncaf\xe9\n")
    with pytest.raises(DataError, match=r"--ids .*ids:2: not UTF-8 .byte 0xe9"):
        make_plan(items, tmp_path / "out", replace(SETTINGS, ids=str(tmp_path / "ids")))


def test_text_auto_takes_titles_only_if_no_item_is_described(tmp_path: Path) -> None:
    ids = [f"B{n}" for n in range(9)]
    bare = write_described(tmp_path / "bare.json", dict.fromkeys(ids, ""))
    auto = replace(SETTINGS, text="auto")
    titled = make_plan(bare, tmp_path / "bare", auto)
    assert planned_captions(titled) == {id: f"Title {id}" for id in ids} and titled.settings["text"] == "title"
    assert titled.digest == make_plan(bare, tmp_path / "title", replace(SETTINGS, text="title")).digest
    # One description anywhere in the catalogue is enough.
    for position in (0, 4, 8):
        items = write_described(
            tmp_path / f"{position}.json", {id: "A cup." if id == f"B{position}" else "" for id in ids}
        )
        plan = make_plan(items, tmp_path / str(position), auto)
        assert planned_captions(plan) == {id: "A cup." if id == f"B{position}" else "" for id in ids}
        assert plan.digest == make_plan(items, tmp_path / f"{position}-explicit", SETTINGS).digest
        part = replace(auto, limit=None, splits={"train": 0.5}, photos_per_shard=2)
        assert make_plan(items, tmp_path / f"{position}-part", part).settings["text"] == "catalogue"
    # Items that repeat a link or are not selected count too.
    (path,) = write_links(
        tmp_path / "shared.jsonl", ("A", ["http://x/1"]), ("B", ["http://x/2"]), ("C", ["http://x/1"])
    )
    described_item = {"image_name": "D_0.jpg", "image": "http://x/4", "image_description_llava_cleaned": "A cup."}
    Path(path).write_text(Path(path).read_text() + json.dumps(described_item) + "\n")
    (tmp_path / "ids").write_text("A\nB\nC\n")
    plan = make_plan((path,), tmp_path / "shared", replace(auto, ids=str(tmp_path / "ids")))
    assert planned_captions(plan) == {"A": "", "B": "", "C": ""}


def test_text_auto_is_not_decided_again(tmp_path: Path) -> None:
    auto = replace(SETTINGS, text="auto")
    items = write_described(tmp_path / "c.json", {"B0": "", "B1": ""})
    # A plan made before `auto` existed has no captions and keeps none.
    old = make_plan(items, tmp_path / "old", SETTINGS)
    assert make_plan(items, tmp_path / "old", auto) == old and set(planned_captions(old).values()) == {""}
    new = make_plan(items, tmp_path / "new", auto)
    assert make_plan(items, tmp_path / "new", auto) == new
    write_described(tmp_path / "c.json", {"B0": "", "B1": "", "B2": "A cup."})
    assert planned_captions(make_plan(items, tmp_path / "old", auto, extend=True))["B2"] == "A cup."
    assert planned_captions(make_plan(items, tmp_path / "new", auto, extend=True))["B2"] == "Title B2"
    with pytest.raises(ConfigError, match="--text was title and is catalogue"):
        make_plan(items, tmp_path / "new", SETTINGS)
    none = make_plan(items, tmp_path / "none", replace(SETTINGS, text="none"))
    assert set(planned_captions(none).values()) == {""}
    with pytest.raises(ConfigError, match="--text was none and is auto"):
        make_plan(items, tmp_path / "none", auto)


def test_a_table_of_links_is_planned(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("sku,link,caption\nA,http://x/1,red\nA,http://x/2,\nB,http://x/1,\n")
    columns = {"id": "sku", "url": "link", "text": "caption"}
    settings = replace(SETTINGS, photos="all", text="auto", columns=columns)
    plan = make_plan((str(path),), tmp_path / "out", settings)
    assert planned_keys(plan) == ["A_0", "B_0", "A_1"] and planned_captions(plan) == {"A": "", "B": ""}
    assert read_tasks(plan.shard(0))[0].text == "red" and plan.counts.items == 2
    assert make_plan((str(path),), tmp_path / "out", settings) == plan
    other = replace(settings, columns={"id": "sku", "url": "link"})
    with pytest.raises(
        ConfigError, match="--columns was id=sku url=link text=caption and is id=sku url=link; use another"
    ):
        make_plan((str(path),), tmp_path / "out", other)
    # A plan of a catalogue says nothing about columns.
    assert "columns" not in make_plan(write_items(tmp_path / "c.json", {"B1": 1}), tmp_path / "c", SETTINGS).settings


def test_rows_of_an_id_that_are_not_adjacent_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.csv"
    path.write_text("sku,link\nA,http://x/1\nB,http://x/2\nA,http://x/3\n")
    columns, out = ("id=sku", "url=link"), str(tmp_path / "out")
    settings = CrawlSettings(items=(str(path),), out=out, columns=columns, photos="all", dry_run=True)
    with caplog.at_level("INFO"):
        assert plan_set(tmp_path / "out", settings).counts.repeated == 1
    assert "1 repeated photos left out (rows of an id must be adjacent: sort the table by it)" in caplog.text


@pytest.mark.parametrize("columns", [("id=a",), ("url=",), ("url=a", "url=b"), ("url=a", "link=b"), ("url",)])
def test_invalid_columns_are_refused(columns: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"--columns takes url=NAME and maybe id=, title= and text=, each once"):
        CrawlSettings(items=("a.csv",), out="out", columns=columns)
    settings = CrawlSettings(items=("a.csv",), out="out", columns=("url=a=b", "id=c d"))
    assert settings.planned.columns == {"url": "a=b", "id": "c d"}


def test_descriptions_are_ignored_with_text_none(tmp_path: Path) -> None:
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


def test_broken_records_are_counted_and_listed(tmp_path: Path) -> None:
    (path,) = write_links(tmp_path / "c.jsonl", *((f"B{n}", [f"http://x/{n}.jpg"]) for n in range(3)))
    Path(path).write_text('{"title": "no id"}\n' + Path(path).read_text() + "{\n")
    plan = make_plan((path,), tmp_path / "out", SETTINGS, max_rejected=2)
    assert plan.counts.rejected == 2 and planned_keys(plan) == ["B0_0", "B1_0", "B2_0"]
    rejected = [json.loads(line) for line in (tmp_path / "out/rejected.jsonl").read_text().splitlines()]
    assert [(row["file"], row["line"]) for row in rejected] == [(path, 1), (path, 5)]
    assert "no item id" in rejected[0]["reason"]
    out = tmp_path / "out2"
    with pytest.raises(DataError, match=r"more than 1 records .*c\.jsonl:5: not JSON .*out2/rejected\.jsonl"):
        make_plan((path,), out, SETTINGS, max_rejected=1)
    assert load_plan(out) is None and len((out / "rejected.jsonl").read_text().splitlines()) == 2


def test_bytes_after_compressed_data_are_not_counted_as_a_record(tmp_path: Path) -> None:
    (path,) = write_links(tmp_path / "c.jsonl", ("B0", ["http://x/0.jpg"]))
    Path(path).write_bytes(gzip.compress(Path(path).read_bytes()) + b"<html>")
    plan = make_plan((path,), tmp_path / "out", SETTINGS, max_rejected=0)
    assert planned_keys(plan) == ["B0_0"] and plan.counts.rejected == 0
    (row,) = map(json.loads, (tmp_path / "out/rejected.jsonl").read_text().splitlines())
    assert row["line"] == 0 and row["reason"].startswith("6 bytes after the end of the compressed data")


@pytest.mark.parametrize("id", ["../../etc/passwd", "a.b", "\u00e9charpe", "x" * 10_000, "\ud800", "a/b c\n", "."])
def test_ids_from_a_catalogue_never_become_paths(tmp_path: Path, id: str) -> None:
    items = write_links(tmp_path / "c.jsonl", (id, ["http://x/1.jpg"]), ("B1", ["http://x/2.jpg"]))
    plan = make_plan(items, tmp_path / "out", SETTINGS)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,90}", key) for key in planned_keys(plan)) and len(planned_keys(plan)) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.jsonl", "out"]
