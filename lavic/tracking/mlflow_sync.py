"""Sends a run's journal to MLflow, each point exactly once: `lavic sync` after the run, `live_sync` during it.

RUN/mlflow.json records what was sent, by store. The run in MLflow is tagged with the journal's id, so that a copy of
the folder, or the folder under another name, is the same run. Steps that a resumed run repeats are skipped. A run whose
folder lies inside another run's folder is its child.
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lavic.config.secrets import redact, reveal
from lavic.distributed.failure import disk_is_full
from lavic.errors import ConfigError, DataError, LaunchError, LavicError, first_line
from lavic.storage.file_lock import FileLock, is_held
from lavic.tracking.journal import (
    JOURNAL_FILE,
    default_run_name,
    journal_id,
    last_start,
    milliseconds,
    parent_run_dirs,
    read_lines,
    read_new_lines,
)
from lavic.tracking.mlflow_client import (
    BATCH_SIZES,
    ID_TAG,
    Point,
    StoreClient,
    event_files,
    valid_name,
    valid_text,
)
from lavic.tracking.mlflow_store import absolute_uri
from lavic.tracking.settings import destination
from lavic.tracking.sync_record import LOST, SyncRecord, read_record, write_record
from lavic.tracking.system_metrics import SYSTEM_FOLDER

_LOCK_FILE = ".mlflow.lock"
_FILES_BACKOFF_S = 60.0
"""Seconds until files that a store did not take are sent to it again."""


def sync(run_dir: Path, uri: str | None = None, experiment: str = "") -> RunSync:
    """Sends what a store does not have yet of a run, and how the run ended. Arguments as for `RunSync`.

    The default store is the run's `destination`.

    Raises:
        DataError: The folder has no journal.
        LaunchError: MLflow is not installed or refused the run.
    """
    if not (run_dir / JOURNAL_FILE).is_file():
        raise DataError(f"{run_dir}: holds no {JOURNAL_FILE}; give the folder of a run")
    run = RunSync(run_dir, uri or destination(run_dir), experiment, lock_timeout_s=60.0)
    try:
        run.send()
        run.close_if_lost()
    except LavicError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        if "database or disk is full" in str(error):  # which is all that SQLite says
            raise LavicError(f"{run.uri}: the disk is full: make room, then run the same command again") from None
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            file = error.filename or run_dir
            raise LaunchError(f"{file}: {error.strerror}; sync records there what it has sent") from None
        raise LaunchError(f"{run.uri} did not take {run_dir}: {one_line(error)}") from error
    if run.record.files:
        raise LaunchError(
            f"{run.uri} has the metrics of {run_dir}, but did not take {len(run.record.files)} of its files "
            f"({run.files_error}): check its artifact store and this machine's access to it, then run the same command "
            "again"
        )
    return run


class Busy(LaunchError):
    """Another process is sending this run."""


class RunSync:
    """Sends one run to one store."""

    def __init__(self, run_dir: Path, uri: str, experiment: str = "", *, lock_timeout_s: float = 0.0) -> None:
        """Opens no connection yet.

        Args:
            run_dir: The run's folder.
            uri: MLflow's URI, or `env:NAME` or `@FILE`.
            experiment: Replaces the journal's; a run that is in another experiment already is refused.
            lock_timeout_s: How long to wait for another process that sends the same run.
        """
        self._uri_reference = absolute_uri(uri)
        self._uri = reveal(self._uri_reference, "--tracking.uri")
        self.run_dir, self.uri, self.experiment = run_dir, redact(self._uri_reference), experiment
        self.record = SyncRecord()
        self.points_sent = 0
        self.files_error = ""
        """Why the store did not take a file at the last attempt."""
        self._store = StoreClient(self._uri)
        self._lock_timeout_s = lock_timeout_s
        self._run_verified = False
        self._pending: list[Point] = []
        self._next_files_s = 0.0

    @property
    def ended(self) -> bool:
        """Whether the store has the run's final status."""
        return self.record.status not in ("", "RUNNING")

    def send(self) -> None:
        """Sends every complete line that is new.

        Raises:
            Busy: Another process is sending the run.
            Exception: Whatever MLflow raises; what was sent until then is recorded.
        """
        with self._locked():
            self.record = self._read_record()
            try:
                self._send()
            except Busy:  # its parent run is being sent by another process
                raise
            except Exception as error:
                self.record = self._read_record()  # what is known to be sent
                self.record.error = one_line(error)
                self._save()
                raise
            remaining = self.files_error if self.ended and self.record.files else ""
            if self.record.error != remaining:
                self.record.error = remaining
                self._save()

    def close_if_lost(self, timeout_s: float = 0.0) -> None:
        """Marks a run KILLED whose journal has no "end" event and is held by no process: it was killed or lost.

        A dying process has `timeout_s` to release the journal.
        """
        journal, deadline = self.run_dir / JOURNAL_FILE, time.monotonic() + timeout_s
        while is_held(journal) and time.monotonic() < deadline:
            time.sleep(0.05)
        attended = last_start(journal).get("attended", True)
        if self.record.run_id and not self.ended and attended and is_held(journal) is False:
            with self._locked():
                died_ms = int(1000 * journal.stat().st_mtime)
                self._store.client.set_terminated(self.record.run_id, "KILLED", end_time=died_ms)
                self.record.status = LOST
                self._save()

    def _send(self) -> None:
        path = self.run_dir / JOURNAL_FILE
        id_in_journal = journal_id(path)
        if (
            path.stat().st_size < self.record.offset
            or self.record.id not in ("", id_in_journal)
            or not self._run_exists()
        ):
            self.record = SyncRecord()
        if not self.record.id and self.record.run_id:  # recorded before there were ids
            self._store.set_tags(self.record.run_id, {ID_TAG: id_in_journal})
        self.record.id = id_in_journal
        if self.record.run_id:
            self._check_experiment(self.record.run_id)
        self._pending = []
        for record, offset in read_new_lines(path, self.record.offset):
            is_event = record is not None and "event" in record
            if record is not None and is_event:
                self._flush()
                self._send_event(record)
            elif record is not None:
                self._collect(record)
            self.record.offset = offset
            if is_event or len(self._pending) >= BATCH_SIZES["metrics"]:
                self._flush()
        self._flush()
        if self.record.run_id:
            self._send_system_metrics()
            self._send_files()

    def _collect(self, record: dict[str, Any], prefix: str = "") -> None:
        step, time_ms = int(record["step"]), milliseconds(record)
        for key, value in record.items():
            name = valid_name(prefix + key)
            is_metric = isinstance(value, (int, float)) and key not in ("step", "time")
            if is_metric and step > self.record.last.get(name, -1):
                self.record.last[name] = step
                self._pending.append((name, float(value), time_ms, step))

    def _flush(self) -> None:
        """Sends pending points, then records it. After a crash in between the store ignores those it has."""
        if self._pending:
            self._ensure_run({})
            self._store.log_metrics(self.record.run_id, self._pending)
            self.points_sent += len(self._pending)
            self._pending = []
        self._save()

    def _send_event(self, event: dict[str, Any]) -> None:
        if event["event"] == "start":
            self._ensure_run(event)
        if self.record.run_id:
            self.record.status = self._store.log_event(self.record.run_id, event) or self.record.status
            files = [(str(path), folder) for path, folder in event_files(self.run_dir, event)]
            self.record.files = list(dict.fromkeys([*self.record.files, *files]))

    def _send_files(self) -> None:
        """Copies files to the run's artifacts.

        They are often kept elsewhere than the metrics, where a package, credentials or space are missing, or behind a
        proxy with a limit: then everything else is sent, and the files later.
        """
        if not self.ended and time.monotonic() < self._next_files_s:
            return
        self.files_error = ""
        for path, folder in list(self.record.files):
            try:
                self._store.log_artifact(self.record.run_id, self.run_dir / path, folder)
            except Exception as error:
                if disk_is_full(error):
                    raise
                self.files_error = one_line(error)
                self._next_files_s = time.monotonic() + _FILES_BACKOFF_S
            else:
                self.record.files.remove((path, folder))
                self._save()

    def _send_system_metrics(self) -> None:
        """Sends the system metrics of each node; their step is the second of the run."""
        for path in sorted((self.run_dir / SYSTEM_FOLDER).glob("node-*.jsonl")):
            start = next((record["time"] for record in read_lines(path)), 0.0)
            for record, offset in read_new_lines(path, self.record.system.get(path.name, 0)):
                if record is not None and "event" in record:
                    self._store.set_tags(self.record.run_id, {f"node.{path.stem}": record.get("host", "")})
                elif record is not None:
                    self._collect(record | {"step": round(record["time"] - start)}, f"system/{path.stem}/")
                self.record.system[path.name] = offset
                if len(self._pending) >= BATCH_SIZES["metrics"]:
                    self._flush()
        if self._pending:
            self._flush()

    def _ensure_run(self, start: dict[str, Any]) -> None:
        """Creates or finds the MLflow run, and marks it RUNNING if `start` is an event or it was taken for lost."""
        if not self.record.run_id:
            event = last_start(self.run_dir / JOURNAL_FILE) or start  # a resumed run's may differ
            parent = self._parent_run_id(event.get("parent_run") or "")
            if parent:
                self._check_experiment(parent, "its parent run")  # before a run is created in it
            run_id, existed = self._store.open_run(
                self.record.id,
                self._run_name(event),
                experiment=self.experiment or event.get("experiment") or "lavic",
                parent=parent,
                start_ms=milliseconds(start),
            )
            self._check_experiment(run_id)
            self.record.run_id = run_id
            if existed:
                self._skip_known_points()
        elif start or self.record.status == LOST:
            self._store.client.update_run(self.record.run_id, status="RUNNING")
        else:
            return
        self.record.status = "RUNNING"
        self._save()

    def _run_name(self, start: dict[str, Any]) -> str:
        """The name that was chosen for the run, else its folder's: in journals without ids `run` is the command."""
        chosen = "id" in start or (start.get("params") or {}).get("tracking.run")
        return str((chosen and start.get("run")) or default_run_name(self.run_dir))

    def _parent_run_id(self, parent_run: str) -> str | None:
        """The parent named by the journal, if this store has it, else the run whose folder this run's folder lies in.

        The latter is sent first.
        """
        if parent_run and self._store.has_run(parent_run):
            return parent_run
        folder = next(parent_run_dirs(self.run_dir), None)
        if folder is None:
            return None
        lock_timeout_s = max(10.0, self._lock_timeout_s)
        parent = RunSync(folder, self._uri_reference, self.experiment, lock_timeout_s=lock_timeout_s)
        parent.send()
        return parent.record.run_id or None

    def _skip_known_points(self) -> None:
        """Skips what the store has of a run that was sent to it from elsewhere."""
        known = self._store.last_steps(self.record.run_id)
        self._pending = [point for point in self._pending if point[3] > known.get(point[0], -1)]
        for name, step in known.items():
            self.record.last[name] = max(step, self.record.last.get(name, -1))

    def _check_experiment(self, run_id: str, subject: str = "it") -> None:
        """Refuses an experiment other than that of an existing run: this one or its parent."""
        if self.experiment and (actual := self._store.experiment_name(run_id)) != valid_text(self.experiment):
            raise ConfigError(
                f"{self.run_dir}: {subject} is in the experiment '{actual}' of {self.uri}, and MLflow "
                f"cannot move a run: omit --experiment, or delete the run in MLflow to send it to '{self.experiment}'"
            )

    def _run_exists(self) -> bool:
        """Whether the recorded run is still in the store; checked once."""
        if self.record.run_id and not self._run_verified:
            self._run_verified = self._store.has_run(self.record.run_id)
            return self._run_verified
        return True

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with FileLock(self.run_dir / _LOCK_FILE) as lock:
            if not lock.acquire(self._lock_timeout_s):
                raise Busy(f"{self.run_dir}: another process is sending this run; try again later")
            yield

    def _read_record(self) -> SyncRecord:
        return read_record(self.run_dir, self._uri) or SyncRecord()

    def _save(self) -> None:
        self.record.uri = self.uri
        write_record(self.run_dir, self._uri, self.record)


def one_line(error: Exception) -> str:
    """An error's message, short and without secrets."""
    return redact(first_line(error))[:300]
