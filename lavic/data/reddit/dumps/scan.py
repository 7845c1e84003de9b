"""The first pass over a dump: the submissions in which a comment links to an item of the catalogue.

A line is parsed only where its bytes may hold a link to Amazon, which few do.
"""

from __future__ import annotations

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
"""Pieces of sizes that agree but for so many bits share their room."""
_AFTER_SHORT = (b"/", b"\\", b"%")


def lines_that_may_link(piece: bytes) -> Iterator[bytes]:
    """The lines of a piece that name Amazon or its short links, once each, in their order."""
    end = 0
    for place in sorted(_names(piece)):
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
    lower, chosen = (room[: len(text)] for room in _room(-(-len(text) >> _ROUND) << _ROUND))
    np.bitwise_or(text, _LOWER, out=lower)
    z = np.flatnonzero(np.equal(lower, ord("z"), out=chosen))
    before = lower[z - 1]
    for place in z[(before == ord("a")) | (before == ord("m"))].tolist():
        near = piece[max(place - 3, 0) : place + 3].lower()
        if near == b"amazon" or b"amzn" in near:
            yield place
    dots = np.flatnonzero(np.equal(lower, ord("."), out=chosen))
    dots = dots[dots + 1 < len(text)]
    for place in dots[lower[dots + 1] == ord("c")].tolist():
        near = piece[max(place - 1, 0) : place + 4].lower()
        if near[:-1] == b"a.co" and near[-1:] in _AFTER_SHORT:
            yield place


@lru_cache(maxsize=4)
def _room(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Arrays for a piece of this size, which pieces of one size share: fresh memory would cost more than the search."""
    return np.empty(size, np.uint8), np.empty(size, np.bool_)


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
