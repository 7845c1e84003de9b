"""Catalogues in every form, clean and dirty."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lavic.data.catalog import find_files, read_items
from lavic.data.sources.record import BadRecord
from lavic.errors import DataError
from lavic.storage import text_files

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
    with pytest.raises(DataError, match="the compressed data is corrupt"):
        list(read_items([tmp_path / "a.jsonl.xz"]))


def test_what_is_too_long_or_too_deep_is_named_and_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "MAX_LINE_BYTES", 4096)
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
    with pytest.raises(DataError, match=r"b\.json:2: not JSON .* records after it cannot be found"):
        list(read_items([tmp_path / "b.json"], errors.append))


def test_a_keyed_file_cut_short_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "item2meta.json"
    path.write_text(json.dumps(METAS, indent=1)[:-400])
    with pytest.raises(DataError, match=r"item2meta\.json:\d\d+: not JSON"):
        list(read_items([path]))


def test_a_gzip_cut_short_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "meta.jsonl.gz", ROWS)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match="the compressed data is corrupt"):
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


SYNTAX = [b"{", b"}", b"[", b"]", b'"', b"'", b":", b",", b"\n", b"\\", b"null", b"1e999", b"\xff", b"\0", b"url"]
STARTS = [b"\xef\xbb\xbf", b"\xff\xfe", b"\x1f\x8b\x08\0", b"BZh91AY&SY", b"(\xb5/\xfd", b"PAR1\x15"]
RECORDS = [b'"B1": {"images": []}', b'{"parent_asin": "B2"}']
PIECES = st.sampled_from([*SYNTAX, *STARTS, *RECORDS]) | st.binary(max_size=3)
ENDINGS = st.sampled_from(["json", "jsonl", "csv", "txt", "parquet"])


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(PIECES, max_size=20), ENDINGS)
def test_any_bytes_under_any_name_are_items_or_named_errors(tmp_path: Path, pieces: list[bytes], ending: str) -> None:
    path = tmp_path / f"any.{ending}"
    path.write_bytes(b"".join(pieces))
    for columns in (None, {"url": "url"}):
        rejected: list[BadRecord] = []
        try:
            assert all(item.id for item in read_items([path], rejected.append, columns=columns))
        except DataError as error:
            assert str(path) in str(error)
        assert all(str(path) in str(error) for error in rejected)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.text(min_size=1).map(lambda id: f"B{id.strip()}"), st.text(), max_size=6), st.integers(0, 3))
def test_any_keyed_file_gives_its_ids(tmp_path: Path, titles: dict[str, str], indent: int) -> None:
    path = tmp_path / "any.json"
    metas = {id: {"title": title, "rating": -1.5e3} for id, title in titles.items()}
    path.write_text(json.dumps(metas, indent=indent or None, ensure_ascii=bool(indent % 2)), "utf-8", newline="\n")
    assert [item.id for item in read_items([path])] == [id.strip() for id in titles]


def links(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


FORMS: dict[str, tuple[str, bytes]] = {
    "an object with a mark": ("a.json", b"\xef\xbb\xbf" + json.dumps(METAS).encode()),
    "an object in UTF-16": ("a.json", json.dumps(METAS, ensure_ascii=False).encode("utf-16")),
    "an object in UTF-16 without a mark": ("a.json", json.dumps(METAS, ensure_ascii=False).encode("utf-16-be")),
    "an object under another name": ("a.jsonl", json.dumps(METAS).encode()),
    "objects of one item in lines": ("a.jsonl", b"\n".join(json.dumps({id: m}).encode() for id, m in METAS.items())),
    "a list under another name": ("a.jsonl", json.dumps(ROWS, indent=1).encode()),
    "a list in lines": ("a.jsonl", b"[\n" + b",\n".join(json.dumps(row).encode() for row in ROWS) + b"\n]\n"),
    "items for people to read": ("a.json", b"\n".join(json.dumps(row, indent=2).encode() for row in ROWS)),
    "lines of Windows": ("a.json", b"\r\n".join(json.dumps(row).encode() for row in ROWS)),
    "lines in UTF-16": ("a.jsonl", "\n".join(json.dumps(row) for row in ROWS).encode("utf-16")),
    "gzip under another name": ("a.jsonl", gzip.compress(b"\n".join(json.dumps(row).encode() for row in ROWS))),
    "text under a name of gzip": ("a.jsonl.gz", b"\n".join(json.dumps(row).encode() for row in ROWS)),
    "an object, packed twice": (
        "a.json.gz",
        b"".join(map(gzip.compress, (json.dumps(METAS).encode()[:99], json.dumps(METAS).encode()[99:]))),
    ),
    "details first": ("a.json", b"\n".join(json.dumps({"details": {"a": 1}, **row}).encode() for row in ROWS)),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_file_is_read_by_what_it_holds(tmp_path: Path, form: str) -> None:
    name, data = FORMS[form]
    items = list(read_items([links(tmp_path / name, data)]))
    assert [(item.id, item.title, item.images) for item in items] == [
        (id, meta["title"], (meta["images"][0]["large"],)) for id, meta in METAS.items()
    ]


@pytest.mark.parametrize("name", ["a.parq", "a.pq", "a.jsonl", "a"])
def test_parquet_is_read_whatever_its_name(tmp_path: Path, name: str) -> None:
    assert [item.id for item in read_items([write_parquet(tmp_path / name)])] == list(METAS)


@pytest.mark.parametrize("first", ["null", "3", '"text"', "[1]"])
def test_an_object_of_items_whose_first_is_none(tmp_path: Path, first: str) -> None:
    path = links(tmp_path / "a.json", f'{{"A": {first},\n"B": {{"images": []}}, "C": null}}'.encode())
    errors: list[BadRecord] = []
    assert [item.id for item in read_items([path], errors.append)] == ["B"]
    assert [error.line for error in errors] == [1, 2]


DEEP = '{"images": [], "details": %s}'
BAD = {
    DEEP % ("[" * 3000 + "]" * 3000): "not JSON (nested more than 200 levels deep)",
    DEEP % ('{"a":' * 300 + "1" + "}" * 300): "not JSON (nested more than 200 levels deep)",
    '{"price": 1e999}': "not JSON (the number 1e999 is too large)",
    '{"price": ' + "7" * 5000 + "}": "not JSON (a number has too many digits)",
    '{"price": -Infinity, "a": "}{"}': "not JSON (-Infinity, which is not a JSON number)",
    '{"title": "caf\udce9"}': "not JSON (not UTF-8)",
}


@pytest.mark.parametrize("bad", BAD, ids=range(len(BAD)))
@pytest.mark.parametrize("form", ["lines", "list", "keyed"])
def test_a_value_that_cannot_be_held_is_one_rejected_record(tmp_path: Path, bad: str, form: str) -> None:
    good = '{"parent_asin": "B1", "price": NaN}'
    lines = [good, bad, good]
    if form == "list":
        lines = ["[" + good + ",", bad + ",", good + "]"]
    elif form == "keyed":
        lines = [f'{{"B1": {good},', f'"B2": {bad},', f'"B1": {good}}}']
    path = links(tmp_path / "a.json", "\n".join(lines).encode("utf-8", "surrogateescape"))
    errors: list[BadRecord] = []
    assert [item.id for item in read_items([path], errors.append)] == ["B1", "B1"]
    assert [(error.line, error.reason) for error in errors] == [(2, BAD[bad])]


@pytest.mark.slow
def test_a_value_too_deep_that_is_longer_than_a_chunk(tmp_path: Path) -> None:
    deep = '{"details": ' + "[" * 2_000_000 + '"]' + '"' + "]" * 2_000_000 + "}"
    path = links(tmp_path / "a.json", f'{{"A": {deep}, "B": {{"images": []}}}}'.encode())
    errors: list[BadRecord] = []
    assert [item.id for item in read_items([path], errors.append)] == ["B"] and len(errors) == 1


@pytest.mark.parametrize("name", ["meta.json", "meta.json.gz", "meta.jsonl"])
def test_lines_of_python_are_named_as_such(tmp_path: Path, name: str) -> None:
    text = "{'asin': 'B1', 'title': \"it's\"}\n" + json.dumps(ROWS[0])
    path = links(tmp_path / name, gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    errors: list[BadRecord] = []
    assert [item.id for item in read_items([path], errors.append)] == ["B0"]
    assert [error.line for error in errors] == [1] and "a Python dict or list, as in older Amazon" in errors[0].reason


def test_what_follows_packed_data_is_named_and_the_records_are_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "meta.jsonl.gz", ROWS)
    path.write_bytes(path.read_bytes() + b"<html>")
    errors: list[BadRecord] = []
    assert len(list(read_items([path], errors.append))) == len(list(read_items([path]))) == 50
    assert [error.reason for error in errors] == ["6 bytes after the end of the compressed data were not read"]


def test_a_file_that_is_there_comes_before_a_glob(tmp_path: Path) -> None:
    folder = tmp_path / "[2023] raw?"
    folder.mkdir()
    write(folder / "meta[1].jsonl", ROWS[:1])
    write(folder / "meta2.jsonl", ROWS[1:2])
    assert [item.id for item in read_items([folder / "meta[1].jsonl"])] == ["B0"]
    assert [item.id for item in read_items([folder / "*.jsonl"])] == ["B1", "B0"]
    assert [item.id for item in read_items([tmp_path / "*raw*" / "meta[0-9].jsonl"])] == ["B1"]
    assert [item.id for item in read_items([f"file://{folder}/meta[1].jsonl"])] == ["B0"]


COLUMNS = {"id": "sku", "url": "link", "title": "name", "text": "caption"}
CELLS = [
    {"sku": "A", "link": "http://x/1.jpg", "name": "Möbel, rot", "caption": "red"},
    {"sku": "A", "link": "None", "name": "", "caption": "lost"},
    {"sku": "A", "link": "http://x/2.jpg", "name": "", "caption": ""},
    {"sku": "B", "link": "http://x/3.jpg", "name": 'a "b"\nc', "caption": None},
]


def table(path: Path) -> Path:
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist([{**row, "more": 1.5} for row in CELLS]), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in CELLS))
    else:
        with path.open("w", encoding="utf-16" if path.name.startswith("excel") else "utf-8", newline="") as file:
            delimiter = {".tsv": "\t", ".csv": ","}[path.suffix]
            rows = csv.DictWriter(file, list(CELLS[0]), delimiter=";" if path.name.startswith("excel") else delimiter)
            rows.writeheader()
            rows.writerows(CELLS)
    return path


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "excel.csv", "a.parquet", "a.jsonl"])
def test_tables_of_links(tmp_path: Path, name: str) -> None:
    first, second = read_items([table(tmp_path / name)], columns=COLUMNS)
    assert [(photo.n, photo.url, photo.description) for photo in first.photos] == [
        (0, "http://x/1.jpg", "red"),
        (2, "http://x/2.jpg", ""),
    ]
    assert (first.id, first.title, first.unlinked) == ("A", "Möbel, rot", 1)
    assert (second.id, second.title, second.images) == ("B", 'a "b"\nc', ("http://x/3.jpg",))


def test_links_without_ids_have_an_id_of_their_own(tmp_path: Path) -> None:
    path = links(
        tmp_path / "a.csv", b"url,caption\nhttp://x/1.jpg,one\nhttp://x/2.jpg,two\n,three\nhttp://x/1.jpg,four\n"
    )
    errors: list[BadRecord] = []
    items = list(read_items([path], errors.append, columns={"url": "url", "text": "caption"}))
    assert [item.images for item in items] == [("http://x/1.jpg",), ("http://x/2.jpg",), ("http://x/1.jpg",)]
    assert items[0].id == items[2].id == "3c53469bcda1eb0a" != items[1].id
    assert [(error.line, error.reason) for error in errors] == [(4, "no link")]


def test_a_list_of_links(tmp_path: Path) -> None:
    path = links(tmp_path / "a.txt.gz", gzip.compress(b"\xef\xbb\xbfhttp://x/1.jpg\r\n\r\ncaf\xe9\r\nhttp://x/2.jpg"))
    errors: list[BadRecord] = []
    items = list(read_items([path], errors.append, columns={"url": "url"}))
    assert [item.images for item in items] == [("http://x/1.jpg",), ("http://x/2.jpg",)]
    assert items[0].id == "3c53469bcda1eb0a" and [(error.line, error.reason) for error in errors] == [(3, "not UTF-8")]


def test_tables_that_are_not_what_was_named(tmp_path: Path) -> None:
    path = table(tmp_path / "a.csv")
    with pytest.raises(DataError, match=r"a\.csv: name the columns .* --columns url=URL; .*: sku, link, name, caption"):
        list(read_items([path]))
    with pytest.raises(DataError, match=r"no column `url` .--columns.; it has: sku, link, name, caption"):
        list(read_items([path], columns={"url": "url"}))
    with pytest.raises(DataError, match=r"no column `url` .--columns.; it has: sku, link"):
        list(read_items([table(tmp_path / "a.parquet")], columns={"url": "url"}))
    broken = links(tmp_path / "b.csv", b"url,id\nhttp://x/1.jpg,A,more\n\nhttp://x/2.jpg,caf\xe9\nhttp://x/3.jpg,C\n")
    errors: list[BadRecord] = []
    assert [item.id for item in read_items([broken], errors.append, columns={"url": "url", "id": "id"})] == ["C"]
    assert [(error.line, error.reason) for error in errors] == [
        (2, "3 fields where the header has 2"),
        (4, "not UTF-8"),
    ]


def test_a_list_of_links_in_a_column_is_several_photos(tmp_path: Path) -> None:
    rows = [{"id": "A", "url": ["http://x/1.jpg", None, "http://x/2.jpg"]}, {"id": "B", "url": []}]
    path = links(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    first, second = read_items([path], columns={"id": "id", "url": "url"})
    assert [(photo.n, photo.url) for photo in first.photos] == [(0, "http://x/1.jpg"), (2, "http://x/2.jpg")]
    assert (first.unlinked, second.unlinked, second.images) == (1, 1, ())


def test_texts_of_parquet_may_be_bytes(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"id": [b"A"], "url": [b"http://x/1.jpg"], "title": ["M\u00f6bel".encode()]})
    parquet.write_table(table, tmp_path / "a.parquet")
    (item,) = read_items([tmp_path / "a.parquet"], columns={"id": "id", "url": "url", "title": "title"})
    assert (item.id, item.images, item.title) == ("A", ("http://x/1.jpg",), "M\u00f6bel")


def test_a_list_in_a_column_of_texts_is_refused(tmp_path: Path) -> None:
    rows = [{"id": ["A"], "url": "http://x/0.jpg"}, {"id": "B", "url": ["http://x/1.jpg"]}, {"id": True, "url": "x"}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    errors: list[BadRecord] = []
    (item,) = read_items([path], errors.append, columns={"id": "id", "url": "url"})
    assert (item.id, item.images) == ("B", ("http://x/1.jpg",))
    assert [str(error).partition("a.jsonl:")[2] for error in errors] == [
        "1: `id`: a list where a text was expected",
        "3: `id`: a boolean where a text was expected",
    ]


def test_columns_that_leave_a_doubt(tmp_path: Path) -> None:
    path = links(tmp_path / "a.csv", b"url,id,url\nhttp://x/1.jpg,A,http://x/2.jpg\n")
    with pytest.raises(DataError, match=r"a\.csv: 2 columns are called `url`"):
        list(read_items([path], columns={"url": "url"}))
    path = links(tmp_path / "a.txt", b"http://x/1.jpg\n")
    for columns in ({}, {"url": "url", "id": "id"}):
        with pytest.raises(DataError, match=r"a\.txt: a list of links is read with --columns url=url"):
            list(read_items([path], columns=columns))
    path = links(tmp_path / "b.txt", json.dumps({"link": "http://x/1.jpg"}).encode())
    assert [item.images for item in read_items([path], columns={"url": "link"})] == [("http://x/1.jpg",)]


@pytest.mark.parametrize(
    ("value", "name"), [(None, "null"), ([], "a list"), ("x", "a text"), (7, "the number 7"), (True, "a boolean")]
)
def test_what_is_no_item_is_called_as_json_calls_it(tmp_path: Path, value: object, name: str) -> None:
    errors: list[BadRecord] = []
    path = links(tmp_path / "a.jsonl", json.dumps(value).encode())
    assert not list(read_items([path], errors.append))
    assert [error.reason for error in errors] == [f"{name} where an object with one item was expected"]
