"""Catalogues in every form, clean and dirty."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lavic.data import catalog
from lavic.data.catalog import BadRecord, find_files, read_items
from lavic.errors import DataError

METAS = {
    f"B{n}": {"title": f"Möbel {n}", "images": [{"large": f"http://x/{n}.jpg"}], "categories": ["a", "b"]}
    for n in range(50)
}
ROWS = [{"parent_asin": id, **meta} for id, meta in METAS.items()]


def write(path: Path, rows: list[dict]) -> Path:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def write_parquet(path: Path) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


def test_every_form_gives_the_same_items(tmp_path: Path) -> None:
    keyed = tmp_path / "item2meta_train.json"
    keyed.write_text(json.dumps(METAS, indent=1))
    listed = tmp_path / "list.json"
    listed.write_text(json.dumps(ROWS))
    expected = list(read_items([keyed]))
    assert [item.id for item in expected] == list(METAS) and expected[7].title == "Möbel 7"
    forms = [
        write(tmp_path / "meta_X.jsonl", ROWS),
        write(tmp_path / "meta_X.jsonl.gz", ROWS),
        write(tmp_path / "lines.json", ROWS),
        listed,
        write_parquet(tmp_path / "meta.parquet"),
    ]
    for form in forms:
        assert list(read_items([form])) == expected, form.name


def test_a_keyed_file_larger_than_a_chunk_streams(tmp_path: Path) -> None:
    big = {f"B{n}": {"title": "x" * 3000, "rating": n, "images": []} for n in range(2000)}
    path = tmp_path / "big.json"
    path.write_text(json.dumps(big))
    assert [item.id for item in read_items([path])] == list(big)


def test_globs_uris_and_order(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write(tmp_path / f"meta_{name}.jsonl", [{"parent_asin": name, "images": []}])
    assert [item.id for item in read_items([str(tmp_path / "meta_*.jsonl")])] == ["a", "b"]
    assert [item.id for item in read_items([f"file://{tmp_path}/meta_b.jsonl"])] == ["b"]
    assert len(find_files([tmp_path / "meta_a.jsonl", str(tmp_path / "meta_*.jsonl")])) == 2


@pytest.mark.parametrize("line", ['{"parent_asin": "B2"', "[1, 2]", "null", "\x00\x01", '{"title": "no id"}'])
def test_a_broken_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "meta.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n\n" + line + "\n" + json.dumps(ROWS[1]) + "\n")
    with pytest.raises(DataError, match=r"meta\.jsonl:3: "):
        list(read_items([path]))
    errors: list[DataError] = []
    assert [item.id for item in read_items([path], errors.append)] == ["B0", "B1"]
    assert len(errors) == 1 and ":3: " in str(errors[0])


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    path = tmp_path / "meta.jsonl"
    path.write_bytes(b'{"parent_asin": "B1", "title": "caf\xe9"}\n' + json.dumps(ROWS[1]).encode())
    errors: list[DataError] = []
    assert [item.id for item in read_items([path], errors.append)] == ["B1"]
    assert "meta.jsonl:1: not JSON (not UTF-8)" in str(errors[0])


def test_packed_files_and_a_byte_order_mark(tmp_path: Path) -> None:
    import bz2
    import lzma

    text = "\ufeff" + "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "a.jsonl.bz2").write_bytes(bz2.compress(text.encode()))
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(text.encode()))
    (tmp_path / "keyed.json.gz").write_bytes(gzip.compress(json.dumps(METAS).encode()))
    for path in tmp_path.iterdir():
        assert [item.id for item in read_items([path])] == list(METAS), path
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(text.encode())[:-30])
    with pytest.raises(DataError, match="cannot be read to its end"):
        list(read_items([tmp_path / "a.jsonl.xz"]))


def test_what_is_too_long_or_too_deep_is_named_and_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "_LONGEST_LINE", 4096)
    rows = [json.dumps(row) for row in ROWS[:3]]
    rows[1:1] = ['{"parent_asin": "' + "x" * 20_000 + '"}', "[" * 4000]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    errors: list[BadRecord] = []
    assert [item.id for item in read_items([tmp_path / "a.jsonl"], errors.append)] == ["B0", "B1", "B2"]
    assert [(error.line, error.reason.partition(" (")[0]) for error in errors] == [
        (2, "a line of more than 0 MiB"),
        (3, "not JSON"),
    ]
    (tmp_path / "b.json").write_text('{"B0": {"images": []},\n"B1": {"title": "open' + "x" * 3_000_000)
    with pytest.raises(DataError, match=r"b\.json:2: not JSON .* cannot be told apart"):
        list(read_items([tmp_path / "b.json"], errors.append))


def test_a_keyed_file_cut_short_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "item2meta.json"
    path.write_text(json.dumps(METAS, indent=1)[:-400])
    with pytest.raises(DataError, match=r"item2meta\.json:\d\d+: not JSON"):
        list(read_items([path]))


def test_a_gzip_cut_short_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "meta.jsonl.gz", ROWS)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match="cannot be read to its end"):
        list(read_items([path]))


def test_files_that_are_not_there(tmp_path: Path) -> None:
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
@given(st.lists(st.one_of(st.binary(max_size=60), st.sampled_from([json.dumps(row).encode() for row in ROWS[:3]]))))
def test_any_bytes_are_items_or_named_errors(tmp_path: Path, lines: list[bytes]) -> None:
    path = tmp_path / "any.jsonl"
    path.write_bytes(b"\n".join(line.replace(b"\n", b" ") for line in lines))
    good = sum(line in [json.dumps(row).encode() for row in ROWS[:3]] for line in lines)
    errors: list[DataError] = []
    assert len(list(read_items([path], errors.append))) == good
    assert all("any.jsonl:" in str(error) for error in errors)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.text(min_size=1).map(lambda id: f"B{id.strip()}"), st.text(), max_size=6), st.integers(0, 3))
def test_any_keyed_file_gives_its_ids(tmp_path: Path, titles: dict[str, str], indent: int) -> None:
    path = tmp_path / "any.json"
    metas = {id: {"title": title, "rating": -1.5e3} for id, title in titles.items()}
    path.write_text(json.dumps(metas, indent=indent or None, ensure_ascii=bool(indent % 2)), "utf-8", newline="\n")
    assert [item.id for item in read_items([path])] == [id.strip() for id in titles]
