"""Groups equal submissions, which must be in one split: near-duplicates by MinHash, reposts, crossposts.

The signatures are compared one band after the other, which takes a few numbers of memory per submission.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator

import numpy as np
from datasketch import MinHash, MinHashLSH

PERMUTATIONS = 128
FEW_WORDS = 8
"""Shorter texts ("help please") are too unspecific: they are equal only if one account wrote both."""

_SHINGLE = 3
_NEIGHBOURS = 20
"""Submissions of the same band, before one, that it is compared with."""
_WORD = re.compile(r"\w+")
_CHUNK = 1 << 16
_EMPTY = MinHash(num_perm=PERMUTATIONS, seed=1)


def signature_of(text: str) -> np.ndarray:
    """The MinHash signature of a text's three-word sequences: uint32 [PERMUTATIONS]; zeros for few words."""
    words = _WORD.findall(text.lower())
    if len(words) < FEW_WORDS:
        return np.zeros(PERMUTATIONS, np.uint32)
    minhash = _EMPTY.copy()
    shingles = {" ".join(words[n : n + _SHINGLE]) for n in range(len(words) - _SHINGLE + 1)}
    minhash.update_batch([shingle.encode("utf-8", "replace") for shingle in sorted(shingles)])
    return np.asarray(minhash.hashvalues, np.uint32)


def exact_hash(text: str, author: str) -> int:
    """A hash of a text and its account, equal for reposts; 0 for a deleted account."""
    if not author:
        return 0
    normalized = " ".join(_WORD.findall(text.lower()))
    return int.from_bytes(
        hashlib.blake2b(f"{author}\n{normalized}".encode("utf-8", "replace"), digest_size=8).digest(), "big"
    )


def group_submissions(
    ids: np.ndarray, crossposts: np.ndarray, exact: np.ndarray, signatures: np.ndarray, threshold: float
) -> np.ndarray:
    """The group of each submission: the index of the group's first member.

    Args:
        ids: uint64 [n], in the order that decides which member is first.
        crossposts: The submission that each one repeats, 0 for none: uint64 [n].
        exact: See `exact_hash`: uint64 [n].
        signatures: uint32 [n, PERMUTATIONS], may be mapped from a file.
        threshold: Least estimated Jaccard similarity.

    Returns:
        int64 [n].
    """
    groups = _Groups(len(ids))
    # A crosspost is in the group of the original and its other crossposts, even if the original is missing.
    origin = np.where(crossposts > 0, crossposts, ids)
    for numbers in (origin, exact):
        for run in _runs(numbers):
            for member in run[1:]:
                groups.join(int(run[0]), int(member))
    lsh = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)
    for band in range(lsh.b):
        columns = slice(band * lsh.r, (band + 1) * lsh.r)
        for run in _runs(_band_hash(signatures, columns)):
            for n, member in enumerate(run):
                for earlier in run[max(n - _NEIGHBOURS, 0) : n]:
                    if np.mean(signatures[member] == signatures[earlier]) >= threshold:
                        groups.join(int(earlier), int(member))
    return np.array([groups.root(member) for member in range(len(ids))], np.int64)


def _band_hash(signatures: np.ndarray, columns: slice) -> np.ndarray:
    """One number per submission for some columns, 0 for a text of few words: uint64 [n]."""
    mixed = np.zeros(len(signatures), np.uint64)
    for start in range(0, len(signatures), _CHUNK):
        part = np.asarray(signatures[start : start + _CHUNK, columns]).astype(np.uint64)
        total = np.ones(len(part), np.uint64)
        for column in part.T:
            total = (total ^ column) * np.uint64(0x9E3779B97F4A7C15)
            total ^= total >> np.uint64(29)
        mixed[start : start + _CHUNK] = np.where(part.any(axis=1), total, 0)
    return mixed


def _runs(numbers: np.ndarray) -> Iterator[np.ndarray]:
    """Places with the same number, for each number but 0 that occurs twice; ascending."""
    order = np.argsort(numbers, kind="stable")
    ordered = numbers[order]
    edges = np.flatnonzero(np.diff(ordered)) + 1
    starts, ends = np.concatenate([[0], edges]), np.concatenate([edges, [len(numbers)]])
    for n in np.flatnonzero(ends - starts > 1):
        if ordered[starts[n]]:
            yield order[starts[n] : ends[n]]


class _Groups:
    """Disjoint sets of places; the smallest place of a set names it."""

    def __init__(self, count: int) -> None:
        self._parent = np.arange(count)

    def root(self, member: int) -> int:
        while (parent := int(self._parent[member])) != member:
            self._parent[member] = self._parent[parent]
            member = parent
        return member

    def join(self, a: int, b: int) -> None:
        first, second = sorted((self.root(a), self.root(b)))
        self._parent[second] = first
