"""A shard's descriptions, read one at a time; only the positions of their lines are in memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from lavic.data.descriptions import descriptions_path, is_of_photo, parse_description
from lavic.errors import DataError, first_line
from lavic.storage.atomic import atomic_open
from lavic.storage.cache.open_files import FILES, OpenFile
from lavic.storage.index.shared import shared_file
from lavic.storage.index.text_hash import hash_text, hash_texts
from lavic.storage.paths import is_remote, storage_errors

_BLOCK = 8 << 20


class Sidecar:
    """The descriptions beside one shard.

    `lavic describe` writes a line for each sample, in their order, so line n is that of sample n; the key is compared.
    If it differs, because the shard was packed again or the file edited, the keys of all lines are read once.
    """

    def __init__(self, shard: Path, owner: object) -> None:
        """Finds the lines; `owner` is that of the open file, see `OpenFiles.drop`. Raises DataError as `text`."""
        self._path, self._owner = descriptions_path(shard), owner
        self._stamp: Any = None
        self._ends = np.empty(0, "<u8")
        self._by_key: tuple[np.ndarray, np.ndarray] | None = None
        self._file()

    def text(self, row: int, meta: Mapping[str, Any], default: str) -> str:
        """The description of the sample with this json member, at a row of the shard; `default` if it has none.

        Raises:
            DataError: The file cannot be read, or the line is not a description.
        """
        file = self._file() if self._stamp else None  # a file that was missing at first is not looked for again
        if file is None:
            return default
        line = self._line(file, row) if row < len(self._ends) else None
        if line is None or line["key"] != meta["key"]:
            line = self._search(file, meta["key"])
        return line["text"] if line and is_of_photo(line, meta["source_sha256"]) else default

    def _file(self) -> OpenFile | None:
        """The open file, with its lines located; None if it does not exist."""
        try:
            file = FILES.get((self._owner, str(self._path)), lambda: _local_copy(self._path))
            if file.stamp != self._stamp:
                self._stamp, self._by_key = file.stamp, None
                self._ends = _line_ends(file)
            return file
        except FileNotFoundError:
            return None
        except storage_errors() as error:
            raise DataError(f"{self._path}: cannot be read ({first_line(error)})") from None

    def _line(self, file: OpenFile, number: int) -> dict[str, str]:
        start = int(self._ends[number - 1]) + 1 if number else 0
        return parse_description(file.read(start, int(self._ends[number])), self._path, number + 1)

    def _search(self, file: OpenFile, key: str) -> dict[str, str] | None:
        """The last line with a key, or None."""
        if self._by_key is None:
            keys = [self._line(file, number)["key"] for number in range(len(self._ends))]
            hashes = hash_texts(keys)[:, 0]
            order = np.argsort(hashes, kind="stable")
            self._by_key = hashes[order], order
        hashes, lines = self._by_key
        first, last = (np.searchsorted(hashes, hash_text(key), side=side) for side in ("left", "right"))
        for number in reversed(lines[first:last]):
            line = self._line(file, int(number))
            if line["key"] == key:
                return line
        return None


def _line_ends(file: OpenFile) -> np.ndarray:
    """Offset of the end of each line of a file: uint64 [lines]"""
    parts = [np.empty(0, "<u8")]
    for start in range(0, file.size, _BLOCK):
        block = file.read(start, start + _BLOCK)
        parts.append((np.flatnonzero(np.frombuffer(block, "u1") == ord("\n")) + start).astype("<u8"))
    if file.size and file.read(file.size - 1, file.size) != b"\n":
        parts.append(np.array([file.size], "<u8"))
    return np.concatenate(parts)


def _local_copy(path: Path) -> Path:
    """A local file, or the copy of a remote one in the cache folder."""
    if not is_remote(path):
        return path
    store = cast(Any, path)
    info = store.fs.info(store.path)
    source = hashlib.sha256(json.dumps(info, sort_keys=True, default=str).encode()).hexdigest()

    def copy(target: Path) -> None:
        with atomic_open(target, durable=False) as file:
            file.write(path.read_bytes())

    def existing(target: Path) -> Path | None:
        return target if target.is_file() else None

    return shared_file(copy, existing, kind="sidecar", source=source, owner=path, suffix=".jsonl")
