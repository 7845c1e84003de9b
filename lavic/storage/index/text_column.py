"""Short texts in an index, read when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np

from lavic.storage.index.array_file import ArrayFile, ArrayWriter

_EVERY = 64
"""Texts for each stored offset: between two of them lengths are summed up."""
_AT_ONCE = 1 << 16


class TextColumn(Sequence[str]):
    """Texts of at most 255 bytes: their bytes on the disk, and a little over a byte of memory for each of them."""

    def __init__(self, file: ArrayFile, name: str) -> None:
        """A column that `TextColumnWriter` wrote."""
        self._file, self._name = file, f"{name}.text"
        self._lengths, self._starts = file[f"{name}.lengths"], file[f"{name}.starts"]

    def __len__(self) -> int:
        return len(self._lengths)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            start, end, step = index.indices(len(self))
            return self._read(start, max(start, end)) if step == 1 else [self[i] for i in range(start, end, step)]
        index = index + len(self) if index < 0 else index
        if not 0 <= index < len(self):
            raise IndexError(f"text {index} of {len(self)}")
        start = self._start(index)
        return self._file.read(self._name, start, start + int(self._lengths[index])).decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _AT_ONCE):
            yield from self._read(start, min(start + _AT_ONCE, len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def _start(self, index: int) -> int:
        block = index // _EVERY
        return int(self._starts[block]) + int(self._lengths[block * _EVERY : index].sum(dtype=np.int64))

    def _read(self, start: int, end: int) -> list[str]:
        if start >= end:
            return []
        ends = np.cumsum(self._lengths[start:end], dtype=np.int64).tolist()
        begin = self._start(start)
        data = self._file.read(self._name, begin, begin + ends[-1])
        return [data[a:b].decode("utf-8", "surrogatepass") for a, b in zip([0, *ends], ends, strict=False)]


class TextColumnWriter:
    """Writes a `TextColumn`."""

    def __init__(self, writer: ArrayWriter, name: str) -> None:
        """Begins.

        Args:
            writer: Of the index.
            name: Of the column.
        """
        self._text = writer.column(f"{name}.text", "u1")
        self._lengths = writer.column(f"{name}.lengths", "u1")
        self._starts = writer.column(f"{name}.starts", "<u8")

    def lengths(self) -> np.ndarray:
        """Bytes of each text so far: uint8 [n]."""
        return self._lengths.mapped()

    def append(self, texts: Sequence[str]) -> None:
        """Adds texts.

        Raises:
            ValueError: One is longer than 255 bytes.
        """
        data = [text.encode("utf-8", "surrogatepass") for text in texts]
        if not data:
            return
        lengths = np.array([len(text) for text in data])
        if lengths.max() > 255:
            raise ValueError(f"a text of {lengths.max()} bytes")
        before = np.concatenate(([0], np.cumsum(lengths[:-1]))) + len(self._text)
        self._starts.append(before[-len(self._lengths) % _EVERY :: _EVERY])
        self._text.append(b"".join(data))
        self._lengths.append(lengths)
