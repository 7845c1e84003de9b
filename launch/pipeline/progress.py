"""How far a step of the pipeline is and how long it will still take, by the files in its folder."""

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
from lavic.launch.slurm.log_file import TAIL_BYTES, read_tail
from lavic.tracking.journal import JOURNAL_FILE, parse_line

_RECENT = 50
"""Files whose modification times give the current speed."""


def progress(step: Step) -> str:
    """How far a step is, in a few words; "" where nothing is known yet."""
    if step.stage == "verify":
        return ""
    if step.stage == "evaluate":
        return _hit_rate(step.output)
    if step.stage in ("describe", "embed"):
        done, total = _part_files(step)
        unit = "shards" if step.stage == "describe" else "parts"
        return f"{len(done)} of {total} {unit}" if total else f"{len(done)} {unit}" if done else ""
    return _last_metrics(step.output / JOURNAL_FILE)


def remaining_seconds(step: Step, expected: int | None = None) -> float | None:
    """Seconds that a running step (a crawl: of `expected` photos) will still take at its current speed, if known."""
    if step.stage in ("describe", "embed"):
        done, total = _part_files(step)
        times = sorted(file.stat().st_mtime for file in done if file.exists())[-_RECENT:]
        if len(times) < 2 or len(done) >= total or times[-1] <= times[0]:
            return None
        seconds_per_part = (times[-1] - times[0]) / (len(times) - 1)
        return max(0.0, seconds_per_part * (total - len(done)) - (time.time() - times[-1]))
    if step.stage in ("crawl", "distill", "tune"):
        journal = step.output / JOURNAL_FILE
        total_steps = expected if step.stage == "crawl" else _total_steps(journal)
        return _remaining_by_journal(_last_records(journal), total_steps)
    return None


def _remaining_by_journal(records: Sequence[dict[str, Any]], total: int | None) -> float | None:
    """Remaining seconds, by the speed since the last start in a journal."""
    first = max((n for n, record in enumerate(records) if record.get("event") in ("start", "resume")), default=0)
    steps = [record for record in records[first:] if "event" not in record and "time" in record]
    if total is None or len(steps) < 2 or steps[-1]["step"] <= steps[0]["step"]:
        return None
    seconds_per_step = (steps[-1]["time"] - steps[0]["time"]) / (steps[-1]["step"] - steps[0]["step"])
    return max(0.0, seconds_per_step * (total - steps[-1]["step"]))


def _part_files(step: Step) -> tuple[list[Path], int]:
    """Files of the parts that are done, and the number of parts; 0 where that is not known yet."""
    if step.stage == "embed":
        try:
            total = len(json.loads((step.output / "plan.json").read_text("utf-8"))["shards"])
        except (OSError, ValueError, KeyError, TypeError):
            total = 0
        return sorted(step.output.glob("part-*.json")), total
    try:
        manifest = Manifest.load(step.output, check=False)
    except DataError:
        return [], 0
    sidecars = [descriptions_path(manifest.path(shard)) for shard in manifest.shards]
    return [file for file in sidecars if file.is_file()], len(sidecars)


def _hit_rate(folder: Path) -> str:
    try:
        results = json.loads((folder / "results.json").read_text("utf-8"))
        return f"hit rate {results['hit_rate'][results['main']]['value']:.3f}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _last_metrics(journal: Path) -> str:
    records = [record for record in _last_records(journal) if "event" not in record]
    if not records:
        return ""
    total = _total_steps(journal)
    metrics: dict[str, float] = {}
    for name in ("loss", "valid_loss", "photos_per_second"):
        value = next((record[name] for record in reversed(records) if record.get(name) is not None), None)
        if value is not None:
            metrics[name] = value
    step = f"step {records[-1]['step']}" + (f" of {total}" if total else "")
    return ", ".join(chain([step], (f"{name} {value:.4g}" for name, value in metrics.items())))


def _total_steps(journal: Path) -> int | None:
    """Steps of the run, which a training writes to its journal when it starts."""
    try:
        with journal.open("rb") as file:
            records = [record for line in file.read(TAIL_BYTES).splitlines() if (record := parse_line(line))]
    except OSError:
        return None
    return next((record["total"] for record in records if record.get("event") == "resume" and "total" in record), None)


def _last_records(journal: Path) -> list[dict[str, Any]]:
    return [record for line in read_tail(journal) if (record := parse_line(line))]
