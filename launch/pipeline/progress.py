"""How far a step of the pipeline is, and how long it will take still: by what stands in its folder."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from lavic.data.descriptions import descriptions_path
from lavic.data.manifest import Manifest
from lavic.errors import DataError
from lavic.launch.pipeline.dag import Step
from lavic.tracking.journal import JOURNAL_FILE, parse_line

_TAIL = 1 << 16
_RECENT = 50
"""Files whose times tell how fast a step is of late."""


def progress(step: Step) -> str:
    """How far a step is, in a few words; "" where there is nothing to tell yet."""
    if step.stage == "verify":
        return ""
    if step.stage == "evaluate":
        return _evaluated(step.place)
    if step.stage in ("describe", "embed"):
        done, total = _files(step)
        unit = "shards" if step.stage == "describe" else "parts"
        return f"{len(done)} of {total} {unit}" if total else f"{len(done)} {unit}" if done else ""
    return _last_metric(step.place / JOURNAL_FILE)


def remaining(step: Step, expected: int | None = None) -> float | None:
    """Seconds that a running step will take still at its speed of late; None where that cannot be told.

    Args:
        step: The step.
        expected: Of a crawl: about how many photos there are.
    """
    if step.stage in ("describe", "embed"):
        done, total = _files(step)
        times = sorted(file.stat().st_mtime for file in done if file.exists())[-_RECENT:]
        if len(times) < 2 or len(done) >= total or times[-1] <= times[0]:
            return None
        each = (times[-1] - times[0]) / (len(times) - 1)
        return max(0.0, each * (total - len(done)) - (time.time() - times[-1]))
    if step.stage in ("crawl", "distill", "tune"):
        journal = step.place / JOURNAL_FILE
        return _by_journal(_tail(journal), expected if step.stage == "crawl" else _total(journal))
    return None


def _by_journal(records: Sequence[dict[str, Any]], total: int | None) -> float | None:
    """By the steps since the last start in a journal."""
    first = max((number for number, one in enumerate(records) if one.get("event") in ("start", "resume")), default=0)
    steps = [one for one in records[first:] if "event" not in one and "time" in one]
    if total is None or len(steps) < 2 or steps[-1]["step"] <= steps[0]["step"]:
        return None
    each = (steps[-1]["time"] - steps[0]["time"]) / (steps[-1]["step"] - steps[0]["step"])
    return max(0.0, each * (total - steps[-1]["step"]))


def _files(step: Step) -> tuple[list[Path], int]:
    """Files of the parts that are done, and how many there will be; 0 where that is not known yet."""
    if step.stage == "embed":
        try:
            total = len(json.loads((step.place / "plan.json").read_text("utf-8"))["shards"])
        except (OSError, ValueError, KeyError, TypeError):
            total = 0
        return sorted(step.place.glob("part-*.json")), total
    try:
        manifest = Manifest.load(step.place, check=False)
    except DataError:
        return [], 0
    sidecars = [descriptions_path(manifest.path(shard)) for shard in manifest.shards]
    return [file for file in sidecars if file.is_file()], len(sidecars)


def _evaluated(folder: Path) -> str:
    try:
        results = json.loads((folder / "results.json").read_text("utf-8"))
        return f"hit rate {results['hit_rate'][results['main']]['value']:.3f}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _last_metric(journal: Path) -> str:
    """The last numbers of a journal."""
    records = [record for record in _tail(journal) if "event" not in record]
    if not records:
        return ""
    total = _total(journal)
    shown: dict[str, float] = {}
    for name in ("loss", "valid_loss", "photos_per_second"):
        found = next((record[name] for record in reversed(records) if record.get(name) is not None), None)
        if found is not None:
            shown[name] = found
    step = f"step {records[-1]['step']}" + (f" of {total}" if total else "")
    return ", ".join(chain([step], (f"{name} {value:.4g}" for name, value in shown.items())))


def _total(journal: Path) -> int | None:
    """Steps of the whole run, which a training notes when it starts."""
    try:
        with journal.open("rb") as file:
            records = [record for line in file.read(_TAIL).splitlines() if (record := parse_line(line))]
    except OSError:
        return None
    return next((record["total"] for record in records if record.get("event") == "resume" and "total" in record), None)


def _tail(journal: Path) -> list[dict[str, Any]]:
    """The last records of a journal, without reading all of it."""
    try:
        with journal.open("rb") as file:
            file.seek(max(0, journal.stat().st_size - _TAIL))
            return [record for line in file.read().splitlines() if (record := parse_line(line))]
    except OSError:
        return []
