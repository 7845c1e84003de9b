"""The first pass over a dump: the submissions in which a comment links to an item of the catalogue.

A line is parsed only where its bytes may hold a link to Amazon, which few do.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
from ahocorasick_rs import BytesAhoCorasick, MatchKind

from lavic.data.links import asins, short_links
from lavic.data.reddit.dumps.dump_file import read_pieces
from lavic.data.reddit.dumps.id_table import write_table
from lavic.data.reddit.dumps.post import BadPost, post_key, post_text, read_object
from lavic.data.reddit.item_table import ItemTable

_LINE_END = ord("\n")
_PENDING_BYTES = 4 << 20
"""Lines are parsed in batches of this size: between the blocks of a dump, the parser would start with cold caches."""


def _in_any_case(word: str) -> list[bytes]:
    return ["".join(letters).encode() for letters in product(*({letter, letter.upper()} for letter in word))]


_NAME = re.compile(rb"amazon|amzn|a\.co[/\\%]", re.IGNORECASE)
"""Occurs in the JSON of every link, with slashes escaped or not, within a redirect or not."""
_LONGEST = len(b"amazon")
# The search is fastest for few short patterns with a rare letter.
_PARTS = BytesAhoCorasick(
    [part for name in ("maz", "mzn", "a.co") for part in _in_any_case(name)], matchkind=MatchKind.LeftmostFirst
)


def lines_that_may_link(piece: bytes) -> Iterator[bytes]:
    """The lines of a piece that name Amazon or its short links, in any case of letters, once each, in their order."""
    line_end = 0
    for _, position, _ in _PARTS.find_matches_as_indexes(piece):
        if position >= line_end and _NAME.search(piece, max(position - 1, 0), position - 1 + _LONGEST):
            line_start = piece.rfind(b"\n", 0, position) + 1
            line_end = piece.find(b"\n", position) + 1 or len(piece)
            yield piece[line_start:line_end]


def scan_dump(
    path: str, hits: Path, items: ItemTable, *, short: bool = False
) -> tuple[dict[str, int], dict[str, list[int]]]:
    """Writes a table (`hits`) of the submissions of a dump whose comments link to items of the catalogue.

    Returns:
        Lines by what they are, see `lavic.data.reddit.funnel`; with `short` also the short links, to be resolved, with
        the submissions that hold them.

    Raises:
        DataError: The dump cannot be read.
    """
    counts: Counter[str] = Counter()
    submissions: set[int] = set()
    unresolved: dict[str, list[int]] = {}
    pending: list[bytes] = []
    size = 0

    def parse_pending() -> None:
        counts.update(_scan_line(line, items, submissions, unresolved if short else None) for line in pending)
        pending.clear()

    for piece in read_pieces(path):
        counts["lines"] += int(np.count_nonzero(np.frombuffer(piece, np.uint8) == _LINE_END))
        counts["lines"] += not piece.endswith(b"\n")
        for line in lines_that_may_link(piece):
            pending.append(line)
            size += len(line)
        if size > _PENDING_BYTES:
            parse_pending()
            size = 0
    parse_pending()
    counts["without_a_link"] = counts["lines"] - sum(n for kind, n in counts.items() if kind != "lines")
    write_table(hits, np.fromiter(submissions, np.uint64, len(submissions)))
    return dict(counts), unresolved


def _scan_line(line: bytes, items: ItemTable, submissions: set[int], unresolved: dict[str, list[int]] | None) -> str:
    """What a line is; adds its submission to `submissions`, and its short links to `unresolved`."""
    try:
        row = read_object(line)
        post = post_key(row)
    except BadPost as error:
        return str(error)
    if not post.is_comment:
        return "submission"
    text = post_text(row)
    linked = asins(text)
    urls = short_links(text) if unresolved is not None or not linked else []
    if unresolved is not None:
        for url in urls:
            unresolved.setdefault(url, []).append(post.submission)
    if any(items.parents(linked)):
        submissions.add(post.submission)
        return "comment_with_an_item"
    if linked:
        return "item_not_in_catalogue"
    return "short_link_only" if urls else "name_without_a_link"
