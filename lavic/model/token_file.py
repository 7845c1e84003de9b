"""A file of item tokens, memory-mapped or read row by row."""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from lavic.errors import ChangedFileError, DataError, first_line
from lavic.storage.file_digest import stream_sha256

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


class MappedTokens:
    """A tokens file that is memory-mapped; the tensor's storage is the complete file.

    Unlike `mmap`, torch needs no open file once it is mapped: a large store has thousands.

    Args:
        shape: [n, views, d_vision] that its tokens must have.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        with _opened(path) as file:
            header = _TokensHeader.read(path, file, shape)
        try:
            mapped = torch.from_file(str(path), shared=False, size=header.size, dtype=torch.uint8)
        except RuntimeError as e:
            raise DataError(f"{path}: cannot be mapped ({first_line(e)})") from None
        self._rows = mapped[header.start :].view(header.dtype).view(header.shape)

    def __getitem__(self, row: int) -> torch.Tensor:
        return self._rows[row]

    def digest(self) -> str:
        """sha256 of the file."""
        file = torch.tensor([], dtype=torch.uint8).set_(self._rows.untyped_storage())
        return hashlib.sha256(file.numpy().data).hexdigest()


class ReadTokens:
    """A tokens file that is kept open and read.

    Args:
        shape: [n, views, d_vision] that its tokens must have.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        self._path, self._file = path, _opened(path)
        self._header = _TokensHeader.read(path, self._file, shape)
        self._row_bytes = math.prod(self._header.shape[1:]) * self._header.dtype.itemsize

    def __getitem__(self, row: int) -> torch.Tensor:
        start = self._header.start + row * self._row_bytes
        data = os.pread(self._file.fileno(), self._row_bytes, start)
        if len(data) < self._row_bytes:
            raise ChangedFileError(f"{self._path}: truncated while in use: copy the item store again")
        return torch.frombuffer(bytearray(data), dtype=self._header.dtype).view(self._header.shape[1:])

    def digest(self) -> str:
        """sha256 of the file."""
        self._file.seek(0)
        return stream_sha256(self._file)


@dataclass(frozen=True)
class _TokensHeader:
    """The header of a tokens file."""

    size: int
    """Bytes of the file."""
    start: int
    """Offset of the tokens in the file."""
    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def read(cls, path: Path, file: BinaryIO, expected: tuple[int, int, int]) -> _TokensHeader:
        """Reads the header from the start of a file.

        Raises:
            DataError: It is not a tokens file, or does not match the manifest.
        """
        size = os.fstat(file.fileno()).st_size
        header_bytes = int.from_bytes(file.read(8), "little")
        text = file.read(header_bytes) if header_bytes < size else b""
        try:
            header = json.loads(text)["tokens"]
            shape, dtype = tuple(header["shape"]), DTYPES[header["dtype"]]
            start, end = header["data_offsets"]
            complete = size == 8 + header_bytes + end and not start
        except (KeyError, ValueError, TypeError) as e:
            raise DataError(f"{path}: not a tokens file ({e})") from e
        if not complete or shape != expected:
            raise DataError(f"{path}: {shape} in {size} bytes, {expected} in the manifest")
        return cls(size, 8 + header_bytes, shape, dtype)


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as e:
        raise DataError(f"{path}: {e}") from e
