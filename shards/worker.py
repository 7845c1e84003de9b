"""What a worker of a crawl does, on Ray or in a process of its own: one shard, and what came of it as plain values."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lavic.data.place import place, storage_errors
from lavic.errors import ConfigError, first_line
from lavic.shards.lane import Office
from lavic.shards.owner import Superseded, check
from lavic.shards.pack import Report, pack_seal, pack_shard
from lavic.shards.settings import CrawlSettings

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job that runs."""

    made: Iterator[Row]
    """What `make_shard` returned, shard by shard, as they become whole."""
    running: Callable[[], Mapping[int, Mapping[str, int]]]
    """Photos by outcome of each shard that is being made, as last reported."""


def make_shard(row: Row, settings: CrawlSettings, owner: str, office: Office, report: Report) -> Row:
    """Make one shard. A folder that cannot be written to is a value, so that the driver ends with one line."""
    _freeze()
    folder = place(settings.out)
    made = {"number": row["number"], "seal": "", "error": "", "taken": False}
    try:
        seal = pack_shard(
            folder / row["shard"],
            row["digest"],
            settings.fetch,
            settings.photo,
            settings.retry,
            office=office,
            refresh=row["refresh"],
            report=report,
            publish=lambda: check(folder, owner),
        )
        return {**made, "seal": pack_seal(seal)}
    except (Superseded, ConfigError) as error:
        return {**made, "error": str(error), "taken": True}
    except storage_errors() as error:
        return {**made, "error": first_line(error)}


@lru_cache(maxsize=1)
def _freeze() -> None:
    """Leave what is loaded by now out of the garbage collector's rounds: a tenth of a photo's time."""
    gc.freeze()
