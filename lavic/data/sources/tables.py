"""Records of tables: csv and tsv with a header, parquet; and items from rows with links."""

from __future__ import annotations

import hashlib
import io
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from lavic.data.schema import NO_TEXT, Item, as_link, as_text
from lavic.data.sources.delimited_rows import delimited_rows
from lavic.data.sources.record import BadRecord, OnError, Record, is_utf8, report
from lavic.errors import DataError, first_line
from lavic.storage.json_text import json_type
from lavic.storage.paths import options, storage_errors
from lavic.storage.text_files import TextFile, raw_lines

COLUMNS = ("id", "url", "title", "text")
"""Fields that a column may be assigned to; `url` is required."""

CSV, LIST, PARQUET = (".csv", ".tsv"), (".txt",), (".parquet", ".parq", ".pq")
"""Suffixes of file names."""


def csv_records(path: str, file: TextFile, errors: OnError | None, columns: Sequence[str]) -> Iterator[Record]:
    """The rows of a csv or tsv file; the header decides between commas, semicolons and tabs.

    Raises:
        DataError: A column is missing, or none was named.
    """
    text = io.TextIOWrapper(file, "utf-8", errors="surrogateescape", newline="")
    first = text.readline()
    delimiter = max(",;\t", key=first.count)
    rows = delimited_rows(itertools.chain([first], text), delimiter)
    _, header = next(rows, (1, []))
    _check_columns(path, header, columns)
    for line, row in rows:
        if len(row) != len(header):
            report(BadRecord(path, line, f"{len(row)} fields where the header has {len(header)}"), errors)
        elif not all(map(is_utf8, row)):
            report(BadRecord(path, line, "not UTF-8"), errors)
        else:
            yield Record(path, line, None, dict(zip(header, row, strict=True)))


def link_records(path: str, file: TextFile, errors: OnError | None, column: str) -> Iterator[Record]:
    """The lines of a list of links, as rows with a single column."""
    for number, line in raw_lines(file):
        try:
            link = (line or b"").decode().strip()
        except UnicodeDecodeError:
            report(BadRecord(path, number, "not UTF-8"), errors)
            continue
        if link:
            yield Record(path, number, None, {column: link})


def parquet_records(path: str, errors: OnError | None, columns: Sequence[str]) -> Iterator[Record]:
    """The rows of a parquet file, with the named columns or all.

    Raises:
        DataError: The file cannot be read.
    """
    import fsspec

    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise DataError(f"{path}: reading parquet needs pyarrow; install it with: pip install 'lavic[crawl]'") from None
    number = 1
    try:
        with fsspec.open(path, "rb", **options(path)) as file:
            table = parquet.ParquetFile(file)
            if columns:
                _check_columns(path, table.schema_arrow.names, columns)
            for batch in table.iter_batches(batch_size=1024, columns=list(columns) or None):
                for n, row in enumerate(_rows(batch), number):
                    if isinstance(row, Exception):
                        report(BadRecord(path, n, f"a value that cannot be read ({first_line(row)})"), errors)
                    else:
                        yield Record(path, n, None, row)
                number += batch.num_rows
    except storage_errors(ArrowException) as error:
        raise DataError(f"{path}: cannot be read as parquet ({first_line(error)})") from None


def _rows(batch: Any) -> list[dict[str, Any] | Exception]:
    """The rows of a batch; the error in place of one with a value that Python cannot represent.

    That may be a text that is not UTF-8, which parquet files do not check, or a date beyond the year 9999.
    """
    try:
        return list(batch.to_pylist())
    except (ValueError, OverflowError) as error:
        if batch.num_rows == 1:
            return [error]
    return [row for n in range(batch.num_rows) for row in _rows(batch.slice(n, 1))]


def items_of_links(records: Iterable[Record], columns: Mapping[str, str], errors: OnError | None) -> Iterator[Item]:
    """Items of a table with a link in each row.

    Adjacent rows with the same id are one item, and so are the links of a row that has a list of them. Without a column
    of ids each link is an item, and its id is a hash of the link. `columns` has the column of each field of `COLUMNS`;
    `errors` is called with each row that has no id, or a list where a text is expected.
    """
    item_id = ""
    rows: list[dict[str, Any]] = []
    texts = [name for field, name in columns.items() if field != "url"]
    for record in records:
        row = record.value
        if not isinstance(row, dict) or columns["url"] not in row:
            names = ", ".join(map(str, row)) if isinstance(row, dict) else json_type(row)
            report(BadRecord(record.file, record.line, f"no column `{columns['url']}`, it has: {names}"), errors)
            continue
        if wrong := [name for name in texts if isinstance(row.get(name), NO_TEXT)]:
            reason = f"`{wrong[0]}`: {json_type(row[wrong[0]])} where a text was expected"
            report(BadRecord(record.file, record.line, reason), errors)
            continue
        cell = row[columns["url"]]
        for url in map(as_link, (cell or [None]) if isinstance(cell, list) else [cell]):
            id = as_text(row.get(columns["id"])) if "id" in columns else _id_of(url)
            if not id:
                reason = f"no id in the column `{columns['id']}`" if "id" in columns else "no link"
                report(BadRecord(record.file, record.line, reason), errors)
                continue
            if rows and (id != item_id or "id" not in columns):
                yield _item(item_id, rows, columns)
                rows = []
            item_id = id
            rows.append({**row, columns["url"]: url})
    if rows:
        yield _item(item_id, rows, columns)


def _item(id: str, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> Item:
    linked = [(n, row) for n, row in enumerate(rows) if row[columns["url"]]]

    def cell(row: Mapping[str, Any], field: str) -> str:
        return as_text(row.get(columns[field])) if field in columns else ""

    return Item(
        id=id,
        title=next((title for row in rows if (title := cell(row, "title"))), ""),
        images=tuple(row[columns["url"]] for _, row in linked),
        numbers=tuple(n for n, _ in linked),
        descriptions={f"{id}_{n}.jpg": text for n, row in linked if (text := cell(row, "text"))},
        unlinked=len(rows) - len(linked),
    )


def _id_of(url: str) -> str:
    return hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()[:16] if url else ""


def _check_columns(path: str, header: list[str], columns: Sequence[str]) -> None:
    column_names = ", ".join(header[:12]) + (", ..." if len(header) > 12 else "") or "none"
    if not columns:
        raise DataError(
            f"{path}: name the columns with the links, as --columns url=URL; it has the columns: {column_names}"
        )
    if missing := [name for name in columns if name not in header]:
        raise DataError(f"{path}: no column `{missing[0]}` (--columns); it has: {column_names}")
    if repeated := [name for name in columns if header.count(name) > 1]:
        raise DataError(f"{path}: {header.count(repeated[0])} columns are called `{repeated[0]}` (--columns)")
