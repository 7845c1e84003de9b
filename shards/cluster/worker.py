"""The work of a crawl's worker, on Ray or in a local process: one shard, and its result as plain values."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lavic.errors import ConfigError, DataError
from lavic.shards.crawl_settings import CrawlSettings
from lavic.shards.pack.output_lock import Superseded, check_owner
from lavic.shards.pack.seal import pack_seal
from lavic.shards.pack.shard_writer import Report, pack_shard
from lavic.shards.ratelimit.client import CoordinatorHandle
from lavic.storage.output_folder import not_writable
from lavic.storage.paths import as_path, storage_errors

Row = dict[str, Any]

_DEFER_AFTER_S = 5.0
"""Seconds that a worker waits if a shard only lacks photos of slow hosts; then it continues with others."""
_DEFER_FACTOR = 4
"""At the next attempt at such a shard it waits so many times longer."""


def shard_row(number: int, shard: str, digest: str, settings: str, refresh: str) -> Row:
    """What a worker needs to know about a shard; `settings` are `Plan.digested_settings`."""
    return {
        "number": number,
        "shard": shard,
        "digest": digest,
        "settings": settings,
        "refresh": refresh,
        "defer_after": _DEFER_AFTER_S,
        "deferred": False,
    }


def deferred_row(row: Row) -> Row:
    """The row of a shard that a worker has deferred, to be made after the others."""
    return {**row, "defer_after": row["defer_after"] * _DEFER_FACTOR, "deferred": True}


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """A running job."""

    made: Iterator[Row]
    """What `make_shard` returned for each shard, in the order of completion."""
    running: Callable[[], Mapping[int, Mapping[str, int]]]
    """Photos by outcome of each shard that is being made, as last reported."""
    wait_reasons: Callable[[], Mapping[str, str]]
    """Why photos wait, by host."""


def make_shard(row: Row, settings: CrawlSettings, owner: str, coordinator: CoordinatorHandle, report: Report) -> Row:
    """Make one shard, or defer it if it only waits for slow hosts: then `left` photos are missing.

    An error of the output folder, or of the plan in it, is returned in `error`, and the driver raises it.
    """
    _freeze()
    folder = as_path(settings.out)
    result = {"number": row["number"], "seal": "", "error": "", "left": 0}
    try:
        seal = pack_shard(
            folder / row["shard"],
            row["digest"],
            settings.fetch,
            settings.photo,
            # What was retried before the shard was deferred is not retried again.
            () if row["deferred"] else settings.retry,
            plan_settings=row["settings"],
            coordinator=coordinator,
            refresh=row["refresh"],
            report=report,
            before_publish=lambda: check_owner(folder, owner),
            defer_after=row["defer_after"],
        )
        return {**result, "seal": pack_seal(seal), "left": seal.left}
    except (Superseded, ConfigError, DataError) as error:
        return {**result, "error": str(error)}
    except storage_errors() as error:
        return {**result, "error": str(not_writable(folder, error))}


@lru_cache(maxsize=1)
def _freeze() -> None:
    """Collect garbage rarely, and never what is loaded: there is little of it, and it takes a tenth of the time."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
