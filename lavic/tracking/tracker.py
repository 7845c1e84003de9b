"""Tracker: what a run reports. The journal always; MLflow when asked, fed by a process that cannot slow or stop it."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import shlex
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Literal

from pydantic import NonNegativeFloat, field_validator

from lavic.config.loader import Reference, settings
from lavic.config.secrets import MASK, holds_secret, reveal
from lavic.errors import ConfigError, LavicError, Stopped
from lavic.tracking.journal import FILE, Journal, journal_id, read_events, read_journal
from lavic.tracking.mlflow_sync import Feed, run_name, runs_above, send
from lavic.tracking.run_metadata import provenance
from lavic.tracking.sync_record import Sent, read_sent, read_state
from lavic.tracking.tracking_uri import anchored, default_store, sqlite_path

__all__ = ["Journal", "Tracker", "TrackingSettings", "destination", "read_events", "read_journal", "sync"]

Status = Literal["FINISHED", "FAILED", "KILLED"]
log = logging.getLogger(__name__)
_VARIABLE = "MLFLOW_TRACKING_URI"
_PRIVATE = "LAVIC_TRACKING_URI"
_HURRY_S = 3.0
"""How long a run that was asked to stop waits for MLflow: what asked will not wait long."""


@settings
class TrackingSettings:
    """Where the run is recorded besides its own journal, RUN/metrics.jsonl."""

    mlflow: bool = False
    """Send the journal to MLflow while the run goes on. `lavic sync` sends it afterwards as well."""
    uri: Annotated[str | None, Reference] = None
    """MLflow's address. By default MLFLOW_TRACKING_URI, else mlflow.db (sqlite) beside the run's folder. A password
    comes from MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN). An address that holds
    one is written env:NAME, for a variable, or @FILE, for a file with nothing else in it."""
    experiment: str = "lavic"
    """MLflow experiment."""
    run: str | None = None
    """MLflow's name of the run; by default its folder's."""
    parent_run: str | None = None
    """Id of the MLflow run that this one is shown under; by default that of the run whose folder this one lies in."""
    system_every: NonNegativeFloat = 10.0
    """Seconds between looks at each node's CPU, memory, disk, network and GPUs; 0 does not look."""

    @field_validator("uri")
    @classmethod
    def _from_anywhere(cls, uri: str | None) -> str | None:
        """It is recorded, and read again from other folders."""
        return anchored(uri) if uri else uri

    @property
    def named(self) -> str:
        """The address that was chosen for this run, as it may be recorded; "" where none was."""
        if self.uri:
            return self.uri
        given = os.environ.get(_VARIABLE, "")
        return f"env:{_VARIABLE}" if holds_secret(given) else given

    def reference(self, run_dir: Path) -> str:
        """MLflow's address for a run in `run_dir`, as it may be recorded and written on a command line."""
        return self.named or default_uri(run_dir)

    def address(self, run_dir: Path) -> str:
        """MLflow's address for a run in `run_dir`. Raises ConfigError where the one that is chosen cannot be read."""
        return reveal(self.reference(run_dir), "--tracking.uri")


def default_uri(run_dir: Path) -> str:
    """The sqlite store beside a run's folder."""
    return default_store(run_dir.resolve().parent)


class Tracker:
    """Reports one run. As a context manager it ends the run with the status that the way out of the block means.

    with Tracker.open(out, settings.tracking, main=world.is_main) as tracker:
        tracker.start("distill", flatten(settings))
        tracker.log(step, loss=0.5)
    """

    def __init__(self, journal: Journal | None, settings: TrackingSettings | None = None, *, patience_s: float = 30.0):
        """Makes a tracker that has said nothing yet.

        Args:
            journal: where everything goes; None reports nothing.
            settings: MLflow is fed as well when its `mlflow` is set.
            patience_s: how long `finish` waits for MLflow to take the rest.
        """
        self.journal = journal
        self.settings = settings or TrackingSettings()
        self._feed: subprocess.Popen[bytes] | None = None
        self._watch: subprocess.Popen[bytes] | None = None
        self._patience_s = patience_s

    @classmethod
    def null(cls) -> Tracker:
        """A tracker that reports nothing, for every rank but 0."""
        return cls(None)

    @classmethod
    def open(
        cls, run_dir: Path, tracking: TrackingSettings | None = None, *, main: bool = True, node: int | None = None
    ) -> Tracker:
        """The tracker of the run in `run_dir`.

        Args:
            run_dir: The run's folder.
            tracking: Where else to report.
            main: False for the null tracker, of every rank but 0.
            node: The node's number, on one rank of each node: it has the node watched until the run ends.
        """
        tracker = cls(Journal(run_dir / FILE), tracking) if main else cls.null()
        if node is not None and tracking is not None and tracking.system_every:
            tracker._watch_node(run_dir, node, tracking.system_every)
        return tracker

    def start(
        self,
        command: str,
        params: dict[str, Any] | None = None,
        tags: dict[str, Any] | None = None,
        *,
        attended: bool = True,
    ) -> None:
        """Notes what runs with which settings and begins to feed MLflow. A resumed run goes on with its MLflow run.

        Args:
            command: The command's name.
            params: Its settings.
            tags: What else is known of it.
            attended: Whether this process lives as long as the run: when it is gone without a word, so is the run.
                False for a pipeline that is handed to a scheduler: `leave` it, and let its last job `finish` it.
        """
        if self.journal is None:
            return
        chosen, folder = self.settings, self.journal.path.parent
        if chosen.mlflow:
            self._address()  # one that cannot be read is an error now
        self._warn_of_experiment()
        self.journal.event(
            "start",
            id=journal_id(self.journal.path) or uuid.uuid4().hex,
            command=command,
            run=chosen.run or run_name(folder),
            uri=chosen.named or (chosen.reference(folder) if chosen.mlflow else None),
            by_default=not chosen.named,
            experiment=chosen.experiment,
            parent_run=chosen.parent_run,
            attended=attended,
            params=params or {},
            tags=provenance() | {"lavic.command": command} | (tags or {}),
        )
        if chosen.mlflow and self._feed is None:
            self._start_feed()

    def log(self, step: int, **metrics: Any) -> None:
        """Notes numbers that belong to `step` (optimizer steps done)."""
        if self.journal is not None:
            self.journal.log(step, **metrics)

    def event(self, name: str, /, **fields: Any) -> None:
        """Notes that something happened; MLflow shows it as the tag `event.NAME`."""
        if self.journal is not None:
            self.journal.event(name, **fields)

    def tag(self, tags: dict[str, str]) -> None:
        """Notes properties of the run that were not known at its start."""
        self.event("tags", tags=tags)

    def dataset(self, name: str, digest: str, path: Path, *, context: str = "", manifest: Path | None = None) -> None:
        """Notes what the run reads.

        Args:
            name: What it is called here ("training set").
            digest: Of its content.
            path: Where it stands.
            context: What it is for, in MLflow's words: training, validation.
            manifest: A small file that describes it; copied to MLflow.
        """
        place = None if manifest is None else str(manifest.absolute())
        self.event("dataset", name=name, digest=digest, path=str(path), context=context, manifest=place)

    def artifact(self, path: Path) -> None:
        """Attaches a file or folder of the run, which is copied to MLflow."""
        if self.journal is not None:
            self.journal.event("artifact", path=os.path.relpath(path, self.journal.path.parent))

    def leave(self) -> None:
        """Ends this process's part in a run that goes on without it."""
        if self.journal is not None:
            self.journal.close()
            self.journal = None

    def finish(self, status: Status = "FINISHED") -> None:
        """Ends the run; waits for MLflow to take the rest only as long as it does, at most `patience_s`."""
        if self._watch is not None:
            self._watch.kill()
            self._watch.wait()
            self._watch = None
        if self.journal is None:
            return
        try:
            self.journal.close(status)
        except LavicError:  # the disk is full
            self.journal.close()
            if status == "FINISHED":
                raise  # else what ended the run is said, and that alone
        if self._feed is not None:
            self._await_feed(self._patience_s if status == "FINISHED" else min(_HURRY_S, self._patience_s))
        self.journal = None

    def mlflow_run(self, timeout_s: float = 30.0) -> str | None:
        """This run's id in MLflow, waiting for it at most so long; None without MLflow, or when it does not answer."""
        if self.journal is None:
            return None
        until = time.monotonic() + timeout_s
        while self._feed is not None and time.monotonic() < until:
            gone, sent = self._feed.poll() is not None, self._sent()
            if sent is not None and (sent.run_id or sent.error):
                return sent.run_id or None
            if gone:
                break
            time.sleep(0.1)
        return None

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            self.finish("FINISHED")
        else:
            self.finish("KILLED" if isinstance(error, (Stopped, KeyboardInterrupt)) else "FAILED")

    def _sent(self) -> Sent | None:
        """What our feeding process says it sent; None until it has spoken."""
        assert self.journal is not None and self._feed is not None
        sent = read_sent(self.journal.path.parent, self._address())
        return sent if sent is not None and sent.pid == self._feed.pid else None

    def _address(self) -> str:
        assert self.journal is not None
        return self.settings.address(self.journal.path.parent)

    def _warn_of_experiment(self) -> None:
        """Says that a run which goes on under another experiment's name stays where it is."""
        assert self.journal is not None
        before = read_events(self.journal.path, "start")[-1:]
        sent = any(sent.run_id for sent in read_state(self.journal.path.parent).values())
        if before and sent and before[0].get("experiment") != self.settings.experiment:
            log.warning(
                "this run stays in MLflow's experiment '%s': MLflow cannot move one to '%s'",
                before[0].get("experiment"),
                self.settings.experiment,
            )

    def _start_feed(self) -> None:
        assert self.journal is not None
        if importlib.util.find_spec("mlflow") is None:
            log.warning("MLflow is not installed (pip install 'lavic[mlflow]'); this run is in its journal only")
            return
        # A process of its own: its imports, its waiting and its crashes are not the run's, nor is the run's Ctrl-C its.
        run_dir, env = self.journal.path.parent, {}
        reference = self.settings.reference(run_dir)
        if holds_secret(reference):  # others could read it on a command line
            reference, env = f"env:{_PRIVATE}", {_PRIVATE: reference}
        try:
            self._feed = _beside("lavic.tracking.live_sync", run_dir, reference, env=env)
        except OSError as error:
            log.warning("MLflow cannot be fed (%s); this run is in its journal only", error)

    def _watch_node(self, run_dir: Path, node: int, seconds: float) -> None:
        with contextlib.suppress(OSError):
            self._watch = _beside("lavic.tracking.system_metrics", run_dir, str(node), str(seconds))

    def _await_feed(self, patience_s: float) -> None:
        assert self.journal is not None and self._feed is not None
        run_dir, until = self.journal.path.parent, time.monotonic() + patience_s
        while self._feed.poll() is None and time.monotonic() < until:
            sent = self._sent()
            if sent is not None and sent.error:
                break
            time.sleep(0.05)
        if self._feed.poll() is None:
            self._feed.kill()  # what it has sent is noted
            self._feed.wait()
        if self._feed.returncode:
            log.warning(
                "MLflow has not taken all of this run; `lavic sync %s` sends the rest", shlex.quote(str(run_dir))
            )
        self._feed = None


def sync(run_dir: Path, uri: str | None = None, experiment: str = "") -> Feed:
    """Sends what MLflow does not have yet of a run, without duplicates; see `mlflow_sync.send` and `destination`."""
    return send(run_dir, uri or destination(run_dir), experiment)


def destination(run_dir: Path, place: Path | None = None) -> str:
    """Where a run belongs: the store it was started with or sent to, else that of the run whose folder it lies in.

    Args:
        run_dir: The run's folder.
        place: The folder whose mlflow.db takes runs that belong nowhere, where MLFLOW_TRACKING_URI is not set either;
            by default the one beside the run.
    """
    for folder in (run_dir.resolve(), *runs_above(run_dir)):
        if store := _store_of(folder):
            return store
    return TrackingSettings().named or default_store(place or run_dir.resolve().parent)


def _store_of(run_dir: Path) -> str:
    """The store that a run was started with, else the last one that it was sent to; "" for none."""
    journal = run_dir / FILE
    start = (read_events(journal, "start") or [{}])[-1] if journal.is_file() else {}
    if start.get("uri"):
        path = sqlite_path(start["uri"])
        if start.get("by_default") and path is not None and not path.parent.is_dir():
            return default_uri(run_dir)  # all of it was moved
        if MASK in start["uri"]:
            raise ConfigError(f"{run_dir}: the address of its store held a password, which is not recorded: give --uri")
        return str(start["uri"])
    stores = [sent.uri or store for store, sent in read_state(run_dir).items() if sent.run_id]
    return stores[-1] if stores else ""


def _beside(module: str, run_dir: Path, *words: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Starts a process that goes beside this one, of its own session: Ctrl-C is not for it.

    It is told who started it: one that is killed at once would be gone before the other could ask.
    """
    line = [sys.executable, "-m", module, str(run_dir.absolute()), *words, str(os.getpid())]
    quiet = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        line, stdin=subprocess.DEVNULL, env={**os.environ, **quiet, **(env or {})}, start_new_session=True
    )
