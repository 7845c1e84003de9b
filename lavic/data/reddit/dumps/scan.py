"""The first pass over a dump: the submissions in which a comment links to an item of the catalogue.

A line is parsed only where its bytes may hold a link to Amazon, which few do.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lavic.data.links import asins, short_links
from lavic.data.reddit.dumps.dump_file import read_pieces
from lavic.data.reddit.dumps.id_table import write_table
from lavic.data.reddit.dumps.post import BadPost, post_from_row, read_object
from lavic.data.reddit.item_table import ItemTable

# Each starts with a rare letter, which C's memchr looks for: several times faster than a pattern of the names.
_RARE = (re.compile(rb"z[oO]?[nN]"), re.compile(rb"Z[oO]?[nN]"), re.compile(rb"\.[cC][oO](?=[/\\%])"))
_NAMED = re.compile(rb"am(?:azon|zn)|a\.co[/\\%]", re.IGNORECASE)
"""What every link has in its JSON, with slashes escaped or not, within a redirect or not."""


def lines_that_may_link(piece: bytes) -> Iterator[bytes]:
    """The lines of a piece that name Amazon or its short links, once each, in their order."""
    end = 0
    for rare in sorted(match.start() for pattern in _RARE for match in pattern.finditer(piece)):
        # It is the fourth letter of `amazon`, the third of `amzn`, or the dot of `a.co`.
        if rare >= end and any(_NAMED.match(piece, rare - n) for n in (3, 2, 1) if rare >= n):
            begin = piece.rfind(b"\n", 0, rare) + 1
            end = piece.find(b"\n", rare) + 1 or len(piece)
            yield piece[begin:end]


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
        counts["lines"] += piece.count(b"\n") + (not piece.endswith(b"\n"))
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
    urls = short_links(post.text)
    if unresolved is not None:
        for url in urls:
            unresolved.setdefault(url, []).append(post.submission)
    if any(items.parents(linked)):
        found.add(post.submission)
        return "comment_with_an_item"
    if linked:
        return "item_not_in_catalogue"
    return "short_link_only" if urls else "name_without_a_link"
