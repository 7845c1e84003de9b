"""Whether a step of the pipeline is done: by what stands in its folder, never by what a job said."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path

from lavic.data.descriptions import descriptions_path
from lavic.data.manifest import NAME, Manifest, digest_manifest
from lavic.errors import DataError
from lavic.journal import FILE, parse_line
from lavic.launch.pipeline import Stage
from lavic.launch.steps import Step

_TAIL = 1 << 16


def is_whole(step: Step) -> bool:
    """Whether the step's own mark of a whole result stands: a manifest, a receipt, a result."""
    return _WHOLE[step.stage](step.place)


def progress(step: Step) -> str:
    """How far a step is, in a few words; "" where there is nothing to tell yet."""
    if step.stage == "verify":
        return ""
    if step.stage == "describe":
        return _described(step.place)
    if step.stage == "embed":
        parts = sum(1 for _ in step.place.glob("part-*.json"))
        return f"{parts} parts" if parts else ""
    return _evaluated(step.place) if step.stage == "evaluate" else _last_metric(step.place / FILE)


def _is_set(folder: Path) -> bool:
    try:
        Manifest.load(folder)
    except DataError:
        return False
    return True


def _is_verified(receipt: Path) -> bool:
    """The set is the one that was verified; a crawl that went on since has written another manifest."""
    try:
        digest: str = json.loads(receipt.read_text("utf-8"))["manifest"]
        return digest == digest_manifest(receipt.with_name(receipt.name.removesuffix(".verified.json")))
    except (OSError, DataError, ValueError, KeyError, TypeError):
        return False


def _is_described(folder: Path) -> bool:
    """Every shard has descriptions that are not older than itself; a shard that was packed anew may hold more."""
    try:
        manifest = Manifest.load(folder)
        shards = [manifest.path(shard) for shard in manifest.shards]
        return all(descriptions_path(s).stat().st_mtime_ns >= s.stat().st_mtime_ns for s in shards)
    except (DataError, OSError):
        return False


_WHOLE: dict[Stage, Callable[[Path], bool]] = {
    "crawl": _is_set,
    "verify": _is_verified,
    "describe": _is_described,
    "distill": lambda run: (run / "result.json").is_file(),
    "embed": lambda store: (store / NAME).is_file(),
    "tune": lambda run: (run / "result.json").is_file(),
    "evaluate": lambda folder: (folder / "results.json").is_file(),
}


def _described(folder: Path) -> str:
    try:
        shards = Manifest.load(folder, check=False).shards
    except DataError:
        return ""
    done = sum(descriptions_path(folder / shard.name).is_file() for shard in shards)
    return f"{done} of {len(shards)} shards"


def _evaluated(folder: Path) -> str:
    try:
        results = json.loads((folder / "results.json").read_text("utf-8"))
        return f"hit rate {results['hit_rate'][results['main']]['value']:.3f}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _last_metric(journal: Path) -> str:
    """The last numbers of a journal, without reading all of it."""
    try:
        with journal.open("rb") as file:
            file.seek(max(0, journal.stat().st_size - _TAIL))
            lines = file.read().splitlines()
    except OSError:
        return ""
    records = [record for line in lines if (record := parse_line(line)) and "event" not in record]
    shown: dict[str, float] = {}
    for name in ("loss", "valid_loss", "photos_per_second"):
        found = next((record[name] for record in reversed(records) if record.get(name) is not None), None)
        if found is not None:
            shown[name] = found
    if not records:
        return ""
    numbers = chain([f"step {records[-1]['step']}"], (f"{name} {value:.4g}" for name, value in shown.items()))
    return ", ".join(numbers)
