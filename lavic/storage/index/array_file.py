"""A file of named arrays that processes map into memory, so that they share its pages.

The format is safetensors, so other tools open it too: 8 bytes of length, a JSON header, the arrays. The header's
`__metadata__` holds the index's kind and the digest of its sources.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np

_DTYPES = {"U8": "|u1", "U32": "<u4", "U64": "<u8", "I32": "<i4", "I64": "<i8", "F32": "<f4"}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
_BUFFER = 1 << 20


class ArrayFileError(ValueError):
    """A file that is not the expected index: truncated, of other sources or another version, or no index at all."""


class ArrayFile:
    """An index, opened for reading. It is pickled as its path: another process maps it again.

    An open file remains readable after its removal.

    Attributes:
        path: The file.
        metadata: Strings that the writer recorded, among them `kind` and `source`.
    """

    def __init__(self, path: Path, *, kind: str, source: str) -> None:
        """Maps a file; reads only its header.

        Raises:
            ArrayFileError: It is an index of another `kind`, or of sources with another digest, or no index.
            OSError: It cannot be read.
        """
        self.path = path
        self._file = os.open(path, os.O_RDONLY)
        try:
            self._mapped = mmap.mmap(self._file, 0, access=mmap.ACCESS_READ)
            length = int.from_bytes(self._mapped[:8], "little")
            header = json.loads(self._mapped[8 : 8 + length])
            self.metadata: dict[str, str] = header.pop("__metadata__")
            self._start = 8 + length
            self._columns = {name: _Column(**column) for name, column in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArrayFileError(f"{path}: not an index ({error})") from None
        if (self.metadata.get("kind"), self.metadata.get("source")) != (kind, source):
            raise ArrayFileError(f"{path}: an index of other sources")
        ends = [column.end for column in self._columns.values()]
        if len(self._mapped) != self._start + max(ends, default=0):
            raise ArrayFileError(f"{path}: truncated")

    def __getitem__(self, name: str) -> np.ndarray:
        """A column, memory-mapped and read-only."""
        column = self._columns[name]
        count = math.prod(column.shape)
        array = np.frombuffer(self._mapped, column.dtype, count, self._start + column.start) if count else None
        return np.empty(column.shape, column.dtype) if array is None else array.reshape(column.shape)

    def __contains__(self, name: str) -> bool:
        return name in self._columns

    def read(self, name: str, start: int, end: int) -> bytes:
        """Bytes of a column, read instead of mapped, so that they do not count as this process's memory."""
        column = self._columns[name]
        if not 0 <= start <= end <= column.end - column.start:
            raise IndexError(f"bytes {start} to {end} of column {name}")
        return os.pread(self._file, end - start, self._start + column.start + start)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(ArrayFile, kind=self.metadata["kind"], source=self.metadata["source"]), (self.path,)

    # At interpreter exit, the names of modules may be None before this is called.
    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if hasattr(self, "_file"):
            close(self._file)


class _Column:
    """Type, shape and position of a column in its file."""

    def __init__(self, dtype: str, shape: list[int], data_offsets: list[int]) -> None:
        self.dtype, self.shape = np.dtype(_DTYPES[dtype]), tuple(shape)
        self.start, self.end = data_offsets
        if self.end - self.start != self.dtype.itemsize * math.prod(self.shape):
            raise ValueError("a column of another size")


class ArrayWriter:
    """Columns that grow on the disk, block by block, and are joined into one file at the end.

    Memory does not grow with them. A context manager, which removes its temporary files in `folder`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._columns: dict[str, GrowingColumn] = {}
        self._files = ExitStack()

    def column(self, name: str, dtype: str, width: int = 0) -> GrowingColumn:
        """A new column of numbers; with `width`, of rows of that many numbers."""
        self._columns[name] = self.scratch(dtype, width)
        return self._columns[name]

    def scratch(self, dtype: str, width: int = 0) -> GrowingColumn:
        """A column that does not become part of the file."""
        file = tempfile.TemporaryFile(dir=self._folder, buffering=_BUFFER)  # noqa: SIM115 (closed by `_files`)
        return GrowingColumn(self._files.enter_context(file), np.dtype(dtype), width)

    def put_together(self, file: BinaryIO, metadata: Mapping[str, str]) -> None:
        """Writes the file: its header, then the columns."""
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        start = 0
        # Wide numbers first, so that every column is aligned.
        columns = sorted(self._columns.items(), key=lambda column: -column[1].dtype.itemsize)
        for name, column in columns:
            end = start + column.flush()
            shape = [len(column), column.width] if column.width else [len(column)]
            header[name] = {"dtype": _NAMES[column.dtype], "shape": shape, "data_offsets": [start, end]}
            start = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)
        for _, column in columns:
            column.copy_to(file)

    def __enter__(self) -> ArrayWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()


class GrowingColumn:
    """A column that is being written, in an anonymous temporary file."""

    def __init__(self, file: IO[bytes], dtype: np.dtype, width: int) -> None:
        self.dtype, self.width = dtype, width
        self._file, self._bytes = file, 0

    def append(self, values: np.ndarray | bytes) -> None:
        """Adds rows, or raw bytes."""
        data = values if isinstance(values, bytes) else np.ascontiguousarray(values, self.dtype).tobytes()
        self._file.write(data)
        self._bytes += len(data)

    def __len__(self) -> int:
        return self._bytes // (self.dtype.itemsize * (self.width or 1))

    def mapped(self) -> np.ndarray:
        """The rows so far, memory-mapped."""
        if not self.flush():
            return np.empty((0, self.width) if self.width else 0, self.dtype)
        array = np.frombuffer(mmap.mmap(self._file.fileno(), self._bytes, access=mmap.ACCESS_READ), self.dtype)
        return array.reshape(-1, self.width) if self.width else array

    def flush(self) -> int:
        """Flushes the file; returns its size in bytes."""
        self._file.flush()
        return self._bytes

    def copy_to(self, file: BinaryIO) -> None:
        """Writes the column into another file."""
        self._file.seek(0)
        shutil.copyfileobj(self._file, file, _BUFFER)
