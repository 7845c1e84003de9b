"""What a worker of a crawl does, on Ray or in a process of its own: one shard, and what came of it as plain values."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lavic.errors import ConfigError, first_line
from lavic.shards.crawl_settings import CrawlSettings
from lavic.shards.pack.output_lock import Superseded, check
from lavic.shards.pack.seal import pack_seal
from lavic.shards.pack.shard_writer import Report, pack_shard
from lavic.shards.ratelimit.client import Office
from lavic.storage.paths import place, storage_errors

Row = dict[str, Any]

_LEAVE_S = 5.0
"""Seconds that a worker waits at first when a shard only lacks photos of slow hosts; then it goes on with others."""
_LONGER = 4
"""Each time that it comes back to such a shard it waits so many times longer."""


def shard_row(number: int, shard: str, digest: str, refresh: str) -> Row:
    """What a worker needs to know of a shard."""
    return {
        "number": number,
        "shard": shard,
        "digest": digest,
        "refresh": refresh,
        "leave_after": _LEAVE_S,
        "again": False,
    }


def later(row: Row) -> Row:
    """The row of a shard that a worker has left, to be made when the others are."""
    return {**row, "leave_after": row["leave_after"] * _LONGER, "again": True}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job that runs."""

    made: Iterator[Row]
    """What `make_shard` returned, shard by shard, as they become whole."""
    running: Callable[[], Mapping[int, Mapping[str, int]]]
    """Photos by outcome of each shard that is being made, as last reported."""
    waits: Callable[[], Mapping[str, str]]
    """Why photos wait, by host."""


def make_shard(row: Row, settings: CrawlSettings, owner: str, office: Office, report: Report) -> Row:
    """Make one shard, or leave it where it only waits for slow hosts: then `left` photos are missing.

    A folder that cannot be written to is a value, so that the driver ends with one line.
    """
    _freeze()
    folder = place(settings.out)
    made = {"number": row["number"], "seal": "", "error": "", "taken": False, "left": 0}
    try:
        seal = pack_shard(
            folder / row["shard"],
            row["digest"],
            settings.fetch,
            settings.photo,
            # What was tried again before the shard was left is not tried once more.
            () if row["again"] else settings.retry,
            office=office,
            refresh=row["refresh"],
            report=report,
            publish=lambda: check(folder, owner),
            leave_after=row["leave_after"],
        )
        return {**made, "seal": pack_seal(seal), "left": seal.left}
    except (Superseded, ConfigError) as error:
        return {**made, "error": str(error), "taken": True}
    except storage_errors() as error:
        return {**made, "error": first_line(error)}


@lru_cache(maxsize=1)
def _freeze() -> None:
    """Leave what is loaded by now out of the garbage collector's rounds: a tenth of a photo's time."""
    gc.freeze()
