"""Catalogues in each format, and which files a path or glob names."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lavic.data.catalog import find_files, read_items
from lavic.errors import DataError
from tests.data.catalogue_files import METAS, ROWS, write_bytes, write_parquet, write_rows


def test_every_format_gives_the_same_items(tmp_path: Path) -> None:
    json_object = tmp_path / "item2meta_train.json"
    json_object.write_text(json.dumps(METAS, indent=1))
    json_list = tmp_path / "list.json"
    json_list.write_text(json.dumps(ROWS))
    expected = list(read_items([json_object]))
    assert [item.id for item in expected] == list(METAS) and expected[7].title == "Möbel 7"
    files = [
        write_rows(tmp_path / "meta_X.jsonl", ROWS),
        write_rows(tmp_path / "meta_X.jsonl.gz", ROWS),
        write_rows(tmp_path / "lines.json", ROWS),
        json_list,
        write_parquet(tmp_path / "meta.parquet"),
    ]
    for file in files:
        assert list(read_items([file])) == expected, file.name


def test_a_json_object_larger_than_a_chunk_is_streamed(tmp_path: Path) -> None:
    big = {f"B{n}": {"title": "x" * 3000, "rating": n, "images": []} for n in range(2000)}
    path = tmp_path / "big.json"
    path.write_text(json.dumps(big))
    assert [item.id for item in read_items([path])] == list(big)


def test_globs_and_uris_are_expanded_in_order(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_rows(tmp_path / f"meta_{name}.jsonl", [{"parent_asin": name, "images": []}])
    assert [item.id for item in read_items([str(tmp_path / "meta_*.jsonl")])] == ["a", "b"]
    assert [item.id for item in read_items([f"file://{tmp_path}/meta_b.jsonl"])] == ["b"]
    assert len(find_files([tmp_path / "meta_a.jsonl", str(tmp_path / "meta_*.jsonl")])) == 2


def test_compressed_files_and_a_byte_order_mark(tmp_path: Path) -> None:
    import bz2
    import lzma

    text = "\ufeff" + "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "a.jsonl.bz2").write_bytes(bz2.compress(text.encode()))
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(text.encode()))
    (tmp_path / "keyed.json.gz").write_bytes(gzip.compress(json.dumps(METAS).encode()))
    for path in tmp_path.iterdir():
        assert [item.id for item in read_items([path])] == list(METAS), path
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(text.encode())[:-30])
    with pytest.raises(DataError, match="the compressed data is corrupt"):
        list(read_items([tmp_path / "a.jsonl.xz"]))


def test_missing_and_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such catalogue file"):
        find_files([tmp_path / "none.json"])
    with pytest.raises(DataError, match="no such catalogue file"):
        find_files([str(tmp_path / "*.json")])
    with pytest.raises(DataError, match="is a folder"):
        find_files([tmp_path])
    with pytest.raises(DataError, match="cannot be opened"):
        find_files(["nosuch://bucket/x"])
    (tmp_path / "x.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match="not a parquet file"):
        list(read_items([tmp_path / "x.parquet"]))


def test_empty_files_hold_no_item(tmp_path: Path) -> None:
    for name, text in {"a.jsonl": "", "b.json": "", "c.json": "{}", "d.json": "[]", "e.jsonl": "\n\n"}.items():
        (tmp_path / name).write_text(text)
        assert list(read_items([tmp_path / name])) == []


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.text(min_size=1).map(lambda id: f"B{id.strip()}"), st.text(), max_size=6), st.integers(0, 3))
def test_any_json_object_gives_its_ids(tmp_path: Path, titles: dict[str, str], indent: int) -> None:
    path = tmp_path / "any.json"
    metas = {id: {"title": title, "rating": -1.5e3} for id, title in titles.items()}
    path.write_text(json.dumps(metas, indent=indent or None, ensure_ascii=bool(indent % 2)), "utf-8", newline="\n")
    assert [item.id for item in read_items([path])] == [id.strip() for id in titles]


CONTENTS: dict[str, tuple[str, bytes]] = {
    "object with a byte order mark": ("a.json", b"\xef\xbb\xbf" + json.dumps(METAS).encode()),
    "object in UTF-16": ("a.json", json.dumps(METAS, ensure_ascii=False).encode("utf-16")),
    "object in UTF-16 without a byte order mark": ("a.json", json.dumps(METAS, ensure_ascii=False).encode("utf-16-be")),
    "object named .jsonl": ("a.jsonl", json.dumps(METAS).encode()),
    "lines of objects with one item": ("a.jsonl", b"\n".join(json.dumps({id: m}).encode() for id, m in METAS.items())),
    "list named .jsonl": ("a.jsonl", json.dumps(ROWS, indent=1).encode()),
    "list, one item per line": ("a.jsonl", b"[\n" + b",\n".join(json.dumps(row).encode() for row in ROWS) + b"\n]\n"),
    "indented objects": ("a.json", b"\n".join(json.dumps(row, indent=2).encode() for row in ROWS)),
    "lines with CRLF": ("a.json", b"\r\n".join(json.dumps(row).encode() for row in ROWS)),
    "lines in UTF-16": ("a.jsonl", "\n".join(json.dumps(row) for row in ROWS).encode("utf-16")),
    "gzip named .jsonl": ("a.jsonl", gzip.compress(b"\n".join(json.dumps(row).encode() for row in ROWS))),
    "plain text named .gz": ("a.jsonl.gz", b"\n".join(json.dumps(row).encode() for row in ROWS)),
    "object in two gzip members": (
        "a.json.gz",
        b"".join(map(gzip.compress, (json.dumps(METAS).encode()[:99], json.dumps(METAS).encode()[99:]))),
    ),
    "two lists": ("a.json", b"\n".join(json.dumps(part).encode() for part in (ROWS[:2], [], ROWS[2:]))),
    "a list in each line": ("a.jsonl", b"\n".join(json.dumps([row]).encode() for row in ROWS)),
    "lists in two gzip members": ("a.json", b"".join(gzip.compress(json.dumps([row]).encode()) for row in ROWS)),
    "lists with byte order marks": ("a.json", b"".join(b"\xef\xbb\xbf" + json.dumps([row]).encode() for row in ROWS)),
    "lines with byte order marks": ("a.jsonl", b"".join(b"\xef\xbb\xbf%s\n" % json.dumps(r).encode() for r in ROWS)),
    "a list, then lines": ("a.json", b"\n".join(json.dumps(row).encode() for row in (ROWS[:1], *ROWS[1:]))),
    "details before the id": ("a.json", b"\n".join(json.dumps({"details": {"a": 1}, **row}).encode() for row in ROWS)),
}


@pytest.mark.parametrize("case", CONTENTS)
def test_format_is_detected_from_the_content(tmp_path: Path, case: str) -> None:
    name, data = CONTENTS[case]
    items = list(read_items([write_bytes(tmp_path / name, data)]))
    assert [(item.id, item.title, item.images) for item in items] == [
        (id, meta["title"], (meta["images"][0]["large"],)) for id, meta in METAS.items()
    ]


@pytest.mark.parametrize("name", ["a.parq", "a.pq", "a.jsonl", "a"])
def test_parquet_is_read_whatever_its_name(tmp_path: Path, name: str) -> None:
    assert [item.id for item in read_items([write_parquet(tmp_path / name)])] == list(METAS)


def test_an_existing_file_takes_precedence_over_a_glob(tmp_path: Path) -> None:
    folder = tmp_path / "[2023] raw?"
    folder.mkdir()
    write_rows(folder / "meta[1].jsonl", ROWS[:1])
    write_rows(folder / "meta2.jsonl", ROWS[1:2])
    assert [item.id for item in read_items([folder / "meta[1].jsonl"])] == ["B0"]
    assert [item.id for item in read_items([folder / "*.jsonl"])] == ["B1", "B0"]
    assert [item.id for item in read_items([tmp_path / "*raw*" / "meta[0-9].jsonl"])] == ["B1"]
    assert [item.id for item in read_items([f"file://{folder}/meta[1].jsonl"])] == ["B0"]
