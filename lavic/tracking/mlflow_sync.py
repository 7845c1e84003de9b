"""Sends a run's journal to MLflow: `lavic sync` does it once, `live_sync` while the run goes on.

What was sent stands in RUN/mlflow.json, by store; the run in the store bears the journal's id, so that a copy of the
folder, or the folder under another name, is the same run. A point is never sent twice: a resumed run's repeated steps
are skipped. A run whose folder lies inside another run's folder is shown below it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lavic.config.secrets import redact, reveal
from lavic.errors import ConfigError, DataError, LaunchError, LavicError
from lavic.storage.file_lock import Lock, is_held
from lavic.tracking import plots
from lavic.tracking.journal import FILE, journal_id, parse_line, read_events, read_lines
from lavic.tracking.mlflow_client import BATCH, ID_TAG, Point, Server, mlflow_name
from lavic.tracking.sync_record import LOST, Sent, read_sent, write_state
from lavic.tracking.system_metrics import FOLDER as SYSTEM
from lavic.tracking.tracking_uri import anchored

LOCK = ".mlflow.lock"
_ABOVE = 3
"""How many folders up a parent run may be: PIPELINE/runs/distill is two below PIPELINE."""


def runs_above(run_dir: Path) -> Iterator[Path]:
    """The folders of the runs that this one's folder lies in, the nearest first."""
    return (folder for folder in run_dir.resolve().parents[:_ABOVE] if (folder / FILE).is_file())


def run_name(run_dir: Path) -> str:
    """What a run is called after its folder: the path below the run that it lies in, else with the folder above."""
    folder = run_dir.resolve()
    above = next(runs_above(folder), folder.parent.parent)
    return str(folder.relative_to(above))


class Busy(LaunchError):
    """Another process is sending this run at the moment."""


class Feed:
    """One journal on its way to one MLflow server."""

    def __init__(self, run_dir: Path, uri: str, experiment: str = "", *, patience_s: float = 0.0) -> None:
        """Describes the way.

        Args:
            run_dir: The run's folder.
            uri: MLflow's address, or `env:NAME` or `@FILE`.
            experiment: Instead of the one that the journal names; a run that is in another one already is refused.
            patience_s: How long to wait for another process that sends the same run.
        """
        uri = anchored(uri)
        self.run_dir, self.uri, self.experiment = run_dir, redact(uri), experiment
        self.sent = Sent()
        self.points = 0
        self._given, self._address = uri, reveal(uri, "--tracking.uri")
        self._server = Server(self._address)
        self._patience_s = patience_s
        self._asked = False
        self._waiting: list[Point] = []

    @property
    def ended(self) -> bool:
        """Whether the server knows how the run ended."""
        return self.sent.status not in ("", "RUNNING")

    def pump(self) -> None:
        """Sends every whole line that is new.

        Raises:
            Busy: Another process is at it.
            Exception: Whatever MLflow raises; what was sent until then is noted.
        """
        with Lock(self.run_dir / LOCK) as lock:
            if not lock.take(self._patience_s):
                raise Busy(f"{self.run_dir}: another process is sending it: try again")
            self.sent = self._noted()
            try:
                self._pump()
            except Busy:  # its parent is being sent by another
                raise
            except Exception as error:
                # back to what is known to be sent
                self.sent = self._noted()
                self.sent.error = one_line(error)
                self._save()
                raise
            if self.sent.error:
                self.sent.error = ""
                self._save()

    def settle(self, patience_s: float = 0.0) -> None:
        """Tells the server that a run was killed which nobody writes any more and which never said how it ended.

        An exception says how a run ended; a process that vanished without a word was killed, or its machine was lost.

        Args:
            patience_s: How long to wait for a dying process to be gone.
        """
        journal, until = self.run_dir / FILE, time.monotonic() + patience_s
        while is_held(journal) and time.monotonic() < until:
            time.sleep(0.05)
        attended = all(event.get("attended", True) for event in read_events(journal, "start")[-1:])
        if self.sent.run_id and not self.ended and attended and is_held(journal) is False:
            with Lock(self.run_dir / LOCK) as lock:
                if not lock.take(self._patience_s):
                    raise Busy(f"{self.run_dir}: another process is sending it: try again")
                self._server.end(self.sent.run_id, "KILLED", int(1000 * journal.stat().st_mtime))
                self.sent.status = LOST
                self._save()

    def _pump(self) -> None:
        path = self.run_dir / FILE
        run = journal_id(path)
        if path.stat().st_size < self.sent.offset or self.sent.id not in ("", run) or not self._run_is_there():
            self.sent = Sent()
        if not self.sent.id and self.sent.run_id:  # noted before there were ids
            self._server.tags(self.sent.run_id, {ID_TAG: run})
        self.sent.id = run
        self._check_experiment()
        self._waiting = []
        for record, offset in _new_lines(path, self.sent.offset):
            if record is not None and "event" in record:
                self._flush()
                self._event(record)
            elif record is not None:
                self._collect(record)
            self.sent.offset = offset
            if len(self._waiting) >= BATCH or (record and "event" in record):
                self._flush()
        self._flush()
        if self.sent.run_id:
            self._look_at_nodes()

    def _collect(self, record: dict[str, Any], prefix: str = "") -> None:
        step, when = int(record["step"]), _ms(record)
        for key, value in record.items():
            name = mlflow_name(prefix + key)
            number = isinstance(value, (int, float)) and key not in ("step", "time")
            if number and step > self.sent.last.get(name, -1):
                self.sent.last[name] = step
                self._waiting.append((name, float(value), when, step))

    def _flush(self) -> None:
        """Sends what waits, then saves how far we are. After a crash in between MLflow drops the points it has."""
        if self._waiting:
            self._require_run({})
            self._server.points(self.sent.run_id, self._waiting)
            self.points += len(self._waiting)
            self._waiting = []
        self._save()

    def _event(self, record: dict[str, Any]) -> None:
        name, run_id = record["event"], self.sent.run_id
        if name == "start":
            self._require_run(record)
            self._server.params(self.sent.run_id, record.get("params") or {})
            self._server.tags(self.sent.run_id, record.get("tags") or {})
        elif not run_id:
            return
        elif name == "end":
            status = record.get("status") or "FINISHED"
            if status != "KILLED":  # who is killed has no time to draw, and will go on
                with contextlib.suppress(OSError):
                    for picture in plots.draw(self.run_dir):
                        self._server.artifact(run_id, picture, plots.FOLDER)
            self._server.end(run_id, status, _ms(record))
            self.sent.status = status
        elif name == "artifact":
            self._server.artifact(run_id, self.run_dir / record["path"])
        elif name == "tags":
            self._server.tags(run_id, record["tags"])
        elif name == "dataset":
            self._dataset(record)
        else:
            fields = {key: value for key, value in record.items() if key not in ("event", "time")}
            self._server.tags(run_id, {f"event.{name}": fields})

    def _dataset(self, record: dict[str, Any]) -> None:
        manifest = Path(record["manifest"]) if record.get("manifest") else None
        profile: dict[str, Any] = {}
        if manifest and manifest.is_file():
            self._server.artifact(self.sent.run_id, manifest, f"data/{mlflow_name(record['name'])}")
            told = json.loads(manifest.read_text("utf-8"))
            profile = {key: value for key, value in told.items() if isinstance(value, (str, int, float))}
        self._server.dataset(
            self.sent.run_id,
            name=record["name"],
            digest=record["digest"],
            path=record["path"],
            context=record.get("context") or "",
            profile=json.dumps(profile),
        )

    def _require_run(self, start: dict[str, Any]) -> None:
        """Goes on with the MLflow run that is noted, else makes one."""
        if not self.sent.run_id:
            last = (read_events(self.run_dir / FILE, "start") or [start])[-1]  # a resumed run may be told otherwise
            self.sent.run_id, there = self._server.open(
                self.sent.id,
                self._name(last),
                experiment=self.experiment or last.get("experiment") or "lavic",
                parent=self._parent(last.get("parent_run") or ""),
                start_ms=_ms(start),
                tags={"mlflow.source.name": "lavic"},
            )
            if there:
                self._skip_known()
            self._check_experiment()
        elif start or self.sent.status == LOST:
            self._server.running(self.sent.run_id)
        else:
            return
        self.sent.status = "RUNNING"
        self._save()

    def _name(self, start: dict[str, Any]) -> str:
        """The name that was chosen for the run, else its folder's: journals without ids name the command."""
        chosen = "id" in start or (start.get("params") or {}).get("tracking.run")
        return str((chosen and start.get("run")) or run_name(self.run_dir))

    def _parent(self, named: str) -> str | None:
        """The run that the journal names, where this store has it, else the one whose folder this one lies in.

        That one is sent first.
        """
        if named and self._server.has(named):
            return named
        for folder in runs_above(self.run_dir):
            above = Feed(folder, self._given, self.experiment, patience_s=max(10.0, self._patience_s))
            above.pump()
            return above.sent.run_id or None
        return None

    def _skip_known(self) -> None:
        """Goes on behind what the store has of a run that was sent to it from elsewhere."""
        known = self._server.last_steps(self.sent.run_id)
        self._waiting = [point for point in self._waiting if point[3] > known.get(point[0], -1)]
        for name, step in known.items():
            self.sent.last[name] = max(step, self.sent.last.get(name, -1))

    def _check_experiment(self) -> None:
        """Refuses to ignore an experiment that was asked for."""
        if not self.experiment or not self.sent.run_id:
            return
        if (there := self._server.experiment_of(self.sent.run_id)) != self.experiment:
            raise ConfigError(
                f"{self.run_dir} is in the experiment '{there}' of {self.uri}, and MLflow cannot move a run: leave "
                f"--experiment out, or delete the run there to send it to '{self.experiment}'"
            )

    def _look_at_nodes(self) -> None:
        """Sends the system metrics of each node; their step is the second of the run."""
        for path in sorted((self.run_dir / SYSTEM).glob("node-*.jsonl")):
            node = f"system/{path.stem}/"
            began = next((record["time"] for record in read_lines(path)), 0.0)
            for record, offset in _new_lines(path, self.sent.system.get(path.name, 0)):
                if record is not None and "event" in record:
                    self._server.tags(self.sent.run_id, {f"node.{path.stem}": record.get("host", "")})
                elif record is not None:
                    self._collect(record | {"step": round(record["time"] - began)}, node)
                self.sent.system[path.name] = offset
                if len(self._waiting) >= BATCH:
                    self._flush()
        if self._waiting:
            self._flush()

    def _run_is_there(self) -> bool:
        """Whether the run that is noted still exists; asked once."""
        if self.sent.run_id and not self._asked:
            self._asked = self._server.has(self.sent.run_id)
            return self._asked
        return True

    def _noted(self) -> Sent:
        return read_sent(self.run_dir, self._address) or Sent()

    def _save(self) -> None:
        self.sent.uri = self.uri
        write_state(self.run_dir, self._address, self.sent)


def send(run_dir: Path, uri: str, experiment: str = "") -> Feed:
    """Sends what a server does not have yet of one run's journal.

    Raises:
        DataError: The folder holds no journal.
        LaunchError: MLflow is not installed or did not take it.
    """
    if not (run_dir / FILE).is_file():
        raise DataError(f"{run_dir}: holds no {FILE}; give the folder of a run")
    feed = Feed(run_dir, uri, experiment, patience_s=60.0)
    try:
        feed.pump()
        feed.settle()
    except LavicError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        if "database or disk is full" in str(error):  # which is all that SQLite says
            raise LavicError(f"{feed.uri}: the disk is full: make room, then run the same command again") from None
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise LaunchError(
                f"{error.filename or run_dir}: {error.strerror}; sync writes there what the store has of the run"
            ) from None
        raise LaunchError(f"{feed.uri} did not take {run_dir}: {one_line(error)}") from error
    return feed


def one_line(error: Exception) -> str:
    """What went wrong, short and without secrets."""
    return redact(" ".join(str(error).split()))[:300] or type(error).__name__


def _new_lines(path: Path, start: int) -> Iterator[tuple[dict[str, Any] | None, int]]:
    """Whole lines from an offset, each with the offset behind it; None for a torn one."""
    with path.open("rb") as file:
        file.seek(start)
        for line in file:
            if not line.endswith(b"\n"):
                break
            start += len(line)
            yield parse_line(line), start


def _ms(record: dict[str, Any]) -> int:
    return int(1000 * (record.get("time") or time.time()))
