"""The photos that an earlier run has stored in a shard, one at a time, as far as the tar can be read.

A photo that the shard holds as a reference is read from the tar that has its bytes.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import BinaryIO, cast

from lavic.data.duplicates import Reference, read_references
from lavic.data.tar_shards import Sample, parse_sample, sample_ranges
from lavic.errors import DataError
from lavic.storage.paths import is_remote, storage_errors


class ExistingShard:
    """Samples of a shard by key: a context manager. Of a damaged tar, those before the damage."""

    def __init__(self, shard: Path) -> None:
        self._shard = shard
        self._stack = ExitStack()
        self._file: BinaryIO | None = None
        self._ranges: dict[str, tuple[int, int]] = {}
        self._references: dict[str, Reference] = {}
        self._owner: tuple[str, ExistingShard] | None = None

    def __enter__(self) -> ExistingShard:
        try:
            self._file = self._stack.enter_context(self._shard.open("rb"))
            if is_remote(self._shard):
                # Samples are read one by one, and each read would be a request.
                copy = self._stack.enter_context(cast(BinaryIO, tempfile.TemporaryFile()))
                shutil.copyfileobj(self._file, copy, 8 << 20)
                self._file = copy
            with suppress(DataError):
                for key, start, end in sample_ranges(self._file, str(self._shard)):
                    self._ranges[key] = (start, end)
        except storage_errors():
            self._file, self._ranges = None, {}
        with suppress(DataError):
            self._references = {reference.key: reference for reference in read_references(self._shard)}
        return self

    def __exit__(self, *_: object) -> None:
        self._close_owner()
        self._stack.close()

    @property
    def empty(self) -> bool:
        """Whether there is no sample at all."""
        return not self._ranges and not self._references

    def sample(self, key: str) -> Sample | None:
        """The sample of a key, or None if there is none or it is damaged."""
        if key not in self._ranges or self._file is None:
            return self._referenced(key)
        start, end = self._ranges[key]
        try:
            self._file.seek(start)
            sample = parse_sample(self._file.read(end - start), f"{self._shard} at byte {start}")
        except (OSError, DataError):
            return None
        return sample if hashlib.sha256(sample.jpg).hexdigest() == sample.meta.get("sha256") else None

    def _referenced(self, key: str) -> Sample | None:
        if (reference := self._references.get(key)) is None:
            return None
        owner = self._open_owner(reference.shard).sample(reference.same_as)
        same_bytes = owner is not None and owner.meta["sha256"] == reference.meta.get("sha256")
        return reference.sample(owner) if owner and same_bytes else None

    def _open_owner(self, name: str) -> ExistingShard:
        if name == self._shard.name:
            return self
        if self._owner is None or self._owner[0] != name:
            # Neighbours often refer to neighbours: the last one stays open.
            self._close_owner()
            self._owner = (name, ExistingShard(self._shard.with_name(name)).__enter__())
        return self._owner[1]

    def _close_owner(self) -> None:
        if self._owner:
            self._owner[1].__exit__(None, None, None)
            self._owner = None
