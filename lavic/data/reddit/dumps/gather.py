"""The second pass over a dump: all posts of the submissions that the first pass has found, by bucket.

The posts of one dump are stored in one file, as runs that are sorted by bucket; an index has the offset of each bucket
in each run.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from lavic.data.reddit.dumps.dump_file import read_pieces
from lavic.data.reddit.dumps.id_table import BUCKETS, Table, bucket_of
from lavic.data.reddit.dumps.post import BadPost, Post, pack_post, post_from_row, read_object, unpack_post
from lavic.storage.atomic import atomic_open

RUN_BYTES = 32 << 20
"""Bytes of posts that are collected before they are written."""

_SUBMISSION_OF_COMMENT = re.compile(rb'"link_id"\s*:\s*"(?:t3_)?([0-9a-z]{1,13})"')
# Comments and objects within a submission have ids too; the parser decides which id is the submission's.
_ID = re.compile(rb'"id"\s*:\s*"([0-9a-z]{1,13})"')
_WIDTH = 13
_DIGIT = np.zeros(256, np.uint64)
_DIGIT[list(b"0123456789abcdefghijklmnopqrstuvwxyz")] = np.arange(36)


def gather_dump(path: str, submissions: Table, spool: Path) -> dict[str, int]:
    """Writes the posts of a dump that belong to the wanted submissions to a file; returns counts of them.

    A dump may hold comments, submissions, or both. The file's index is written last, in the same folder. Raises
    DataError as `read_pieces`.
    """
    counts: Counter[str] = Counter()
    runs: list[np.ndarray] = []
    pending: list[tuple[int, bytes]] = []
    size = 0
    spool.parent.mkdir(parents=True, exist_ok=True)
    with atomic_open(spool) as file:

        def write_run() -> None:
            pending.sort(key=lambda entry: entry[0])
            sizes = np.zeros(BUCKETS, np.int64)
            for bucket, line in pending:
                sizes[bucket] += len(line)
            start = file.tell()
            file.writelines(line for _, line in pending)
            runs.append(start + np.concatenate([[0], np.cumsum(sizes)]))
            pending.clear()

        for piece in read_pieces(path):
            for line in _wanted_lines(piece, submissions):
                try:
                    post = post_from_row(read_object(line))
                except BadPost as error:
                    counts[str(error)] += 1
                    continue
                if not submissions.contains(np.array([post.submission], np.uint64))[0]:
                    continue
                counts["comments" if post.is_comment else "submissions"] += 1
                packed = pack_post(post) + b"\n"
                pending.append((bucket_of(post.submission), packed))
                size += len(packed)
                if size >= RUN_BYTES:
                    write_run()
                    size = 0
        write_run()
    with atomic_open(index_of(spool)) as file:
        np.save(file, np.stack(runs))
    return dict(counts)


def bucket_sizes(spools: Sequence[Path]) -> np.ndarray:
    """Bytes of each bucket over all files: int64 [BUCKETS]."""
    total = np.zeros(BUCKETS, np.int64)
    for spool in spools:
        total += np.diff(np.load(index_of(spool)), axis=1).sum(axis=0)
    return total


def read_buckets(spools: Sequence[Path], first: int, end: int) -> Iterator[Post]:
    """The posts of some buckets, from all files."""
    for spool in spools:
        with spool.open("rb") as file:
            for run in np.load(index_of(spool)):
                file.seek(int(run[first]))
                for line in file.read(int(run[end] - run[first])).splitlines():
                    yield unpack_post(line)


def index_of(spool: Path) -> Path:
    """The index of a file of `gather_dump`; it exists once the file is complete."""
    return spool.with_name(f"{spool.name}.index")


def _wanted_lines(piece: bytes, submissions: Table) -> Iterator[bytes]:
    """The lines of a piece that may be posts of these submissions, once each, in their order."""
    matches = list(_SUBMISSION_OF_COMMENT.finditer(piece))
    if len(matches) < piece.count(b"\n") + (not piece.endswith(b"\n")):  # not all of them are comments
        matches = sorted([*matches, *_ID.finditer(piece)], key=lambda match: match.start())
    if not matches:
        return
    line_end = 0
    for n in np.flatnonzero(submissions.contains(_numbers([match[1] for match in matches]))):
        start = matches[n].start()
        if start >= line_end:
            line_start = piece.rfind(b"\n", 0, start) + 1
            line_end = piece.find(b"\n", start) + 1 or len(piece)
            yield piece[line_start:line_end]


def _numbers(ids: Sequence[bytes]) -> np.ndarray:
    """Base 36 texts as numbers: uint64 [n]. What does not fit into 64 bits wraps, and the parser refuses it."""
    letters = np.array(ids, f"S{_WIDTH}").view(np.uint8).reshape(len(ids), _WIDTH)
    numbers = np.zeros(len(ids), np.uint64)
    for column in letters.T:
        numbers = np.where(column > 0, numbers * np.uint64(36) + _DIGIT[column], numbers)
    return numbers
