"""A shard's descriptions, read one at a time: in memory are only the places of their lines."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, cast

import numpy as np

from lavic.data.descriptions import descriptions_path, parse_description
from lavic.errors import DataError, first_line
from lavic.storage.atomic import atomic_open
from lavic.storage.cache.open_files import FILES, OpenFile
from lavic.storage.index.shared import shared_file
from lavic.storage.index.text_hash import hash_text, hash_texts
from lavic.storage.paths import is_remote, storage_errors

_AT_ONCE = 8 << 20


class Sidecar:
    """The descriptions beside one shard.

    `lavic describe` writes a line for each sample, in their order: the line of a sample is where it should be, and its
    key says so. Where it is not, because the shard was packed anew or the file written by hand, all keys are read once.
    """

    def __init__(self, shard: Path, owner: object) -> None:
        """Finds the lines.

        Args:
            shard: Where the tar stands.
            owner: Who opens the file, see `OpenFiles.drop`.

        Raises:
            DataError: The file cannot be read.
        """
        self._path, self._owner = descriptions_path(shard), owner
        self._stamp: Any = None
        self._ends = np.empty(0, "<u8")
        self._by_key: tuple[np.ndarray, np.ndarray] | None = None
        self._file()

    def text(self, row: int, key: str, default: str) -> str:
        """The description of a sample, or `default` where there is none.

        Args:
            row: Its place in the shard.
            key: Its key.
            default: What stands for a description.

        Raises:
            DataError: Its line is not a description.
        """
        file = self._file() if self._stamp else None  # one that was not there at first stays away
        if file is None:
            return default
        if row < len(self._ends):
            line = self._line(file, row)
            if line["key"] == key:
                return line["text"]
        return self._search(file, key, default)

    def _file(self) -> OpenFile | None:
        """The file, its lines found; None where there is none."""
        try:
            file = FILES.get((self._owner, str(self._path)), lambda: _local(self._path))
            if file.stamp != self._stamp:
                self._stamp, self._by_key = file.stamp, None
                self._ends = _ends(file)
            return file
        except FileNotFoundError:
            return None
        except storage_errors() as error:
            raise DataError(f"{self._path}: cannot be read ({first_line(error)})") from None

    def _line(self, file: OpenFile, number: int) -> dict[str, str]:
        start = int(self._ends[number - 1]) + 1 if number else 0
        return parse_description(file.read(start, int(self._ends[number])), self._path, number + 1)

    def _search(self, file: OpenFile, key: str, default: str) -> str:
        if self._by_key is None:
            keys = [self._line(file, number)["key"] for number in range(len(self._ends))]
            hashes = hash_texts(keys)[:, 0]
            order = np.argsort(hashes, kind="stable")
            self._by_key = hashes[order], order
        hashes, lines = self._by_key
        wanted = hash_text(key)
        first, last = np.searchsorted(hashes, wanted), np.searchsorted(hashes, wanted, side="right")
        for number in reversed(lines[first:last]):  # the last line of a key counts
            line = self._line(file, int(number))
            if line["key"] == key:
                return line["text"]
        return default


def _ends(file: OpenFile) -> np.ndarray:
    """Where each line of a file ends: uint64 [lines]"""
    parts = [np.empty(0, "<u8")]
    for start in range(0, file.size, _AT_ONCE):
        block = file.read(start, start + _AT_ONCE)
        parts.append((np.flatnonzero(np.frombuffer(block, "u1") == ord("\n")) + start).astype("<u8"))
    if file.size and file.read(file.size - 1, file.size) != b"\n":
        parts.append(np.array([file.size], "<u8"))
    return np.concatenate(parts)


def _local(path: Path) -> Path:
    """A file of this machine with what stands at `path`."""
    if not is_remote(path):
        return path
    store = cast(Any, path)
    about = store.fs.info(store.path)
    source = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()

    def copy(target: Path) -> None:
        with atomic_open(target, durable=False) as file:
            file.write(path.read_bytes())

    return shared_file(
        copy,
        lambda copied: copied if copied.is_file() else None,
        kind="sidecar",
        source=source,
        owner=path,
        ending=".jsonl",
    )
