"""The first pass over a dump: the submissions in which a comment links to an item of the catalogue.

A line is parsed only where its bytes may hold a link to Amazon, which few do.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from lavic.data.links import asins, short_links
from lavic.data.reddit.dumps.dump_file import read_pieces
from lavic.data.reddit.dumps.id_table import write_table
from lavic.data.reddit.dumps.post import BadPost, post_from_row, read_object
from lavic.data.reddit.item_table import ItemTable

_LINE_END = ord("\n")
_LOWER = 32
"""The bit that makes an ASCII letter small."""
_ROUND = 16
"""Pieces whose sizes agree but for so many bits share their room."""
_SHORT = re.compile(rb"a\.co[/\\%]")


def lines_that_may_link(piece: bytes) -> Iterator[bytes]:
    """The lines of a piece that name Amazon or its short links, once each, in their order."""
    end = 0
    for place in _names(piece):
        if place >= end:
            begin = piece.rfind(b"\n", 0, place) + 1
            end = piece.find(b"\n", place) + 1 or len(piece)
            yield piece[begin:end]


def _names(piece: bytes) -> Iterator[int]:
    """Where `amazon`, `amzn` or `a.co` with a slash stand, in letters of either size.

    Every link has one of these in its JSON, with slashes escaped or not, within a redirect or not. The rare letters of
    the names are compared with all bytes at once, which is several times faster than a search for the names.
    """
    text = np.frombuffer(piece, np.uint8)
    for place in _rare(text).tolist():
        near = piece[max(place - 3, 0) : place + 4].lower()
        if b"amazon" in near or b"amzn" in near or _SHORT.search(near):
            yield place


def _rare(text: np.ndarray) -> np.ndarray:
    """Where a `z` follows an `a` or `m`, or a `.` stands before a `c`: int64 [some], ascending."""
    count = len(text)
    room = _room(-(-count >> _ROUND) << _ROUND)
    lower, chosen, dots = room[0][:count], room[1], room[2][:count]
    np.bitwise_or(text, _LOWER, out=lower)
    np.equal(lower, ord("z"), out=chosen[:count])
    np.logical_or(chosen[:count], np.equal(lower, ord("."), out=dots), out=chosen[:count])
    chosen[count:] = False
    # Eight bytes at a time: most eights have neither.
    eights = np.flatnonzero(chosen.view(np.uint64).astype(np.bool_))
    row, column = np.nonzero(chosen.reshape(-1, 8)[eights])
    places = eights[row] * 8 + column
    before, after = lower[places - 1], lower[np.minimum(places + 1, count - 1)]
    named = (before == ord("a")) | (before == ord("m"))
    return places[np.where(lower[places] == ord("z"), named, after == ord("c"))]


@lru_cache(maxsize=4)
def _room(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Arrays for a piece of this size, which pieces of one size share: fresh memory would cost more than the search."""
    return np.empty(size, np.uint8), np.empty(size, np.bool_), np.empty(size, np.bool_)


def scan_dump(
    path: str, hits: Path, items: ItemTable, *, short: bool = False
) -> tuple[dict[str, int], dict[str, list[int]]]:
    """Finds the submissions of a dump whose comments link to items.

    Args:
        path: Of the dump.
        hits: Table of the submissions to write.
        items: The catalogue.
        short: Whether to return short links, for `lavic.shards.short_links` to resolve.

    Returns:
        Lines by what they are, see `lavic.data.reddit.funnel`; and short links with the submissions that hold them.

    Raises:
        DataError: The dump cannot be read.
    """
    counts: Counter[str] = Counter()
    found: set[int] = set()
    unresolved: dict[str, list[int]] = {}
    for piece in read_pieces(path):
        counts["lines"] += int(np.count_nonzero(np.frombuffer(piece, np.uint8) == _LINE_END))
        counts["lines"] += not piece.endswith(b"\n")
        for line in lines_that_may_link(piece):
            counts[_scan_line(line, items, found, unresolved if short else None)] += 1
    counts["without_a_link"] = counts["lines"] - sum(n for kind, n in counts.items() if kind != "lines")
    write_table(hits, np.fromiter(found, np.uint64, len(found)))
    return dict(counts), unresolved


def _scan_line(line: bytes, items: ItemTable, found: set[int], unresolved: dict[str, list[int]] | None) -> str:
    """What a line is; adds its submission to `found`, and its short links to `unresolved`."""
    row = read_object(line)
    if row is None:
        return "not_json"
    try:
        post = post_from_row(row)
    except BadPost as error:
        return str(error)
    if not post.is_comment:
        return "submission"
    linked = asins(post.text)
    urls = short_links(post.text) if unresolved is not None or not linked else []
    if unresolved is not None:
        for url in urls:
            unresolved.setdefault(url, []).append(post.submission)
    if any(items.parents(linked)):
        found.add(post.submission)
        return "comment_with_an_item"
    if linked:
        return "item_not_in_catalogue"
    return "short_link_only" if urls else "name_without_a_link"
