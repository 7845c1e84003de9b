"""The journal of a run: `metrics.jsonl`, one line per thing that happened, the truth that all else is made from."""

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
from lavic.storage.file_lock import Lock

FILE = "metrics.jsonl"


class Journal:
    """Appends to a run's journal. One process writes it: rank 0.

    A line is a metrics record, {"time", "step", ...values}, or an event, {"time", "event", ...fields}. Each is one
    write of one whole line, so that a reader never sees half of one and a crash loses at most the last. While it is
    open the file is locked, by which `lavic sync` knows that the run is alive.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = Lock(self.path)
        self._lock.take(patience_s=1.0)  # who asks whether we are alive holds it for an instant
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            # A torn last line, from a full disk or a dead machine: shut it off from what comes now.
            os.write(self._file, b"\n")

    def log(self, step: int, **values: Any) -> None:
        """Notes numbers that belong to `step` (optimizer steps done). Numbers may be tensors of one element."""
        self._append({"step": int(step), **{key: _number(value) for key, value in values.items()}})

    def event(self, name: str, /, **fields: Any) -> None:
        """Notes that something happened. `event("resume", step=40)` takes back every record beyond step 40.

        Secrets in the fields are left out.
        """
        self._append({"event": name, **redact_all(fields)})

    def close(self, status: str = "") -> None:
        """Closes the file; with a status, after noting the event "end"."""
        if self._file >= 0:
            if status:
                self.event("end", status=status)
            os.close(self._file)
            self._file = -1
            self._lock.release()

    def _append(self, record: dict[str, Any]) -> None:
        text = json.dumps({"time": round(time.time(), 3), **record}, ensure_ascii=False, default=str)
        line = text.encode("utf-8", "backslashreplace") + b"\n"  # half a surrogate pair becomes JSON's own escape
        try:
            written = os.write(self._file, line)
        except OSError as error:
            raise self._full(error.strerror) from error
        if written < len(line):  # the next start shuts it off
            raise self._full("the disk is full")

    def _full(self, why: str | None) -> LavicError:
        return LavicError(f"{self.path} cannot be written ({why}): make room, then run the same command again")


def journal_id(path: str | Path) -> str:
    """The id of the run that a journal tells of, the same in every copy of it; "" while it is empty.

    It stands in the journal's first "start" event. A journal from before there were ids has one of its first line.
    """
    first = ""
    for record in read_lines(path):
        if record.get("event") == "start" and record.get("id"):
            return str(record["id"])
        if not first:
            text = json.dumps(record, sort_keys=True, ensure_ascii=True)
            first = hashlib.sha256(text.encode()).hexdigest()[:32]
    return first


def read_lines(path: str | Path) -> Iterator[dict[str, Any]]:
    """Every whole line of a journal in the order written; a torn one is left out."""
    with Path(path).open("rb") as file:
        for line in file:
            record = parse_line(line)
            if record is not None:
                yield record


def parse_line(line: bytes) -> dict[str, Any] | None:
    """One journal line as a record, or None where it is torn."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and ("step" in record or "event" in record) else None


def read_journal(path: str | Path) -> list[dict[str, Any]]:
    """The metrics records of a run as if it had never been stopped, ordered by step.

    A run that resumes from step 40 after reaching 55 writes steps 41 to 55 again: of records with the same step and
    keys the last counts, and what lies beyond the step of a "resume" event is taken back.
    """
    kept: dict[tuple[int, frozenset[str]], dict[str, Any]] = {}
    for record in read_lines(path):
        if record.get("event") == "resume" and "step" in record:
            kept = {key: value for key, value in kept.items() if key[0] <= record["step"]}
        elif "event" not in record:
            kept[record["step"], frozenset(record)] = record
    return sorted(kept.values(), key=lambda record: record["step"])


def read_events(path: str | Path, name: str) -> list[dict[str, Any]]:
    """The events called `name`, in the order written."""
    return [record for record in read_lines(path) if record.get("event") == name]


def _number(value: Any) -> Any:
    """A plain number; None for one that is not finite, which json cannot hold."""
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
