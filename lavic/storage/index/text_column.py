"""Columns of short texts in an index, read on demand."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np

from lavic.storage.index.array_file import ArrayFile, ArrayWriter

_STRIDE = 64
"""Texts per stored offset; the offsets between are sums of lengths."""
_BLOCK = 1 << 16


class LazyTexts(Sequence[str]):
    """A read-only sequence of texts that are read on demand. It equals any sequence of the same texts."""

    @abstractmethod
    def _get(self, index: int) -> str:
        """The text at an index from 0 to `len(self) - 1`."""

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return self._get_range(range(*index.indices(len(self))))
        index = index + len(self) if index < 0 else index
        if not 0 <= index < len(self):
            raise IndexError(f"text {index} of {len(self)}")
        return self._get(index)

    def _get_range(self, indices: range) -> list[str]:
        return [self._get(index) for index in indices]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]


class TextColumn(LazyTexts):
    """Texts of at most 255 bytes: their bytes are on the disk, and each takes a little over a byte of memory."""

    def __init__(self, file: ArrayFile, name: str) -> None:
        self._file, self._name = file, f"{name}.text"
        self._lengths, self._starts = file[f"{name}.lengths"], file[f"{name}.starts"]

    def __len__(self) -> int:
        return len(self._lengths)

    def _get(self, index: int) -> str:
        start = self._start(index)
        return self._file.read(self._name, start, start + int(self._lengths[index])).decode("utf-8", "surrogatepass")

    def _get_range(self, indices: range) -> list[str]:
        if not indices or indices.step != 1:
            return super()._get_range(indices)
        ends = np.cumsum(self._lengths[indices.start : indices.stop], dtype=np.int64).tolist()
        start = self._start(indices.start)
        data = self._file.read(self._name, start, start + ends[-1])
        return [data[a:b].decode("utf-8", "surrogatepass") for a, b in zip([0, *ends], ends, strict=False)]

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _BLOCK):
            yield from self._get_range(range(start, min(start + _BLOCK, len(self))))

    def _start(self, index: int) -> int:
        block = index // _STRIDE
        return int(self._starts[block]) + int(self._lengths[block * _STRIDE : index].sum(dtype=np.int64))


class TextColumnWriter:
    """Adds a `TextColumn` to the index of a writer."""

    def __init__(self, writer: ArrayWriter, name: str) -> None:
        self._text = writer.column(f"{name}.text", "u1")
        self._lengths = writer.column(f"{name}.lengths", "u1")
        self._starts = writer.column(f"{name}.starts", "<u8")

    def lengths(self) -> np.ndarray:
        """Bytes of each text added so far: uint8 [n]."""
        return self._lengths.mapped()

    def append(self, texts: Sequence[str]) -> None:
        """Adds texts. Raises ValueError for one of more than 255 bytes."""
        data = [text.encode("utf-8", "surrogatepass") for text in texts]
        if not data:
            return
        lengths = np.array([len(text) for text in data])
        if lengths.max() > 255:
            raise ValueError(f"a text of {lengths.max()} bytes")
        before = np.concatenate(([0], np.cumsum(lengths[:-1]))) + len(self._text)
        self._starts.append(before[-len(self._lengths) % _STRIDE :: _STRIDE])
        self._text.append(b"".join(data))
        self._lengths.append(lengths)
