"""Items of a catalogue, streamed from any of the forms it comes in.

The one JSON object of `item2meta_train.json` is read value by value with the standard library's decoder, not with
ijson: ijson gives no line to name a broken record by, and builds each value from events at a fraction of the speed.
"""

from __future__ import annotations

import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from lavic.data.place import options, storage_errors
from lavic.data.records import SIZES, ImageSize, Item, item_from_meta
from lavic.errors import DataError, first_line

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_CHUNK = 1 << 20
_LONGEST_LINE = 64 << 20
_SPACE_OR_COMMA = " \t\r\n,"
_DECODER = json.JSONDecoder()


class BadRecord(DataError):
    """One record of a catalogue that cannot be read."""

    def __init__(self, file: str, line: int, reason: str) -> None:
        """Name it.

        Args:
            file: As it was found.
            line: From 1; in a parquet file the row.
            reason: What is wrong with it.
        """
        super().__init__(f"{file}:{line}: {reason}")
        self.file, self.line, self.reason = file, line, reason


OnError = Callable[[BadRecord], None]


@dataclass(frozen=True)
class _Record:
    """One record of a file: where it stands, its id where the file has it as a key, and what it says."""

    file: str
    line: int
    id: str | None
    value: Any


def read_items(
    paths: Sequence[str | Path], errors: OnError | None = None, *, sizes: Sequence[ImageSize] = SIZES
) -> Iterator[Item]:
    """Read items in the order of the files, never holding more than one record and one chunk of text.

    Args:
        paths: Files, globs (sorted) and URIs that fsspec knows (`s3://...`), each one of: LaViC `item2meta_train.json`
            ({id: meta}), `item2meta_valid.jsonl`, Amazon Reviews 2023 `meta_*.jsonl`; any of these with `.gz` (`.bz2`,
            `.xz`, `.zst`); parquet.
        errors: Called with every record that cannot be read, which is then skipped; by default the first one is raised.
        sizes: Which link of a photo to take, the first that is there.

    Raises:
        DataError: A file is missing or, without `errors`, a record cannot be read; the message names file and line.
    """
    for path in find_files(paths):
        for record in _records(path, errors):
            try:
                if not isinstance(record.value, dict):
                    raise ValueError(f"{type(record.value).__name__} where a JSON object with one item was expected")
                yield item_from_meta(record.value, record.id, sizes)
            except ValueError as error:
                _report(BadRecord(record.file, record.line, str(error)), errors)


def find_files(paths: Sequence[str | Path]) -> list[str]:
    """The files that paths, globs and URIs stand for, in their order, each once.

    Raises:
        DataError: A path or glob has no file.
    """
    found: dict[str, None] = {}
    for path in map(str, paths):
        if not path.strip():
            raise DataError("an empty path among the catalogue files")
        if "://" in path or any(mark in path for mark in "*?["):
            files = _expand(path)
        else:
            files = [path] if Path(path).is_file() else []
        if not files:
            kind = "is a folder: name its files, as DIR/*.jsonl" if Path(path).is_dir() else "no such catalogue file"
            raise DataError(f"{path}: {kind}")
        found.update(dict.fromkeys(files))
    return list(found)


def _expand(path: str) -> list[str]:
    import fsspec

    try:
        fs, inner = fsspec.core.url_to_fs(path, **options(path))
        files = sorted(fs.glob(inner)) if any(mark in inner for mark in "*?[") else [inner] * fs.isfile(inner)
    except storage_errors(ImportError, ValueError) as error:
        raise DataError(f"{path}: cannot be opened ({first_line(error)})") from None
    return [fs.unstrip_protocol(file) if "://" in path else file for file in files]


def _records(path: str, errors: OnError | None) -> Iterator[_Record]:
    name = path
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    if name.endswith(".parquet"):
        yield from _parquet(path)
    elif name.endswith(".json"):
        yield from _one_json(path, errors)
    else:
        with _opened(path) as file:
            yield from _lines(path, file, errors)


@contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    """Open a file's bytes, unpacked."""
    import fsspec

    try:
        # The reader around it knows how to stop in the middle of a line; that of an object store does not.
        opened = fsspec.open(path, "rb", compression="infer", **options(path))
        with opened as file, io.BufferedReader(file, _CHUNK) as reader:
            yield reader
    except storage_errors(EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path}: cannot be read to its end ({first_line(error)})") from None


@contextmanager
def _text(path: str) -> Iterator[TextIO]:
    """Open a file as text, unpacked; broken UTF-8 is kept as surrogates, which become question marks."""
    with _opened(path) as file, io.TextIOWrapper(file, "utf-8", errors="surrogateescape", newline="\n") as text:
        yield text


def _lines(path: str, file: BinaryIO, errors: OnError | None) -> Iterator[_Record]:
    number = 0
    while line := file.readline(_LONGEST_LINE):
        number += 1
        if len(line) >= _LONGEST_LINE and not line.endswith(b"\n"):
            _report(BadRecord(path, number, f"a line of more than {_LONGEST_LINE >> 20} MiB"), errors)
            while line and not line.endswith(b"\n"):
                line = file.readline(_LONGEST_LINE)
        elif line.strip():
            try:
                yield _Record(path, number, None, json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8")))
            except (ValueError, RecursionError) as error:
                _report(BadRecord(path, number, f"not JSON ({_reason(error)})"), errors)


def _one_json(path: str, errors: OnError | None) -> Iterator[_Record]:
    """One JSON value: {id: meta}, [meta, ...], or one object after another (jsonl under another name)."""
    with _text(path) as file:
        text = _Scanner(path, file)
        first = text.peek()
        if first == "{" and text.is_keyed():
            yield from _members(text)
        elif first == "[":
            text.skip("[")
            while text.peek() not in ("]", ""):
                yield text.value(None)
        elif first:
            with _opened(path) as again:
                yield from _lines(path, again, errors)


def _members(text: _Scanner) -> Iterator[_Record]:
    text.skip("{")
    while text.peek() not in ("}", ""):
        id = text.value(None).value
        text.skip(":")
        yield text.value(id)


class _Scanner:
    """Reads JSON values one by one from a file that may be larger than memory."""

    def __init__(self, path: str, file: TextIO) -> None:
        self._path, self._file = path, file
        self._buffer, self._at, self._line, self._ended = "", 0, 1, False

    def peek(self) -> str:
        """The next character that is not a blank or a comma; empty at the end of the file."""
        while True:
            while self._at < len(self._buffer) and self._buffer[self._at] in _SPACE_OR_COMMA:
                self._line += self._buffer[self._at] == "\n"
                self._at += 1
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            if not self._more():
                return ""

    def skip(self, mark: str) -> None:
        """Step over one character that must come next."""
        if self.peek() != mark:
            raise BadRecord(self._path, self._line, f"not JSON (expected {mark!r}, found {self.peek()!r})")
        self._at += 1

    def value(self, id: str | None) -> _Record:
        """The next value, whole; DataError where the file breaks, as what follows cannot be told apart any more."""
        self.peek()
        line = self._line
        while True:
            try:
                value, end = _DECODER.raw_decode(self._buffer, self._at)
                # A number may go on in the next chunk; other values end by themselves.
                if end < len(self._buffer) or self._ended or not isinstance(value, (int, float)):
                    break
            except json.JSONDecodeError as error:
                # A broken value never ends: without a limit the rest of the file would be held.
                if self._ended or len(self._buffer) - self._at > _LONGEST_LINE:
                    reason = f"not JSON ({error.msg}); what follows it cannot be told apart"
                    raise BadRecord(self._path, line, reason) from None
            self._more()
        self._line += self._buffer.count("\n", self._at, end)
        self._at = end
        return _Record(self._path, line, id, value)

    def is_keyed(self) -> bool:
        """Whether the object that comes next maps ids to objects, rather than being one item itself."""
        for _ in range(2):
            self._more()
        rest = self._buffer[self._at + 1 :].lstrip()
        try:
            _, end = _DECODER.raw_decode(rest)
        except json.JSONDecodeError:
            return True
        return rest[end:].lstrip().removeprefix(":").lstrip().startswith("{")

    def _more(self) -> bool:
        # Doubling with the unread rest keeps one huge value linear.
        rest = self._buffer[self._at :]
        chunk = self._file.read(max(_CHUNK, len(rest)))
        self._buffer, self._at, self._ended = rest + chunk, 0, not chunk
        return bool(chunk)


def _parquet(path: str) -> Iterator[_Record]:
    import fsspec

    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise DataError(f"{path}: reading parquet needs pyarrow; install it with: pip install 'lavic[crawl]'") from None
    number = 1
    try:
        with fsspec.open(path, "rb", **options(path)) as file:
            for batch in parquet.ParquetFile(file).iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    yield _Record(path, number, None, row)
                    number += 1
    except storage_errors(ArrowException) as error:
        raise DataError(f"{path}: not a parquet file that can be read ({first_line(error)})") from None


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    if isinstance(error, RecursionError):
        return "nested too deep"
    return "not UTF-8" if isinstance(error, UnicodeError) else str(error)


def _report(error: BadRecord, errors: OnError | None) -> None:
    if errors is None:
        raise error from None
    errors(error)
