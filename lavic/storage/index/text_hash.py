"""Hashes of texts, 128 bits that are the same in every process; sorting and sets of them.

Among 48 million texts two share all 128 bits with probability 1e-23, and the first 64 with probability 6e-5: where only
the first half is stored, the texts themselves are compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np

_CHUNK = 1 << 22


def digest_of(text: str) -> bytes:
    """A text's digest, 16 bytes; lone surrogates, which some catalogues contain, are allowed."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def hash_texts(texts: Iterable[str]) -> np.ndarray:
    """The two halves of each text's digest: uint64 [n, 2]."""
    return np.frombuffer(b"".join(map(digest_of, texts)), "<u8").reshape(-1, 2)


def hash_text(text: str) -> np.uint64:
    """The first half of a text's digest."""
    return np.uint64(int.from_bytes(digest_of(text)[:8], "little"))


def in_order(hashes: np.ndarray, chunk: int = _CHUNK) -> Iterator[np.ndarray]:
    """A stable argsort of hashes (uint64 [n], best memory-mapped) in chunks of about `chunk` positions: int64 [m] each.

    Hashes are uniform, so a chunk is a range of their leading bits, and memory does not grow with their number.
    """
    bits = prefix_bits(len(hashes), chunk)
    for prefix in range(1 << bits):
        rows = with_prefix(hashes, prefix, bits)
        yield rows[np.argsort(hashes[rows], kind="stable")]


def prefix_bits(count: int, chunk: int) -> int:
    """The number of leading bits that split `count` hashes into ranges of about `chunk` or fewer."""
    return max(0, (count - 1) // chunk).bit_length()


def with_prefix(hashes: np.ndarray, prefix: int, bits: int) -> np.ndarray:
    """Positions of the hashes whose leading bits are `prefix`, in ascending order: int64 [m]."""
    if not bits:
        return np.arange(len(hashes))
    value, shift = np.uint64(prefix), np.uint64(64 - bits)
    starts = range(0, len(hashes), _CHUNK)
    rows = [start + np.flatnonzero(hashes[start : start + _CHUNK] >> shift == value) for start in starts]
    return np.concatenate(rows) if rows else np.arange(0)


class HashSet:
    """A set of texts, of which only the digests are stored."""

    def __init__(self, hashes: np.ndarray) -> None:
        """Sorts hashes, see `hash_texts`: uint64 [n, 2]; duplicates are allowed."""
        order = np.lexsort((hashes[:, 1], hashes[:, 0]))
        new = np.ones(len(order), bool)
        new[1:] = (hashes[order[1:]] != hashes[order[:-1]]).any(axis=1)
        self._first, self._second = (np.ascontiguousarray(hashes[order[new], half]) for half in (0, 1))

    def __len__(self) -> int:
        return len(self._first)

    def holds(self, hashes: np.ndarray) -> np.ndarray:
        """Which texts are in the set: bool [n], for hashes uint64 [n, 2]."""
        return self.find(hashes) >= 0

    def find(self, hashes: np.ndarray) -> np.ndarray:
        """The position of texts in the set, -1 for a text that is not in it: int64 [n], for hashes uint64 [n, 2]."""
        positions = np.full(len(hashes), -1)
        rows, candidates = np.arange(len(hashes)), np.searchsorted(self._first, hashes[:, 0])
        while True:  # again for texts whose candidate shares only the first half
            in_range = candidates < len(self)
            rows, candidates = rows[in_range], candidates[in_range]
            matches = self._first[candidates] == hashes[rows, 0]
            rows, candidates = rows[matches], candidates[matches]
            if not len(rows):
                return positions
            is_match = self._second[candidates] == hashes[rows, 1]
            positions[rows[is_match]] = candidates[is_match]
            rows, candidates = rows[~is_match], candidates[~is_match] + 1
