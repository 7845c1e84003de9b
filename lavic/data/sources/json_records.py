"""Records of JSON files: one per line, concatenated, in a list, or in an object by id.

The JSON object of `item2meta_train.json` is read value by value with the standard library's decoder, not with ijson,
which reports no line for a broken record and is several times slower.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Literal, TextIO

from lavic.data.schema import ITEM_KEYS
from lavic.data.sources.record import BadRecord, OnError, Record, is_utf8, report
from lavic.storage import text_files
from lavic.storage.json_text import BadJson, json_error, parse_first, parse_json, value_end
from lavic.storage.text_files import TextFile, TextFileError, raw_lines

Form = Literal["lines", "values", "list", "keyed"]

_CHUNK = 1 << 20
_LOST = "the records after it cannot be found: is the file cut off? Download it again, or correct it"
_SPACE_OR_COMMA = " \t\r\n,\ufeff"
"""Between records; a byte order mark is there in files that were concatenated."""


def json_records(
    path: str, file: TextFile, errors: OnError | None, *, is_json: bool = True, keyed: bool = True
) -> Iterator[Record]:
    """The records of a JSON file in any form.

    Args:
        path: Of the file, for messages.
        file: At its start.
        errors: Called with each record that cannot be read.
        is_json: Whether the file is named `.json`: a single JSON value; decides if the content is ambiguous.
        keyed: Whether an object may contain the records by id.

    Raises:
        TextFileError: The file is broken and the next record cannot be found.
    """
    form = form_of(file.peek().decode("utf-8", "replace"), is_json)
    if form == "lines" or (form == "keyed" and not keyed):
        yield from _lines(path, file, errors)
        return
    # Broken UTF-8 is kept as surrogates until the record that holds it is known.
    text = _Scanner(path, io.TextIOWrapper(file, "utf-8", errors="surrogateescape", newline="\n"))
    # Files may be concatenated: there may be another list, or another object, behind the first.
    while mark := text.peek():
        if form == "keyed":
            text.skip("{")
            yield from _members(text, errors)
            text.skip("}")
        elif form == "list" and mark == "[":
            text.skip("[")
            yield from _values(text, "]", errors)
            text.skip("]")
        else:
            yield from _values(text, "[" if form == "list" else "", errors)


def form_of(sample: str, is_json: bool) -> Form:
    """The form of the records of a file that begins with a few thousand characters; `is_json` as in `json_records`."""
    text = sample.lstrip()
    if text.startswith("["):
        inner = text[1:].lstrip()
        return "list" if is_json or inner[:1] in ("", "{") else "lines"
    if not text.startswith("{"):
        return "lines"
    if _is_keyed(text, is_json):
        return "keyed"
    # A first line that is only the bracket: an indented object.
    return "values" if text.partition("\n")[0].strip() == "{" else "lines"


def _is_keyed(text: str, is_json: bool) -> bool:
    """Whether an object maps ids to items, judged by its keys and values; otherwise it is an item."""
    kinds: set[str] = set()
    start = 1
    while (start := _after_space(text, start)) < len(text) and text[start] != "}":
        end = value_end(text, start) if text[start] == '"' else None
        if end is None:
            # The sample ends within a key, or a key is not valid JSON.
            return text[start] == '"' and "{" in kinds
        colon = _after_space(text, end)
        if text[start + 1 : end - 1] in ITEM_KEYS or text[colon : colon + 1] not in (":", ""):
            return False
        value = _after_space(text, colon + 1)
        kinds.add(text[value : value + 1])
        if value >= len(text) or (end := value_end(text, value)) is None:
            break
        start = end
    return "{" in kinds or (kinds <= {"n", ""} and (is_json or bool(kinds)))


def _after_space(text: str, start: int) -> int:
    while start < len(text) and text[start] in _SPACE_OR_COMMA:
        start += 1
    return start


def _lines(path: str, file: TextFile, errors: OnError | None) -> Iterator[Record]:
    for number, line in raw_lines(file, text_files.MAX_LINE_BYTES):
        if line is None:
            report(BadRecord(path, number, f"a line of more than {text_files.MAX_LINE_BYTES >> 20} MiB"), errors)
        elif line.strip():
            try:
                yield Record(path, number, None, parse_json(line.decode().lstrip("\ufeff")))
            except UnicodeDecodeError:
                report(BadRecord(path, number, "not JSON (not UTF-8)"), errors)
            except BadJson as error:
                report(BadRecord(path, number, f"not JSON ({error})"), errors)


def _values(text: _Scanner, end: str, errors: OnError | None) -> Iterator[Record]:
    """Records up to a character, or to the end of the file."""
    while text.peek() not in (end, ""):
        try:
            yield text.value(None)
        except BadRecord as error:
            report(error, errors)


def _members(text: _Scanner, errors: OnError | None) -> Iterator[Record]:
    while text.peek() not in ("}", ""):
        try:
            id: str | None = text.value(None).value
        except BadRecord as error:
            report(error, errors)
            id = None
        text.skip(":")
        try:
            record = text.value(id)
        except BadRecord as error:
            report(error, errors)
            continue
        if id is not None:
            yield record


class _Scanner:
    """Reads JSON values, one at a time, from a file that may be larger than memory."""

    def __init__(self, path: str, file: TextIO) -> None:
        self._path, self._file = path, file
        self._buffer, self._at, self._line, self._ended = "", 0, 1, False
        self._clean = True

    def peek(self) -> str:
        """The next character that is not a blank or a comma; empty at the end of the file."""
        while True:
            while self._at < len(self._buffer) and self._buffer[self._at] in _SPACE_OR_COMMA:
                self._line += self._buffer[self._at] == "\n"
                self._at += 1
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            if not self._read_chunk():
                return ""

    def skip(self, mark: str) -> None:
        """Skips one character, which must be `mark`."""
        if self.peek() != mark:
            actual = repr(self.peek()) if self.peek() else "the end of the file"
            raise TextFileError(self._path, self._line, f"not JSON (expected {mark!r}, found {actual})")
        self._at += 1

    def value(self, id: str | None) -> Record:
        """The next value.

        Raises:
            BadRecord: It cannot be read; the next one can.
            TextFileError: The file is broken, and the next value cannot be found.
        """
        self.peek()
        line = self._line
        while True:
            reason = ""
            try:
                value, end = parse_first(self._buffer, self._at)
                # A number may continue in the next chunk; other values have an end of their own.
                if end < len(self._buffer) or self._ended or not isinstance(value, (int, float)):
                    break
            except json.JSONDecodeError as error:
                reason = json_error(error, self._buffer[self._at : self._at + 100]).partition(" at column")[0]
            except BadJson as error:
                if (skipped := value_end(self._buffer, self._at)) is not None:
                    self._step(skipped)
                    raise BadRecord(self._path, line, f"not JSON ({error})") from None
                reason = str(error)
            # A broken value has no end: without a limit, the rest of the file would be read into memory.
            if reason and (self._ended or len(self._buffer) - self._at > text_files.MAX_LINE_BYTES):
                raise TextFileError(self._path, line, f"not JSON ({reason}); {_LOST}")
            self._read_chunk()
        text = "" if self._clean else self._buffer[self._at : end]
        self._step(end)
        if not is_utf8(text):
            raise BadRecord(self._path, line, "not JSON (not UTF-8)")
        return Record(self._path, line, id, value)

    def _step(self, end: int) -> None:
        self._line += self._buffer.count("\n", self._at, end)
        self._at = end

    def _read_chunk(self) -> bool:
        # Doubling the buffer reads a huge value in linear time.
        unread = self._buffer[self._at :]
        chunk = self._file.read(max(_CHUNK, len(unread)))
        self._clean = self._clean and is_utf8(chunk)
        self._buffer, self._at, self._ended = unread + chunk, 0, not chunk
        return bool(chunk)
