"""Rows of csv and tsv files, also of files whose quotation marks are text.

A field in quotation marks may hold delimiters and line ends. Marks within it are doubled (RFC 4180, pandas, Excel) or
follow a backslash (Spark, MySQL). But many programs write tsv without quoting: a mark that begins a field is text
there, and as the start of a quoted field it would swallow all rows up to the next mark. So a row that is not quoted
correctly is read again as a single line of text.
"""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from lavic.storage.text_files import MAX_LINE_BYTES

_QUOTING: tuple[dict[str, Any], ...] = ({}, {"escapechar": "\\"})


def delimited_rows(lines: Iterable[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The number of the first line, from 1, and the cells of each row that is not blank; the first is the header."""
    csv.field_size_limit(MAX_LINE_BYTES)
    source = _Lines(lines)
    readers = [csv.reader(source, delimiter=delimiter, strict=True, **quoting) for quoting in _QUOTING]
    width = 0
    for line in source:
        if text := line.rstrip("\r\n"):
            row = _quoted_row(source, readers, delimiter, width) if '"' in text else text.split(delimiter)
            width = width or len(row)
            yield source.number, row
        source.end_row()


class _Lines(Iterator[str]):
    """Lines, of which those of the current row can be read again."""

    def __init__(self, lines: Iterable[str]) -> None:
        self._lines = iter(lines)
        self._again: deque[str] = deque()
        self.number = 1
        """Number of the row's first line."""
        self.of_row: list[str] = []

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else next(self._lines)
        self.of_row.append(line)
        return line

    def restart_row(self) -> None:
        """Lets the lines of the row be read again."""
        self._again.extendleft(reversed(self.of_row))
        self.of_row.clear()

    def end_row(self) -> None:
        self.number += len(self.of_row)
        self.of_row.clear()


def _quoted_row(source: _Lines, readers: Iterable[Iterator[list[str]]], delimiter: str, width: int) -> list[str]:
    """The row whose first line was read last; `width` is the number of cells of the header, 0 for the header."""
    for reader in readers:
        source.restart_row()
        try:
            row = next(reader)
        except csv.Error:
            continue
        if delimiter != "\t" or not _swallows_rows(row, source.of_row, width):
            return row
    source.restart_row()
    return next(source).rstrip("\r\n").split(delimiter)


def _swallows_rows(row: list[str], lines: list[str], width: int) -> bool:
    """Whether what seems to be a quoted field of a tsv file is several rows: each of its lines is one by itself.

    In csv files, texts have commas too often to tell that.
    """
    if len(lines) < 2 or width < 2 or any(line.count("\t") + 1 != width for line in lines):
        return False
    return len(row) != width or any("\t" in cell and ("\n" in cell or "\r" in cell) for cell in row)
