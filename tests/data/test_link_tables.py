"""Tables and lists of photo links: CSV, TSV, parquet, JSON lines and text, with named columns."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lavic.data.catalog import read_items
from lavic.data.sources.delimited_rows import delimited_rows
from lavic.data.sources.record import BadRecord
from lavic.errors import DataError
from tests.data.catalogue_files import write_bytes

COLUMNS = {"id": "sku", "url": "link", "title": "name", "text": "caption"}


LINK_ROWS = [
    {"sku": "A", "link": "http://x/1.jpg", "name": "Möbel, rot", "caption": "red"},
    {"sku": "A", "link": "None", "name": "", "caption": "lost"},
    {"sku": "A", "link": "http://x/2.jpg", "name": "", "caption": ""},
    {"sku": "B", "link": "http://x/3.jpg", "name": 'a "b"\nc', "caption": None},
]


def write_table(path: Path) -> Path:
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist([{**row, "more": 1.5} for row in LINK_ROWS]), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in LINK_ROWS))
    else:
        with path.open("w", encoding="utf-16" if path.name.startswith("excel") else "utf-8", newline="") as file:
            delimiter = {".tsv": "\t", ".csv": ","}[path.suffix]
            rows = csv.DictWriter(
                file, list(LINK_ROWS[0]), delimiter=";" if path.name.startswith("excel") else delimiter
            )
            rows.writeheader()
            rows.writerows(LINK_ROWS)
    return path


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "excel.csv", "a.parquet", "a.jsonl"])
def test_tables_of_links(tmp_path: Path, name: str) -> None:
    first, second = read_items([write_table(tmp_path / name)], columns=COLUMNS)
    assert [(photo.n, photo.url, photo.description) for photo in first.photos] == [
        (0, "http://x/1.jpg", "red"),
        (2, "http://x/2.jpg", ""),
    ]
    assert (first.id, first.title, first.unlinked) == ("A", "Möbel, rot", 1)
    assert (second.id, second.title, second.images) == ("B", 'a "b"\nc', ("http://x/3.jpg",))


FIVE = [f"B{n}\thttp://x/{n}.jpg\tMug {n}" for n in range(5)]
QUOTES = {
    "open": ['"The best mug', "Mug 1"],
    "open, and an inch behind it": ['"The best mug', '12"'],
    "open, and a word behind it": ['"The best mug', 'a "mug"'],
    "twice open": ['"The best mug', '"Mug'],
    "word": ['"Cute" mug', "Mug 1"],
    "inch": ['12" mug', 'mug of 6"'],
}


@pytest.mark.parametrize(
    ("name", "delimiter"),
    # With commas, that one is a quoted text of two lines.
    [(name, mark) for name in QUOTES for mark in "\t,;" if mark == "\t" or name != "open, and an inch behind it"],
)
def test_quotation_marks_of_a_text_swallow_no_rows(tmp_path: Path, name: str, delimiter: str) -> None:
    rows = list(FIVE)
    rows[1:3] = [f"B{n}\thttp://x/{n}.jpg\t{title}" for n, title in enumerate(QUOTES[name], 1)]
    text = "\n".join(["sku\tlink\tname", *rows]).replace("\t", delimiter)
    path = write_bytes(tmp_path / "a.csv", text.encode())
    items = list(read_items([path], columns={"id": "sku", "url": "link", "title": "name"}))
    assert [(item.id, item.images) for item in items] == [(f"B{n}", (f"http://x/{n}.jpg",)) for n in range(5)]
    assert [item.title for item in items[1:3]] == QUOTES[name]


def test_rows_that_are_not_quoted_correctly_are_rejected_alone(tmp_path: Path) -> None:
    text = 'sku,link,name\nB0,http://x/0.jpg,"a" mug, red\nB1,http://x/1.jpg,"6\\" mug"\nB2,http://x/2.jpg,"a\nb"\n'
    errors: list[BadRecord] = []
    path = write_bytes(tmp_path / "a.csv", text.encode())
    items = list(read_items([path], errors.append, columns={"id": "sku", "url": "link", "title": "name"}))
    assert [(error.line, error.reason) for error in errors] == [(2, "4 fields where the header has 3")]
    assert [(item.id, item.title) for item in items] == [("B1", '6" mug'), ("B2", "a\nb")]


CELLS = st.text(st.sampled_from('ab",;\n\r\\ é\u2028'), max_size=5)


@given(
    rows=st.lists(st.lists(CELLS, min_size=3, max_size=3), max_size=5),
    delimiter=st.sampled_from(",;\t"),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_what_csv_writers_write_is_read(rows: list[list[str]], delimiter: str, quoting: Literal[0, 1]) -> None:
    file = io.StringIO(newline="")
    rows = [["sku", "link", "name"], *rows]
    csv.writer(file, delimiter=delimiter, quoting=quoting).writerows(rows)
    file.seek(0)
    assert [row for _, row in delimited_rows(file, delimiter)] == rows


def test_links_without_ids_get_an_id_from_the_url(tmp_path: Path) -> None:
    path = write_bytes(
        tmp_path / "a.csv", b"url,caption\nhttp://x/1.jpg,one\nhttp://x/2.jpg,two\n,three\nhttp://x/1.jpg,four\n"
    )
    errors: list[BadRecord] = []
    items = list(read_items([path], errors.append, columns={"url": "url", "text": "caption"}))
    assert [item.images for item in items] == [("http://x/1.jpg",), ("http://x/2.jpg",), ("http://x/1.jpg",)]
    assert items[0].id == items[2].id == "3c53469bcda1eb0a" != items[1].id
    assert [(error.line, error.reason) for error in errors] == [(4, "no link")]


def test_a_list_of_links(tmp_path: Path) -> None:
    path = write_bytes(
        tmp_path / "a.txt.gz", gzip.compress(b"\xef\xbb\xbfhttp://x/1.jpg\r\n\r\ncaf\xe9\r\nhttp://x/2.jpg")
    )
    errors: list[BadRecord] = []
    items = list(read_items([path], errors.append, columns={"url": "url"}))
    assert [item.images for item in items] == [("http://x/1.jpg",), ("http://x/2.jpg",)]
    assert items[0].id == "3c53469bcda1eb0a" and [(error.line, error.reason) for error in errors] == [(3, "not UTF-8")]


def test_missing_columns_and_broken_rows_are_named(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.csv")
    with pytest.raises(DataError, match=r"a\.csv: name the columns .* --columns url=URL; .*: sku, link, name, caption"):
        list(read_items([path]))
    with pytest.raises(DataError, match=r"no column `url` .--columns.; it has: sku, link, name, caption"):
        list(read_items([path], columns={"url": "url"}))
    with pytest.raises(DataError, match=r"no column `url` .--columns.; it has: sku, link"):
        list(read_items([write_table(tmp_path / "a.parquet")], columns={"url": "url"}))
    broken = write_bytes(
        tmp_path / "b.csv", b"url,id\nhttp://x/1.jpg,A,more\n\nhttp://x/2.jpg,caf\xe9\nhttp://x/3.jpg,C\n"
    )
    errors: list[BadRecord] = []
    assert [item.id for item in read_items([broken], errors.append, columns={"url": "url", "id": "id"})] == ["C"]
    assert [(error.line, error.reason) for error in errors] == [
        (2, "3 fields where the header has 2"),
        (4, "not UTF-8"),
    ]


def test_a_list_of_links_in_a_column_is_several_photos(tmp_path: Path) -> None:
    rows = [{"id": "A", "url": ["http://x/1.jpg", None, "http://x/2.jpg"]}, {"id": "B", "url": []}]
    path = write_bytes(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    first, second = read_items([path], columns={"id": "id", "url": "url"})
    assert [(photo.n, photo.url) for photo in first.photos] == [(0, "http://x/1.jpg"), (2, "http://x/2.jpg")]
    assert (first.unlinked, second.unlinked, second.images) == (1, 1, ())


def test_parquet_text_columns_may_be_bytes(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"id": [b"A"], "url": [b"http://x/1.jpg"], "title": ["M\u00f6bel".encode()]})
    parquet.write_table(table, tmp_path / "a.parquet")
    (item,) = read_items([tmp_path / "a.parquet"], columns={"id": "id", "url": "url", "title": "title"})
    assert (item.id, item.images, item.title) == ("A", ("http://x/1.jpg",), "M\u00f6bel")


def test_a_parquet_row_that_python_cannot_represent_is_rejected_alone(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    count = 1500  # more than a batch
    ends = pyarrow.py_buffer(b"".join((4 * (n > 1100)).to_bytes(4, "little") for n in range(count + 1)))
    titles = pyarrow.Array.from_buffers(pyarrow.string(), count, [None, ends, pyarrow.py_buffer(b"caf\xe9")])
    days = pyarrow.array([2**30 if n == 7 else 1 for n in range(count)], pyarrow.date32())
    images = [[{"large": f"http://x/{n}.jpg"}] for n in range(count)]
    table = {"parent_asin": [f"B{n}" for n in range(count)], "title": titles, "images": images, "day": days}
    parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    errors: list[BadRecord] = []
    items = list(read_items([tmp_path / "a.parquet"], errors.append))
    assert [item.id for item in items] == [f"B{n}" for n in range(count) if n not in (7, 1100)]
    assert [error.line for error in errors] == [8, 1101] and "utf-8" in errors[1].reason
    with pytest.raises(DataError, match=r"a\.parquet:8: a value that cannot be read"):
        list(read_items([tmp_path / "a.parquet"]))


def test_a_list_in_a_text_column_is_rejected(tmp_path: Path) -> None:
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


def test_ambiguous_columns_are_refused(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "a.csv", b"url,id,url\nhttp://x/1.jpg,A,http://x/2.jpg\n")
    with pytest.raises(DataError, match=r"a\.csv: 2 columns are called `url`"):
        list(read_items([path], columns={"url": "url"}))
    path = write_bytes(tmp_path / "a.txt", b"http://x/1.jpg\n")
    for columns in ({}, {"url": "url", "id": "id"}):
        with pytest.raises(DataError, match=r"a\.txt: a list of links is read with --columns url=url"):
            list(read_items([path], columns=columns))
    path = write_bytes(tmp_path / "b.txt", json.dumps({"link": "http://x/1.jpg"}).encode())
    assert [item.images for item in read_items([path], columns={"url": "link"})] == [("http://x/1.jpg",)]
