"""Tracker: records a run in its journal and, when asked, in MLflow by a process that cannot slow or stop the run."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import shlex
import subprocess
import time
import uuid
from pathlib import Path
from typing import Any, Literal

from lavic.config.secrets import holds_secret
from lavic.distributed.background import start_background
from lavic.errors import LavicError, Stopped
from lavic.tracking.journal import JOURNAL_FILE, Journal, default_run_name, journal_id, last_start
from lavic.tracking.run_metadata import run_tags
from lavic.tracking.settings import TrackingSettings
from lavic.tracking.sync_record import read_record, read_records

Status = Literal["FINISHED", "FAILED", "KILLED"]
log = logging.getLogger(__name__)
_URI_VARIABLE = "LAVIC_TRACKING_URI"
"""Passes a URI that holds a password to the live sync: a command line can be read by others."""
_STOP_TIMEOUT_S = 3.0
"""How long a run that was asked to stop waits for MLflow: a scheduler kills it soon."""


class Tracker:
    """Records one run. As a context manager it ends the run with a status by how the block is left.

    with Tracker.open(out, settings.tracking, main=world.is_main) as tracker:
        tracker.start("distill", flatten(settings))
        tracker.log(step, loss=0.5)
    """

    def __init__(self, journal: Journal | None, settings: TrackingSettings | None = None, *, timeout_s: float = 30.0):
        """Records nothing without a journal; `finish` waits at most `timeout_s` for MLflow to take the rest."""
        self.journal = journal
        self.settings = settings or TrackingSettings()
        self.timeout_s = timeout_s
        self.live_sync: subprocess.Popen[bytes] | None = None
        self._monitor: subprocess.Popen[bytes] | None = None

    @classmethod
    def open(
        cls, run_dir: Path, tracking: TrackingSettings | None = None, *, main: bool = True, node: int | None = None
    ) -> Tracker:
        """The tracker of the run in `run_dir`; on ranks other than 0, which are not `main`, it records nothing.

        On one rank of each node, `node` is the node's number: system metrics are sampled until the run ends.
        """
        tracker = cls(Journal(run_dir / JOURNAL_FILE) if main else None, tracking)
        if node is not None and tracking is not None and tracking.system_every:
            with contextlib.suppress(OSError):
                seconds = str(tracking.system_every)
                tracker._monitor = start_background("lavic.tracking.system_metrics", run_dir, str(node), seconds)
        return tracker

    def start(
        self,
        command: str,
        params: dict[str, Any] | None = None,
        tags: dict[str, Any] | None = None,
        *,
        attended: bool = True,
    ) -> None:
        """Records what runs with which settings, and starts the live sync. A resumed run keeps its MLflow run.

        Args:
            command: The command's name.
            params: Its settings.
            tags: Further properties of the run.
            attended: Whether this process lives as long as the run: if it exits without `finish`, the run was killed.
                False for a pipeline of scheduled jobs: call `detach`, and `finish` in its last job.
        """
        if self.journal is None:
            return
        settings, run_dir = self.settings, self.journal.path.parent
        if settings.mlflow:
            settings.resolve_uri(run_dir)  # raises if it cannot be read
        self._warn_about_experiment(run_dir)
        self.journal.event(
            "start",
            id=journal_id(self.journal.path) or uuid.uuid4().hex,
            command=command,
            run=settings.run or default_run_name(run_dir),
            uri=settings.chosen_uri or (settings.recorded_uri(run_dir) if settings.mlflow else None),
            by_default=not settings.chosen_uri,
            experiment=settings.experiment,
            parent_run=settings.parent_run,
            attended=attended,
            params=params or {},
            tags=run_tags() | {"lavic.command": command} | (tags or {}),
        )
        if settings.mlflow and self.live_sync is None:
            self._start_live_sync(run_dir)

    def log(self, step: int, **metrics: Any) -> None:
        """Records numbers of `step` (optimizer steps done)."""
        if self.journal is not None:
            self.journal.log(step, **metrics)

    def event(self, name: str, /, **fields: Any) -> None:
        """Records an event; MLflow shows it as the tag `event.NAME`."""
        if self.journal is not None:
            self.journal.event(name, **fields)

    def tag(self, tags: dict[str, str]) -> None:
        """Records properties of the run that were not known at its start."""
        self.event("tags", tags=tags)

    def dataset(
        self, name: str, digest: str, path: Path | str, *, context: str = "", manifest: Path | None = None
    ) -> None:
        """Records a dataset that the run reads, by its role ("training set"), the digest of its content and its place.

        `context` is its use in MLflow's terms (training, validation); the `manifest`, a small file, is copied there.
        """
        file = None if manifest is None else str(manifest.absolute())
        self.event("dataset", name=name, digest=digest, path=str(path), context=context, manifest=file)

    def artifact(self, path: Path) -> None:
        """Records a file or folder of the run, which is copied to MLflow."""
        if self.journal is not None:
            self.event("artifact", path=os.path.relpath(path, self.journal.path.parent))

    def detach(self) -> None:
        """Closes the journal of a run that continues without this process."""
        if self.journal is not None:
            self.journal.close()
            self.journal = None

    def finish(self, status: Status = "FINISHED") -> None:
        """Ends the run, and waits at most `timeout_s` for MLflow to take the rest."""
        if self._monitor is not None:
            self._monitor.kill()
            self._monitor.wait()
            self._monitor = None
        if self.journal is None:
            return
        try:
            self.journal.close(status)
        except LavicError:  # the disk is full
            self.journal.close()
            if status == "FINISHED":
                raise  # otherwise the error that ended the run is reported
        if self.live_sync is not None:
            timeout_s = self.timeout_s if status == "FINISHED" else min(_STOP_TIMEOUT_S, self.timeout_s)
            self._end_live_sync(self.live_sync, self.journal.path.parent, timeout_s)
            self.live_sync = None
        self.journal = None

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, error_type: object, error: BaseException | None, traceback: object) -> None:
        if error is None:
            self.finish("FINISHED")
        else:
            self.finish("KILLED" if isinstance(error, (Stopped, KeyboardInterrupt)) else "FAILED")

    def _warn_about_experiment(self, run_dir: Path) -> None:
        """Warns if a resumed run names another experiment than the one it was sent to."""
        previous = last_start(run_dir / JOURNAL_FILE)
        was_sent = any(record.run_id for record in read_records(run_dir).values())
        experiments = previous.get("experiment"), self.settings.experiment
        if previous and was_sent and experiments[0] != experiments[1]:
            log.warning("this run stays in MLflow's experiment '%s': MLflow cannot move a run to '%s'", *experiments)

    def _start_live_sync(self, run_dir: Path) -> None:
        if importlib.util.find_spec("mlflow") is None:
            log.warning("MLflow is not installed (pip install 'lavic[mlflow]'): only the journal records this run")
            return
        uri, env = self.settings.recorded_uri(run_dir), {}
        if holds_secret(uri):
            uri, env = f"env:{_URI_VARIABLE}", {_URI_VARIABLE: uri}
        try:
            self.live_sync = start_background("lavic.tracking.live_sync", run_dir, uri, env=env)
        except OSError as error:
            log.warning("the live sync to MLflow cannot start (%s): only the journal records this run", error)

    def _end_live_sync(self, process: subprocess.Popen[bytes], run_dir: Path, timeout_s: float) -> None:
        uri, deadline = self.settings.resolve_uri(run_dir), time.monotonic() + timeout_s
        while process.poll() is None and not self._sync_error(process, run_dir, uri) and time.monotonic() < deadline:
            time.sleep(0.05)
        failure = self._sync_error(process, run_dir, uri)
        if process.poll() is None:
            process.kill()  # what it has sent is recorded; it may not have printed its failure yet
            process.wait()
        if process.returncode:
            log.warning(
                "MLflow does not have all of this run%s; `lavic sync %s` sends the rest",
                f" ({failure})" if failure else "",
                shlex.quote(str(run_dir)),
            )

    @staticmethod
    def _sync_error(process: subprocess.Popen[bytes], run_dir: Path, uri: str) -> str:
        """Why the live sync's last attempt failed; empty if it did not, or has not tried yet."""
        record = read_record(run_dir, uri)
        return record.error if record is not None and record.pid == process.pid else ""
