"""A record of a catalogue's file, and the error for one that cannot be read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lavic.storage.text_files import TextFileError


class BadRecord(TextFileError):
    """A record that cannot be read; the records after it can."""


OnError = Callable[[BadRecord], None]


@dataclass(frozen=True)
class Record:
    """One record of a file: its position, its id if that is a key in the file, and its value."""

    file: str
    line: int
    """From 1; the row in a parquet file."""
    id: str | None
    value: Any


def report(error: BadRecord, errors: OnError | None) -> None:
    """Calls `errors` with an error, or raises it without such a function."""
    if errors is None:
        raise error from None
    errors(error)


def is_utf8(text: str) -> bool:
    """Whether a text has no surrogates, which represent bytes that are not UTF-8."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
