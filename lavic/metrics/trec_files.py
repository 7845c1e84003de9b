"""Run and qrels files of TREC, which trec_eval, ir-measures and ranx read.

A run has a line `QUERY Q0 ITEM RANK SCORE TAG` for each ranked item, qrels a line `QUERY 0 ITEM RELEVANCE`. As in
trec_eval, the scores decide the order, and the column of ranks is not read.
"""

from __future__ import annotations

import hashlib
import math
import string
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import quote, unquote

import numpy as np

from lavic.errors import DataError
from lavic.storage.atomic import atomic_open, to_utf8
from lavic.storage.text_files import read_lines

_SAFE = string.punctuation.replace("%", "")


def read_run(path: str | Path) -> dict[str, list[tuple[str, float]]]:
    """The items of each query with their scores, highest first; items of equal score in no particular order.

    Raises:
        DataError: The file is not a run, or names an item twice for a query.
    """
    run: dict[str, dict[str, float]] = {}
    for number, line in read_lines(path):
        columns = line.split()
        if not columns:
            continue
        if len(columns) != 6:
            raise DataError(
                f"{path}:{number}: {len(columns)} columns where a TREC run has 6: query, Q0, item, rank, score, tag"
            )
        query, item, score = plain(columns[0]), plain(columns[2]), _score(columns[4])
        if score is None:
            raise DataError(f"{path}:{number}: the score {columns[4][:20]!r} is not a number")
        items = run.setdefault(query, {})
        if item in items:
            raise DataError(f"{path}:{number}: {item} is there twice for the query {query}")
        items[item] = score
    if not run:
        raise DataError(f"{path}: no line in it")
    return {query: sorted(items.items(), key=lambda pair: -pair[1]) for query, items in run.items()}


def write_run(path: Path, rows: Iterable[tuple[str, Sequence[str], Sequence[float]]], *, tag: str) -> None:
    """Writes a run.

    Scores fall strictly within a query, so that no reader has ties to break; tied items are in an order that depends on
    their ids and the query's alone.

    Args:
        path: The file.
        rows: Query, its items best first, and the score of each; no scores stand for an order without ties.
        tag: Name of the run.
    """
    with atomic_open(path) as file:
        for query, items, scores in rows:
            ranked = list(zip(items, scores or [-float(rank) for rank in range(len(items))], strict=True))
            ranked.sort(key=lambda pair: (-pair[1], hashlib.blake2b(to_utf8(f"{query}\0{pair[0]}")).digest()))
            falling = _falling([score for _, score in ranked])
            for rank, ((item, _), score) in enumerate(zip(ranked, falling, strict=True), 1):
                file.write(to_utf8(f"{token(query)} Q0 {token(item)} {rank} {score} {token(tag)}\n"))


def write_qrels(path: Path, rows: Iterable[tuple[str, Sequence[str]]]) -> None:
    """Writes qrels; a row is a query with its relevant items."""
    with atomic_open(path) as file:
        for query, items in rows:
            for item in dict.fromkeys(items):
                file.write(to_utf8(f"{token(query)} 0 {token(item)} 1\n"))


def token(text: str) -> str:
    """A text as one ASCII word: white space, % and what is not ASCII are escaped as in a URL."""
    return quote(text, safe=_SAFE, errors="surrogatepass") or "%"


def plain(word: str) -> str:
    """The text that `token` made a word of. A word with other escapes, of another program's ids, is text as it is."""
    if word == "%":
        return ""
    try:
        return unquote(word, errors="surrogatepass")
    except UnicodeDecodeError:
        return word


def _score(word: str) -> float | None:
    try:
        score = float(word)
    except ValueError:
        return None
    return score if math.isfinite(score) else None


def _falling(scores: Sequence[float]) -> list[str]:
    """Scores that fall strictly in single precision, in which trec_eval keeps them."""
    texts: list[str] = []
    last = np.float32(np.inf)
    for score in scores:
        value = np.float32(score)
        if value >= last:
            value = np.nextafter(last, np.float32(-np.inf))
        texts.append(str(value))
        last = value
    return texts
