"""Posts, dumps and catalogues in the real formats, made by tests."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lavic.data.reddit.dumps.post import id_of
from lavic.storage.compression import zstd_module

ITEMS = [f"B0{n:08d}" for n in range(100)]
"""The catalogue; B1... are variants, B9... are of other shops."""


WORDS = "shave blade soap cream brush razor skin dry oily cheap sharp gentle daily travel gift badger"


def comment(id: str, link: str, parent: str, body: str, **fields: Any) -> dict[str, Any]:
    """A comment as Arctic Shift writes it, less its many empty fields."""
    return {
        "id": id,
        "name": f"t1_{id}",
        "link_id": f"t3_{link}",
        "parent_id": parent,
        "body": body,
        "author": "helper",
        "created_utc": 1_700_000_000,
        "score": 5,
        "subreddit": "wicked_edge",
        "retrieved_on": 1_700_200_000,
        **fields,
    }


def submission(id: str, title: str, selftext: str = "", **fields: Any) -> dict[str, Any]:
    """A submission."""
    return {
        "id": id,
        "name": f"t3_{id}",
        "title": title,
        "selftext": selftext,
        "author": "asker",
        "created_utc": 1_700_000_000,
        "score": 9,
        "subreddit": "wicked_edge",
        "is_self": True,
        "retrieved_on": 1_700_200_000,
        **fields,
    }


def dp(item: str) -> str:
    """A link to an item."""
    return f"https://www.amazon.com/dp/{item}"


def write_dump(path: Path, rows: Iterable[Mapping[str, Any] | bytes], *, frames: int = 1, window_log: int = 28) -> Path:
    """Writes rows as a dump: frames of zstd with a large window; rows of bytes as they are."""
    zstd = zstd_module()
    options = {zstd.CompressionParameter.window_log: window_log, zstd.CompressionParameter.compression_level: 1}
    options[zstd.CompressionParameter.checksum_flag] = 1
    lines = [row if isinstance(row, bytes) else json.dumps(row, separators=(",", ":")).encode() + b"\n" for row in rows]
    size = -(-len(lines) // frames) or 1
    with path.open("wb") as file:
        for start in range(0, max(len(lines), 1), size):
            compressor = zstd.ZstdCompressor(options=options)
            file.write(compressor.compress(b"".join(lines[start : start + size])) + compressor.flush())
    return path


def write_items(path: Path, ids: Sequence[str] = ITEMS) -> Path:
    """Writes item metadata of Amazon Reviews 2023: no `asin`, only `parent_asin`."""
    rows = ({"parent_asin": id, "title": f"Item {id}", "images": [], "categories": ["Beauty", "Hair"]} for id in ids)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def write_reviews(path: Path, variants: Mapping[str, str]) -> Path:
    """Writes reviews, packed, which name the parent of each variant."""
    rows = ({"asin": child, "parent_asin": parent, "rating": 5.0, "text": "x"} for child, parent in variants.items())
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def drawn_posts(
    threads: int, comments: int, seed: int = 0, *, one_in: int = 3
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Submissions and comments of many threads, one in `one_in` with links to items."""
    draw = random.Random(seed)
    words = WORDS.split()
    titles, bodies = [], []
    for n in range(threads):
        link, start = id_of(1_000_000 + n), 1_600_000_000 + n * 3600
        text = " ".join(draw.choices(words, k=14))
        titles.append(submission(link, f"Which {text}?", text, author=f"asker{n}", created_utc=start))
        ids: list[str] = []
        for k in range(comments):
            id = id_of(50_000_000 + n * comments + k)
            parent = f"t1_{draw.choice(ids)}" if ids and draw.random() < 0.6 else f"t3_{link}"
            body = " ".join(draw.choices(words, k=draw.randint(4, 30)))
            if n % one_in == 0 and draw.random() < 0.2:
                body += f" try {dp(draw.choice(ITEMS))} é"
            author = f"user{draw.randrange(500)}"
            bodies.append(comment(id, link, parent, body, author=author, created_utc=start + 60 * k + 60))
            ids.append(id)
    return titles, bodies
