"""The journal of a run, `metrics.jsonl`: one JSON line for each metrics record or event."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lavic.config.secrets import redact_all
from lavic.errors import LavicError
from lavic.storage.file_lock import FileLock

JOURNAL_FILE = "metrics.jsonl"
_MAX_PARENT_LEVELS = 3
"""How many folders up a parent run may be: PIPELINE/runs/distill is two below PIPELINE."""


class Journal:
    """Appends to a run's journal. One process writes it: rank 0.

    A line is a metrics record, {"time", "step", ...values}, or an event, {"time", "event", ...fields}. Each line is a
    single write, so that a reader never sees half of one and a crash loses at most the last. The file is locked while
    it is open: `lavic sync` tells from the lock whether the run is alive.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.path)
        self._lock.acquire(timeout_s=1.0)  # `is_held` holds it for an instant
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            os.write(self._file, b"\n")  # ends a line cut by a full disk or a crash

    def log(self, step: int, **values: Any) -> None:
        """Records numbers of `step` (optimizer steps done). Numbers may be tensors of one element."""
        self._append({"step": int(step), **{key: _number(value) for key, value in values.items()}})

    def event(self, name: str, /, **fields: Any) -> None:
        """Records an event, with secrets removed. `event("resume", step=40)` voids every record beyond step 40."""
        self._append({"event": name, **redact_all(fields)})

    def close(self, status: str = "") -> None:
        """Closes the file; with a status, after recording the event "end"."""
        if self._file >= 0:
            if status:
                self.event("end", status=status)
            os.close(self._file)
            self._file = -1
            self._lock.release()

    def _append(self, record: dict[str, Any]) -> None:
        text = json.dumps({"time": round(time.time(), 3), **record}, ensure_ascii=False, default=str)
        line = text.encode("utf-8", "backslashreplace") + b"\n"  # a lone surrogate becomes JSON's escape
        try:
            incomplete = os.write(self._file, line) < len(line)
            reason = "the disk is full"
        except OSError as error:
            incomplete, reason = True, error.strerror or str(error)
        if incomplete:
            raise LavicError(f"{self.path} cannot be written ({reason}): make room, then run the same command again")


def parent_run_dirs(run_dir: Path) -> Iterator[Path]:
    """The folders of the runs that this run's folder lies in, the nearest first."""
    return (folder for folder in run_dir.resolve().parents[:_MAX_PARENT_LEVELS] if (folder / JOURNAL_FILE).is_file())


def default_run_name(run_dir: Path) -> str:
    """A run's name by its folder: the path below its parent run's folder, else with the name of the folder above."""
    folder = run_dir.resolve()
    return str(folder.relative_to(next(parent_run_dirs(folder), folder.parent.parent)))


def journal_id(path: str | Path) -> str:
    """The id of a journal's run, the same in every copy of it; "" for an empty journal.

    It is a field of the first "start" event; for a journal older than ids, a digest of the first line.
    """
    fallback = ""
    for record in read_lines(path):
        if record.get("event") == "start" and record.get("id"):
            return str(record["id"])
        if not fallback:
            text = json.dumps(record, sort_keys=True, ensure_ascii=True)
            fallback = hashlib.sha256(text.encode()).hexdigest()[:32]
    return fallback


def read_lines(path: str | Path) -> Iterator[dict[str, Any]]:
    """The records of a journal in file order; a line that is cut is left out."""
    with Path(path).open("rb") as file:
        yield from filter(None, map(parse_line, file))


def read_new_lines(path: Path, offset: int) -> Iterator[tuple[dict[str, Any] | None, int]]:
    """The complete lines behind an offset, each with the offset of the next; None for one that is no record."""
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if line.endswith(b"\n"):
                offset += len(line)
                yield parse_line(line), offset


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The record of a journal line, or None where the line is cut."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and ("step" in record or "event" in record) else None


def read_journal(path: str | Path) -> list[dict[str, Any]]:
    """The metrics records of a run as if it had never been interrupted, ordered by step.

    A run that resumes from step 40 after reaching 55 writes steps 41 to 55 again: of records with the same step and
    keys the last counts, and a "resume" event voids the records beyond its step.
    """
    latest: dict[tuple[int, frozenset[str]], dict[str, Any]] = {}
    for record in read_lines(path):
        if record.get("event") == "resume" and "step" in record:
            latest = {key: value for key, value in latest.items() if key[0] <= record["step"]}
        elif "event" not in record:
            latest[record["step"], frozenset(record)] = record
    return sorted(latest.values(), key=lambda record: record["step"])


def read_events(path: str | Path, name: str) -> list[dict[str, Any]]:
    """The events called `name`, in file order."""
    return [record for record in read_lines(path) if record.get("event") == name]


def last_start(path: str | Path) -> dict[str, Any]:
    """The last "start" event of a journal; empty where there is none."""
    return (read_events(path, "start") or [{}])[-1] if Path(path).is_file() else {}


def milliseconds(record: dict[str, Any]) -> int:
    """When a record was written, in MLflow's unit."""
    return int(1000 * (record.get("time") or time.time()))


def _number(value: Any) -> Any:
    """A plain number; None for one that is not finite, which JSON has no word for."""
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
