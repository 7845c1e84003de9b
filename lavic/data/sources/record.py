"""One record of a catalogue's file, and what is wrong with one that cannot be read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lavic.storage.text_files import TextFileError


class BadRecord(TextFileError):
    """One record of a catalogue that cannot be read; what follows it can."""


OnError = Callable[[BadRecord], None]


@dataclass(frozen=True)
class Record:
    """One record of a file: where it is, its id where the file has it as a key, and its value."""

    file: str
    line: int
    """From 1; in a parquet file the row."""
    id: str | None
    value: Any


def report(error: BadRecord, errors: OnError | None) -> None:
    """Hand an error to whoever collects them, or raise it where nobody does."""
    if errors is None:
        raise error from None
    errors(error)
