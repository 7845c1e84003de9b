"""SQLite stores of MLflow: creation, paths and locks."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from lavic.errors import LaunchError, LavicError
from lavic.tracking.journal import Journal
from lavic.tracking.mlflow_client import connect
from lavic.tracking.mlflow_store import sqlite_path, store_key
from lavic.tracking.mlflow_sync import sync
from tests.tracking.mlflow_runs import Store, stored, tracked

pytestmark = pytest.mark.slow


def test_mlflow_works_for_a_user_without_a_home_folder(store_uri, monkeypatch):
    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("HOME", "")
    monkeypatch.setattr(Path, "home", nowhere)
    assert connect(store_uri).search_experiments()
    assert os.environ["HOME"] == "/nonexistent"


def test_a_full_disk_under_a_store_is_one_line_and_exit_1(tmp_path, monkeypatch):
    run = tmp_path / "run"
    journal = Journal(run / "metrics.jsonl")
    journal.event("start", id="5" * 32, command="tune")
    journal.close("FINISHED")

    def full(path):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr("lavic.tracking.mlflow_client.create_if_missing", full)
    with pytest.raises(LavicError, match="the disk is full: make room, then run the same command again") as refused:
        sync(run, f"sqlite:///{tmp_path}/m.db")
    assert refused.value.exit_code == 1


RACER = """
import sys
from pathlib import Path
from lavic.tracking.mlflow_sync import sync
from lavic.tracking.tracker import Tracker

run = Path(sys.argv[1])
with Tracker.open(run) as tracker:
    tracker.start("tune")
    tracker.log(1, loss=2.0)
print("ready", flush=True)
sys.stdin.readline()
sync(run)
"""


def test_runs_that_start_together_make_one_store(tmp_path):
    """Two processes, no store yet; both are let go at the same moment."""
    words = [sys.executable, "-c", RACER]
    runs = [tmp_path / "runs" / name for name in "ab"]
    racers = [
        subprocess.Popen([*words, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for run in runs
    ]
    for racer in racers:
        assert racer.stdout and racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin
        racer.stdin.write("go\n")
        racer.stdin.flush()
    for racer in racers:
        racer.communicate(timeout=240)
    assert [racer.returncode for racer in racers] == [0, 0]
    assert [stored(run).points("loss") for run in runs] == [[(1, 2.0)]] * 2
    first = stored(runs[0])
    assert len(first.client.search_runs([first.run.info.experiment_id])) == 2
    left = {path.name for path in (tmp_path / "runs").iterdir()}
    assert left == {".mlflow.db.lock", "a", "b", "mlartifacts", "mlflow.db"}


def test_a_store_is_created_atomically_without_locks(tmp_path, monkeypatch):
    """A file system without locks: another machine's store came first, and stays."""
    ours, theirs = tmp_path / "mlflow.db", b"another machine's"
    from lavic.tracking import mlflow_store

    @contextlib.contextmanager
    def nobody_kept_out(uri):
        yield

    monkeypatch.setattr(mlflow_store, "store_lock", nobody_kept_out)
    link = os.link

    def late(aside, path):
        Path(path).write_bytes(theirs)
        link(aside, path)

    monkeypatch.setattr(mlflow_store.os, "link", late)
    mlflow_store.create_if_missing(ours)
    assert ours.read_bytes() == theirs
    assert list(tmp_path.iterdir()) == [ours], "ours is gone"


@pytest.mark.parametrize("content", [b"no database", b"half"])
def test_an_incomplete_store_is_refused(tmp_path, content):
    tracked(tmp_path / "run", range(1, 2))
    if content == b"half":  # killed while it made its first tables
        with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
            database.execute("CREATE TABLE experiments (id INTEGER)")
    else:
        (tmp_path / "mlflow.db").write_bytes(content)
    with pytest.raises(LaunchError, match=r"mlflow\.db: not a complete MLflow store; move it away"):
        sync(tmp_path / "run")


@pytest.mark.parametrize("name", ["a%20b", "what?", "no#1", "blank é", "p%", "a@b:c"])
def test_a_store_works_below_any_path(template, tmp_path, name):
    place = tmp_path / name
    tracked(place / "run", range(1, 3))
    (place / "run" / "table.txt").write_text("x")
    journal = Journal(place / "run" / "metrics.jsonl")
    journal.event("artifact", path="table.txt")
    journal.close()
    shutil.copy(template, place / "mlflow.db")
    run_sync = sync(place / "run")
    assert sync(place / "run").points_sent == 0
    assert [path.name for path in tmp_path.iterdir()] == [name], "nothing beside it"
    assert {path.name for path in place.iterdir()} == {".mlflow.db.lock", "mlflow.db", "mlartifacts", "run"}
    store = Store(run_sync.uri, run_sync.record.run_id)
    assert store.points("loss") == [(1, 1.0), (2, 0.5)]
    paths = {file.path for file in store.client.list_artifacts(run_sync.record.run_id)}
    assert {"table.txt", "curves"} <= paths
    assert sqlite_path(run_sync.uri) == place / "mlflow.db"
    assert store_key(run_sync.uri) == store_key(store_key(run_sync.uri)) == f"sqlite:{place}/mlflow.db"
