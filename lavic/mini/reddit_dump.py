"""A Reddit dump of the synthetic catalogue: monthly `RS_` and `RC_` files whose answers link to its items.

The rows have the fields of Arctic Shift's dumps that matter here. January holds threads about training items, February
about validation items, March about test items, so that a split by time keeps the items apart.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lavic.data.conversations import read_conversations
from lavic.data.reddit.dumps.post import id_of
from lavic.data.schema import Conversation
from lavic.mini.catalog import BRANDS, COMMENTS, LINES
from lavic.storage.atomic import atomic_write
from lavic.storage.compression import zstd_module

MONTHS = {"train": 1, "valid": 2, "test": 3}
"""Split of the synthetic conversations -> month of 2024 of its threads."""
VALID_FROM, TEST_FROM = "2024-02-01", "2024-03-01"
"""First days of validation and test, for `--split.valid-from` and `--split.test-from`."""

_FIRST_ID = 36**5
_THREAD_IDS = 10
_SECONDS_PER_MONTH = 27 * 86400
_LEVEL = 9


def write_reddit_dump(catalog: Path, out: Path, *, seed: int = 0, limits: Mapping[str, int] | None = None) -> int:
    """Writes `RS_2024-0M.zst` and `RC_2024-0M.zst` for each split of a synthetic catalogue.

    Args:
        catalog: Folder of `write_catalogue`; its train, valid and test conversations become threads.
        out: Folder for the dump.
        seed: Of the text around the requests.
        limits: Split -> number of its threads, at most; by default all.

    Returns:
        The number of threads.

    Raises:
        DataError: The folder has no synthetic conversations.
    """
    out.mkdir(parents=True, exist_ok=True)
    total = 0
    for split, month in MONTHS.items():
        rows = read_conversations(catalog / f"{split}.jsonl")[: (limits or {}).get(split)]
        rng = random.Random(f"{split} {seed}")
        start = int(datetime(2024, month, 1, tzinfo=timezone.utc).timestamp())
        step = _SECONDS_PER_MONTH // len(rows)
        submissions, comments = [], []
        for number, row in enumerate(rows):
            posts = list(_thread(row, (month << 20) + number, start + number * step, rng))
            submissions.append(posts[0])
            comments += posts[1:]
        for kind, posts in (("RS", submissions), ("RC", comments)):
            atomic_write(out / f"{kind}_2024-{month:02d}.zst", _compress(posts))
        total += len(rows)
    return total


def _thread(row: Conversation, number: int, created: int, rng: random.Random) -> Iterator[dict[str, Any]]:
    """The submission of a conversation, its comments, and posts that are not part of it."""
    first = _FIRST_ID + number * _THREAD_IDS
    link = id_of(first)
    # Random product names make each post unique: equal requests would be dropped as near-duplicates.
    names = [f"{rng.choice(BRANDS.split())} {rng.choice(LINES.split())}" for _ in range(2)]
    texts = [turn.text for turn in row.turns]
    yield {
        **_post(link, f"asker_{number}", created),
        "name": f"t3_{link}",
        "title": texts[0],
        "selftext": f"I have the {names[0]} and the {names[1]} now.",
        "is_self": True,
    }
    parent, time = f"t3_{link}", created
    answer = f"This one: https://www.amazon.com/dp/{row.targets[0]}"
    for offset, text in enumerate([*texts[1:], answer], 1):
        id, time = id_of(first + offset), time + rng.randrange(60, 3600)
        yield _comment(id, link, parent, text, f"helper_{rng.randrange(500)}", time)
        parent = f"t1_{id}"
    # Rows that `lavic reddit` must leave out: a bot, a deleted post, a comment without a link.
    id = id_of(first + _THREAD_IDS - 1)
    match rng.randrange(4):
        case 0:
            body = f"I am a bot. https://www.amazon.com/dp/{row.targets[0]}"
            yield _comment(id, link, f"t3_{link}", body, "price_bot", time)
        case 1:
            yield _comment(id, link, f"t3_{link}", "[deleted]", "[deleted]", time)
        case 2:
            yield _comment(id, link, f"t3_{link}", rng.choice(COMMENTS), f"helper_{rng.randrange(500)}", time)


def _comment(id: str, link: str, parent: str, body: str, author: str, created: int) -> dict[str, Any]:
    post = _post(id, author, created)
    return {**post, "name": f"t1_{id}", "link_id": f"t3_{link}", "parent_id": parent, "body": body}


def _post(id: str, author: str, created: int) -> dict[str, Any]:
    return {"id": id, "author": author, "created_utc": created, "score": 5, "subreddit": "drawn"}


def _compress(rows: Iterable[Mapping[str, Any]]) -> bytes:
    text = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
    return bytes(zstd_module().compress(text.encode(), _LEVEL))
