"""The photos that an earlier run has put into a shard, one at a time, for as much of the tar as can be read.

A photo that the shard holds as a reference is read from the tar that has its bytes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, cast

from lavic.data.duplicates import Reference, read_references
from lavic.data.tar_shards import MEMBERS, Sample, parse_sample
from lavic.errors import DataError
from lavic.storage.paths import is_remote, storage_errors

_BLOCK = 512


class Stored:
    """Samples of a shard by key, as a context. A tar that is missing or damaged holds what its whole part holds."""

    def __init__(self, shard: Path) -> None:
        self._shard = shard
        self._stack = ExitStack()
        self._file: BinaryIO | None = None
        self._at: dict[str, tuple[int, int]] = {}
        self._references: dict[str, Reference] = {}
        self._owner: tuple[str, Stored] | None = None

    def __enter__(self) -> Stored:
        try:
            self._file = self._stack.enter_context(self._shard.open("rb"))
            if is_remote(self._shard):
                # Samples are read one by one: from the network each would be a request.
                copy = self._stack.enter_context(cast(BinaryIO, tempfile.TemporaryFile()))
                shutil.copyfileobj(self._file, copy, 8 << 20)
                self._file = copy
            self._at = dict(places(self._file))
        except storage_errors():
            self._file, self._at = None, {}
        with suppress(DataError):
            self._references = {one.key: one for one in read_references(self._shard)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._owner:
            self._owner[1].__exit__(None, None, None)
            self._owner = None
        self._stack.__exit__(kind, error, trace)

    @property
    def empty(self) -> bool:
        """Whether there is no sample at all."""
        return not self._at and not self._references

    def sample(self, key: str) -> Sample | None:
        """The sample of a key, or None where there is none that is whole."""
        if key not in self._at or self._file is None:
            return self._referred(key)
        start, end = self._at[key]
        try:
            self._file.seek(start)
            sample = parse_sample(self._file.read(end - start), f"{self._shard} at byte {start}")
        except (OSError, DataError):
            return None
        return sample if hashlib.sha256(sample.jpg).hexdigest() == sample.meta.get("sha256") else None

    def _referred(self, key: str) -> Sample | None:
        if (reference := self._references.get(key)) is None:
            return None
        if reference.shard == self._shard.name:
            owner = self
        else:
            if self._owner is None or self._owner[0] != reference.shard:
                if self._owner:
                    self._owner[1].__exit__(None, None, None)
                # Neighbours often refer to neighbours: the last one stays open.
                self._owner = (reference.shard, Stored(self._shard.with_name(reference.shard)).__enter__())
            owner = self._owner[1]
        found = owner.sample(reference.same_as)
        same = found is not None and found.meta["sha256"] == reference.meta.get("sha256")
        return reference.sample(found) if found and same else None


def places(file: BinaryIO) -> Iterator[tuple[str, tuple[int, int]]]:
    """(key, (start, end)) of the samples, up to the first header that cannot be read."""
    start, group = 0, 0
    end = file.seek(0, os.SEEK_END)
    at = file.seek(0)
    while len(header := file.read(_BLOCK)) == _BLOCK:
        try:
            member = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
        except (tarfile.HeaderError, ValueError):
            return
        if not 0 <= member.size <= end - at:
            return
        at += _BLOCK + member.size + -member.size % _BLOCK
        file.seek(at)
        group += 1
        if group == len(MEMBERS):
            yield member.name.partition(".")[0], (start, at)
            start, group = at, 0
