"""Texts as numbers of fixed width: 128 bits that are the same in every process, and sets and orders of them.

Two of 48 million texts agree in all 128 bits with a probability of 1e-23, in the first 64 with one of 6e-5: where only
the first half is kept, what stands behind it is compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np

_PIECE = 1 << 22


def digest_of(text: str) -> bytes:
    """16 bytes; lone surrogates, which some catalogues hold, are text too."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def hash_texts(texts: Iterable[str]) -> np.ndarray:
    """The two halves of each text's digest: uint64 [n, 2]."""
    return np.frombuffer(b"".join(map(digest_of, texts)), "<u8").reshape(-1, 2)


def hash_text(text: str) -> np.uint64:
    """The first half of a text's digest."""
    return np.uint64(int.from_bytes(digest_of(text)[:8], "little"))


def in_order(hashes: np.ndarray, most: int = _PIECE) -> Iterator[np.ndarray]:
    """Positions of hashes in ascending order, equal ones as they stand, in pieces of about `most`: int64 [some].

    Hashes are spread evenly, so that a piece is a range of their leading bits; memory does not grow with their number.

    Args:
        hashes: uint64 [n], best mapped.
        most: How many to sort at once.
    """
    bits = prefix_bits(len(hashes), most)
    for prefix in range(1 << bits):
        rows = with_prefix(hashes, prefix, bits)
        yield rows[np.argsort(hashes[rows], kind="stable")]


def prefix_bits(count: int, most: int) -> int:
    """By how many leading bits so many hashes fall into ranges of about `most` or fewer."""
    return max(0, (count - 1) // most).bit_length()


def with_prefix(hashes: np.ndarray, prefix: int, bits: int) -> np.ndarray:
    """Positions of the hashes whose leading bits are `prefix`, in ascending order: int64 [some]."""
    if not bits:
        return np.arange(len(hashes))
    wanted, shift = np.uint64(prefix), np.uint64(64 - bits)
    pieces = range(0, len(hashes), _PIECE)
    rows = [start + np.flatnonzero(hashes[start : start + _PIECE] >> shift == wanted) for start in pieces]
    return np.concatenate(rows) if rows else np.arange(0)


class HashSet:
    """Texts of which only the digests are kept."""

    def __init__(self, hashes: np.ndarray) -> None:
        """Sorts them.

        Args:
            hashes: uint64 [n, 2], as `hash_texts` makes them; some may be there several times.
        """
        order = np.lexsort((hashes[:, 1], hashes[:, 0]))
        new = np.ones(len(order), bool)
        new[1:] = (hashes[order[1:]] != hashes[order[:-1]]).any(axis=1)
        self._first, self._second = (np.ascontiguousarray(hashes[order[new], half]) for half in (0, 1))

    def __len__(self) -> int:
        return len(self._first)

    def holds(self, hashes: np.ndarray) -> np.ndarray:
        """Which of some texts are in the set: bool [n].

        Args:
            hashes: uint64 [n, 2]
        """
        return self.find(hashes) >= 0

    def find(self, hashes: np.ndarray) -> np.ndarray:
        """The place of some texts in the set, from 0, and -1 of those that it does not hold: int64 [n].

        Args:
            hashes: uint64 [n, 2]
        """
        places = np.full(len(hashes), -1)
        rows, at = np.arange(len(hashes)), np.searchsorted(self._first, hashes[:, 0])
        while True:  # once, and once more where another text shares the first half
            inside = at < len(self)
            rows, at = rows[inside], at[inside]
            alike = self._first[at] == hashes[rows, 0]
            rows, at = rows[alike], at[alike]
            if not len(rows):
                return places
            same = self._second[at] == hashes[rows, 1]
            places[rows[same]] = at[same]
            rows, at = rows[~same], at[~same] + 1
