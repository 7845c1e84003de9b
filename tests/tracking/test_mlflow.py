"""A real MLflow (sqlite), fed from the journals of runs."""

from __future__ import annotations

import contextlib
import http.server
import json
import logging
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lavic.errors import ConfigError, DataError, LaunchError, LavicError
from lavic.launch import sync as command
from lavic.tracking.journal import Journal, read_events, read_journal
from lavic.tracking.mlflow_client import connect
from lavic.tracking.mlflow_store import default_store_uri, sqlite_path, store_key
from lavic.tracking.mlflow_sync import sync
from lavic.tracking.settings import TrackingSettings
from lavic.tracking.sync_record import read_record
from lavic.tracking.system_metrics import SYSTEM_FOLDER
from lavic.tracking.tracker import Tracker

DEAD = """
import os, signal, sys, time
from pathlib import Path
from lavic.tracking.settings import TrackingSettings
from lavic.tracking.sync_record import read_records
from lavic.tracking.tracker import Tracker

tracker = Tracker.open(Path(sys.argv[1]), TrackingSettings(mlflow=True))
tracker.start("dies")
tracker.log(1, loss=2.0)
deadline = time.monotonic() + 60
while not any(record.run_id for record in read_records(Path(sys.argv[1])).values()):
    assert time.monotonic() < deadline
    time.sleep(0.05)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="session")
def template(tmp_path_factory):
    """An MLflow database without runs: making one takes seconds, copying it none."""
    place = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    connect(f"sqlite:///{place}").search_experiments()
    return place


@pytest.fixture
def store_uri(template, tmp_path):
    """The address of an empty database beside the runs of a test, tmp_path/runs."""
    (tmp_path / "runs").mkdir()
    shutil.copy(template, tmp_path / "runs" / "mlflow.db")
    return default_store_uri(tmp_path / "runs")


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def tracked(
    run: Path, steps: range, *, status: str = "FINISHED", settings: TrackingSettings | None = None, **params
) -> None:
    """A run from the outside: starts, logs a loss per step, ends."""
    tracker = Tracker(Journal(run / "metrics.jsonl"), settings, timeout_s=240)  # a loaded machine imports mlflow slowly
    tracker.start("distill", {"lr": 0.1, **params}, {"stage": "1"})
    for step in steps:
        tracker.log(step, loss=1 / step, **({"valid_loss": 2 / step} if step % 2 else {}))
    tracker.finish(status)


class Store:
    """What MLflow holds of a run."""

    def __init__(self, uri: str, run_id: str):
        from mlflow import MlflowClient

        self.client = MlflowClient(tracking_uri=uri)
        self.run = self.client.get_run(run_id)

    def points(self, key: str) -> list[tuple[int, float]]:
        history = self.client.get_metric_history(self.run.info.run_id, key)
        return sorted((point.step, point.value) for point in history)


def stored(run: Path, uri: str | None = None) -> Store:
    uri = uri or default_store_uri(run.resolve().parent)
    return Store(uri, read_record(run, uri).run_id)


def test_mlflow_gets_everything_and_a_resumed_run_goes_on_without_duplicates(store_uri, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    elsewhere = tmp_path / "cwd"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    run, settings = tmp_path / "runs" / "one", TrackingSettings(mlflow=True)
    tracked(run, range(1, 6), status="KILLED", settings=settings)
    sync(run)  # a run that is stopped does not wait long for MLflow
    store = stored(run)
    assert store.run.info.status == "KILLED"
    first_id = store.run.info.run_id

    with Tracker.open(run, settings) as tracker:
        tracker.start("distill", {"lr": 0.2, "new": "yes"})
        tracker.event("resume", step=3)
        for step in range(4, 8):
            tracker.log(step, loss=1 / step)
        (run / "table.txt").write_text("a table")
        tracker.artifact(run / "table.txt")
        tracker.event("captions", full={"perplexity": 2.5})

    store = stored(run)
    assert store.run.info.run_id == first_id
    assert (store.run.info.status, store.run.info.run_name) == ("FINISHED", "runs/one")
    assert store.points("loss") == [(step, 1 / step) for step in range(1, 8)]
    assert store.points("valid_loss") == [(step, 2 / step) for step in (1, 3, 5)]
    assert store.run.data.params == {"lr": "0.1", "new": "yes"}
    assert store.run.data.tags["changed.lr"] == "0.2"
    assert store.run.data.tags["stage"] == "1"
    assert json.loads(store.run.data.tags["event.captions"]) == {"full": {"perplexity": 2.5}}
    assert [file.path for file in store.client.list_artifacts(first_id)] == ["curves", "table.txt"]
    assert list(elsewhere.iterdir()) == [], "nothing is put where the process happens to run"


def test_a_user_without_a_home_has_mlflow_too(store_uri, monkeypatch):
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


def test_sync_sends_a_journal_once(tmp_path, capsys):
    uri = f"sqlite:///{tmp_path}/not/there/yet.db"
    tracked(tmp_path / "runs" / "a", range(1, 4), big="x" * 10_000)
    tracked(tmp_path / "runs" / "deep" / "b", range(1, 3))
    assert command.main([str(tmp_path / "runs"), "--uri", uri, "--experiment", "beauty"]) == 0
    assert command.main([str(tmp_path / "runs"), "--uri", uri]) == 0
    output = capsys.readouterr().out
    assert "a: 5 points" in output and "a: 0 points" in output
    store = stored(tmp_path / "runs" / "a", uri)
    assert store.points("loss") == [(step, 1 / step) for step in (1, 2, 3)]
    assert store.client.get_experiment(store.run.info.experiment_id).name == "beauty"
    assert store.run.info.end_time - store.run.info.start_time < 60_000
    assert store.run.info.status == "FINISHED"

    # Lines that come later are sent later, also after what was noted as sent is older than what was sent.
    journal = Journal(tmp_path / "runs" / "a" / "metrics.jsonl")
    noted = (tmp_path / "runs" / "a" / "mlflow.json").read_text()
    journal.log(4, loss=0.25)
    assert sync(tmp_path / "runs" / "a", uri).points_sent == 1
    (tmp_path / "runs" / "a" / "mlflow.json").write_text(noted)
    assert sync(tmp_path / "runs" / "a", uri).points_sent == 1
    assert stored(tmp_path / "runs" / "a", uri).points("loss") == [(step, 1 / step) for step in (1, 2, 3, 4)]


def test_a_run_that_was_deleted_in_mlflow_is_made_again(store_uri, tmp_path):
    uri, run = store_uri, tmp_path / "run"
    tracked(run, range(1, 3))
    sync(run, uri)
    store = stored(run, uri)
    store.client.delete_run(store.run.info.run_id)
    sync(run, uri)
    again = stored(run, uri)
    assert again.run.info.run_id != store.run.info.run_id
    assert len(again.points("loss")) == 2


def test_a_child_run_is_shown_under_its_parent(store_uri, tmp_path):
    parent = Tracker.open(tmp_path / "demo", TrackingSettings(mlflow=True, uri=store_uri))
    parent.start("demo")
    deadline = time.monotonic() + 60
    while not (record := read_record(tmp_path / "demo", store_uri)) or not record.run_id:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    parent_id = record.run_id
    settings = TrackingSettings(mlflow=True, uri=store_uri, parent_run=parent_id, run="stage 1")
    tracked(tmp_path / "demo" / "distill", range(1, 2), settings=settings)
    parent.finish()
    child = stored(tmp_path / "demo" / "distill", store_uri)
    assert child.run.data.tags["mlflow.parentRunId"] == parent_id
    assert child.run.info.run_name == "stage 1"


def test_a_run_inside_another_runs_folder_is_its_child(store_uri, tmp_path):
    """A pipeline's stages, synced in any order, by folders alone; the pipeline goes on meanwhile."""
    pipeline = tmp_path / "runs" / "pipeline"
    tracker = Tracker.open(pipeline)
    tracker.start("pipeline")
    for stage in ("distill", "tune"):
        tracked(pipeline / "runs" / stage, range(1, 3))
    sync(pipeline / "runs" / "tune", store_uri)
    parent = stored(pipeline, store_uri)
    assert parent.run.info.status == "RUNNING"
    tracker.finish()
    assert command.main([str(pipeline), "--uri", store_uri]) == 0
    assert stored(pipeline, store_uri).run.info.status == "FINISHED"
    for stage in ("distill", "tune"):
        child = stored(pipeline / "runs" / stage, store_uri).run
        assert child.data.tags["mlflow.parentRunId"] == parent.run.info.run_id
        assert child.info.experiment_id == parent.run.info.experiment_id
    assert len(parent.client.search_runs([parent.run.info.experiment_id])) == 3


def test_a_pipeline_of_jobs_is_not_dead_while_nobody_attends_it(store_uri, tmp_path):
    pipeline = tmp_path / "runs" / "pipeline"
    tracker = Tracker.open(pipeline)
    tracker.start("pipeline", attended=False)
    tracker.detach()
    sync(pipeline, store_uri)
    assert stored(pipeline, store_uri).run.info.status == "RUNNING"
    Tracker.open(pipeline).finish("FAILED")  # its last job
    sync(pipeline, store_uri)
    assert stored(pipeline, store_uri).run.info.status == "FAILED"


def test_what_made_a_run_stands_in_it(store_uri, tmp_path):
    """Code, versions, data, adapters."""
    run, manifest = tmp_path / "runs" / "one", tmp_path / "manifest.json"
    manifest.write_text(json.dumps({"samples": 12, "shards": [{"name": "x"}]}))
    with Tracker.open(run) as tracker:
        tracker.start("distill")
        tracker.dataset("training set", "0123abcd", tmp_path, context="training", manifest=manifest)
        tracker.dataset("item store", "4567", tmp_path)
        tracker.tag({"adapter.vision": "89ef"})
    sync(run, store_uri)
    store = stored(run, store_uri)
    tags = store.run.data.tags
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    if head.returncode == 0:
        assert tags["mlflow.source.git.commit"] == head.stdout.strip()
    assert {"version.lavic", "version.torch", "version.python", "host", "command", "mlflow.user"} <= tags.keys()
    assert tags["adapter.vision"] == "89ef"
    inputs = {entry.dataset.name: (entry.dataset.digest, entry.tags) for entry in store.run.inputs.dataset_inputs}
    assert {name: digest for name, (digest, _) in inputs.items()} == {"training set": "0123abcd", "item store": "4567"}
    assert [(tag.key, tag.value) for tag in inputs["training set"][1]] == [("mlflow.data.context", "training")]
    (kept,) = store.client.list_artifacts(store.run.info.run_id, "data/training set")
    assert kept.path == "data/training set/manifest.json"


def test_curves_are_kept_as_pictures(store_uri, tmp_path):
    from PIL import Image

    run = tmp_path / "runs" / "one"
    with Tracker.open(run) as tracker:
        tracker.start("distill")
        tracker.event("captions", arm="full", perplexity=1.5)
        for step in range(200):
            tracker.log(step, loss=3 / (step + 1))
        for epoch in range(4):
            tracker.log(50 * epoch, epoch=float(epoch), valid_perplexity=5 - epoch, valid_loss=1.0)
    sync(run, store_uri)
    store = stored(run, store_uri)
    kept = sorted(file.path for file in store.client.list_artifacts(store.run.info.run_id, "curves"))
    assert kept == ["curves/loss.png", "curves/perplexity.png"]
    for name in kept:
        with Image.open(run / name) as picture:
            assert picture.format == "PNG" and picture.width > 600
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 20, "nothing is drawn"


def test_every_node_is_seen_apart(store_uri, tmp_path):
    """Two nodes' watchers, a restart of one of them; the steps are seconds of the run and never go back."""
    run = tmp_path / "runs" / "one"
    tracked(run, range(1, 3))
    for node in (0, 1, 0):
        file = run / SYSTEM_FOLDER / f"node-{node}.jsonl"
        lines_before = len(lines(file)) if file.exists() else 0
        tracker = Tracker.open(run, TrackingSettings(system_every=0.5), main=False, node=node)
        until = time.monotonic() + 60
        while not file.exists() or len(file.read_text().splitlines()) < lines_before + 4:
            assert time.monotonic() < until, "nobody watches"
            time.sleep(0.1)
        tracker.finish()
    sync(run, store_uri)
    assert sync(run, store_uri).points_sent == 0
    watcher = Journal(run / SYSTEM_FOLDER / "node-1.jsonl")
    watcher.log(0, cpu_utilization_percentage=50.0)  # it may speak once more than the run
    watcher.close()
    sync(run, store_uri)
    store = stored(run, store_uri)
    assert store.run.info.status == "FINISHED"
    for node in ("node-0", "node-1"):
        assert store.run.data.tags[f"node.{node}"] == socket.gethostname()
        for name in ("cpu_utilization_percentage", "system_memory_usage_megabytes", "disk_usage_percentage"):
            points = store.points(f"system/{node}/{name}")
            assert points and len({step for step, _ in points}) == len(points)
            assert all(value >= 0 for _, value in points)
    assert store.points("system/node-0/system_memory_usage_megabytes")[0][1] > 10
    assert len(list((run / SYSTEM_FOLDER).iterdir())) == 2


class Wrong(http.server.BaseHTTPRequestHandler):
    """Answers everything, and never what was asked for."""

    def do_GET(self) -> None:
        body = b"<html>Please log in</html>"
        self.send_response(200 if "experiments" in self.path else 500)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        """Is quiet."""


def test_a_wrong_server_is_one_line_and_changes_nothing(store_uri, tmp_path, capfd):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Wrong)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    uri = f"http://127.0.0.1:{server.server_address[1]}"
    tracked(tmp_path / "run", range(1, 6), settings=TrackingSettings(mlflow=True, uri=uri))
    output = capfd.readouterr().err
    assert output.count("mlflow: ") == 1 and "Traceback" not in output
    with pytest.raises(LaunchError, match="did not take"):
        sync(tmp_path / "run", uri)
    server.shutdown()
    assert sync(tmp_path / "run", store_uri).points_sent == 8
    assert stored(tmp_path / "run", store_uri).points("loss") == [(step, 1 / step) for step in range(1, 6)]


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


def test_a_store_is_put_in_place_whole_where_no_lock_is_known(tmp_path, monkeypatch):
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


def test_a_run_is_one_run_under_any_path(store_uri, tmp_path, monkeypatch, capsys):
    """Relative, through a link, a copy, moved, without what was noted, and old journals that have no id."""
    runs = tmp_path / "runs"
    run = runs / "one"
    tracked(run, range(1, 4), settings=TrackingSettings(mlflow=True))
    sync(run)
    (tmp_path / "link").symlink_to(run)
    shutil.copytree(run, runs / "copy")
    shutil.copytree(run, tmp_path / "elsewhere" / "copy")
    (runs / "copy" / "mlflow.json").unlink()
    monkeypatch.chdir(runs)
    for place in ("one", "../runs/./one", str(tmp_path / "link"), "copy", str(tmp_path / "elsewhere" / "copy")):
        assert command.main([place]) == 0
    assert capsys.readouterr().out.count(": 0 points -> ") == 5
    assert sorted(path.name for path in tmp_path.rglob("*.db")) == ["mlflow.db"], "all goes to one store"
    store = stored(run, store_uri)
    assert len(store.client.search_runs([store.run.info.experiment_id])) == 1

    # another spelling of the store
    monkeypatch.chdir(tmp_path)
    assert sync(run, "sqlite:///runs/mlflow.db").uri == store_uri
    # a copy goes on alone, and is the same run
    journal = Journal(runs / "copy" / "metrics.jsonl")
    journal.log(4, loss=0.25)
    journal.close()
    assert sync(runs / "copy").points_sent == 1
    assert stored(run, store_uri).points("loss") == [(step, 1 / step) for step in range(1, 5)]
    assert len(store.client.search_runs([store.run.info.experiment_id])) == 1


def test_a_folder_that_was_moved_with_its_store_stays_with_it(store_uri, tmp_path):
    tracked(tmp_path / "runs" / "one", range(1, 3), settings=TrackingSettings(mlflow=True))
    sync(tmp_path / "runs" / "one")
    (tmp_path / "runs").rename(tmp_path / "moved")
    run_sync = sync(tmp_path / "moved" / "one")
    assert run_sync.points_sent == 0 and run_sync.uri == f"sqlite:///{tmp_path}/moved/mlflow.db"
    store = stored(tmp_path / "moved" / "one")
    assert len(store.client.search_runs([store.run.info.experiment_id])) == 1


def test_a_run_from_before_there_were_ids_is_one_run_too(store_uri, tmp_path):
    run = tmp_path / "runs" / "old"
    run.mkdir()
    old = [{"event": "start", "run": "tune", "experiment": "lavic"}, {"step": 1, "loss": 2.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps({"time": 1.7e9, **line}) + "\n" for line in old))
    shutil.copytree(run, tmp_path / "runs" / "copy")
    assert sync(run).points_sent == 1
    assert sync(tmp_path / "runs" / "copy").points_sent == 0
    assert stored(run).run.info.run_name == "runs/old"
    noted = json.loads((run / "mlflow.json").read_text())[store_key(store_uri)]
    stored(run).client.delete_tag(noted["run_id"], "lavic.run_id")
    before = {key: value for key, value in noted.items() if key not in ("id", "uri")}
    (run / "mlflow.json").write_text(json.dumps({store_uri: before}))
    with Tracker.open(run) as tracker:
        tracker.start("tune")
        tracker.log(2, loss=1.0)
    assert sync(run).points_sent == 1
    assert sync(tmp_path / "runs" / "copy").points_sent == 0
    store = stored(run)
    assert store.points("loss") == [(1, 2.0), (2, 1.0)]
    assert len(store.client.search_runs([store.run.info.experiment_id])) == 1


def test_sync_sends_a_run_to_where_it_was_told_to_go(store_uri, tmp_path, monkeypatch, capsys):
    """The store it was started with, before MLFLOW_TRACKING_URI; those that were told nothing all to one place."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{closed.getsockname()[1]}"
        tracked(tmp_path / "dead" / "run", range(1, 3), settings=TrackingSettings(uri=dead))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", store_uri)
        with pytest.raises(LaunchError, match=f"{dead} did not take"):
            sync(tmp_path / "dead" / "run")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    tracked(tmp_path / "runs" / "a", range(1, 3))
    tracked(tmp_path / "runs" / "deep" / "er" / "b", range(1, 3))
    tracked(tmp_path / "runs" / "a" / "below", range(1, 3))
    assert command.main([str(tmp_path / "runs")]) == 0
    output = capsys.readouterr().out
    assert output.count(f" -> {store_uri} (run ") == 3
    assert output.endswith(f"view with: mlflow ui --backend-store-uri {store_uri}\n")
    assert list(tmp_path.rglob("*.db")) == [tmp_path / "runs" / "mlflow.db"]
    assert command.main([str(tmp_path / "runs" / "deep" / "er" / "b")]) == 0, "where it was sent before"
    assert list(tmp_path.rglob("*.db")) == [tmp_path / "runs" / "mlflow.db"]
    capsys.readouterr()
    # one that fails does not keep the others
    with pytest.raises(LaunchError, match="did not take"):
        command.main([str(tmp_path / "dead"), str(tmp_path / "runs")])
    assert capsys.readouterr().out.count(f" -> {store_uri} (run ") == 3


def test_an_experiment_that_was_deleted_comes_back_with_its_runs(store_uri, tmp_path):
    run = tmp_path / "runs" / "one"
    tracked(run, range(1, 3))
    sync(run)
    store = stored(run)
    store.client.delete_experiment(store.run.info.experiment_id)
    sync(run)
    (run / "mlflow.json").unlink()
    store.client.delete_experiment(store.run.info.experiment_id)
    tracked(tmp_path / "runs" / "two", range(1, 3))
    assert command.main([str(tmp_path / "runs")]) == 0
    runs = store.client.search_runs([store.run.info.experiment_id])
    assert {each.info.run_name for each in runs} == {"runs/one", "runs/two"} and len(runs) == 2
    assert stored(run).run.info.run_id == store.run.info.run_id


def test_another_experiment_for_a_run_that_is_in_one_is_refused(store_uri, tmp_path):
    run = tmp_path / "runs" / "one"
    tracked(run, range(1, 3))
    sync(run, store_uri, "beauty")
    sync(run, store_uri, "beauty")
    with pytest.raises(ConfigError, match=r"is in the experiment 'beauty' of .*cannot move a run"):
        sync(run, store_uri, "sport")
    assert stored(run).client.get_experiment_by_name("sport") is None
    sync(run)
    stored(run).client.delete_run(stored(run).run.info.run_id)
    sync(run, store_uri, "sport")
    store = stored(run)
    assert store.client.get_experiment(store.run.info.experiment_id).name == "sport"


@pytest.mark.parametrize("known_by", ["id", "folder"])
def test_another_experiment_than_the_parents_is_refused_before_a_run_is_created(store_uri, tmp_path, known_by):
    parent, child = tmp_path / "runs" / "one", tmp_path / "runs" / "one" / "child"
    tracked(parent, range(1, 2))
    sync(parent, store_uri, "beauty")
    parent_id = stored(parent).run.info.run_id
    if known_by == "id":
        child = tmp_path / "elsewhere"
    tracked(child, range(1, 2), settings=TrackingSettings(parent_run=parent_id if known_by == "id" else None))
    with pytest.raises(ConfigError, match="is in the experiment 'beauty'"):
        sync(child, store_uri, "sport")
    assert len(stored(parent).client.search_runs([stored(parent).run.info.experiment_id])) == 1
    sync(child, store_uri)
    assert stored(child, store_uri).run.data.tags["mlflow.parentRunId"] == parent_id


def test_a_run_that_goes_on_in_another_experiment_says_where_it_is(store_uri, tmp_path, caplog):
    run = tmp_path / "runs" / "one"
    tracked(run, range(1, 2), settings=TrackingSettings(experiment="first"))
    tracked(run, range(2, 3), settings=TrackingSettings(experiment="second"))
    sync(run)
    store = stored(run)
    assert store.client.get_experiment(store.run.info.experiment_id).name == "second", "it was not sent before"
    assert "stays in" not in caplog.text
    tracked(run, range(3, 4), settings=TrackingSettings(experiment="third"))
    assert "this run stays in MLflow's experiment 'second'" in caplog.text
    sync(run)
    assert stored(run).run.info.experiment_id == store.run.info.experiment_id


@pytest.mark.parametrize("content", [b"no database", b"half"])
def test_a_store_that_was_never_finished_is_named(tmp_path, content):
    tracked(tmp_path / "run", range(1, 2))
    if content == b"half":  # killed while it made its first tables
        with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
            database.execute("CREATE TABLE experiments (id INTEGER)")
    else:
        (tmp_path / "mlflow.db").write_bytes(content)
    with pytest.raises(LaunchError, match=r"mlflow\.db: not a complete MLflow store; move it away"):
        sync(tmp_path / "run")


@pytest.mark.parametrize("name", ["a%20b", "what?", "no#1", "blank é", "p%", "a@b:c"])
def test_a_store_below_any_path_holds_the_run(template, tmp_path, name):
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


def test_names_that_mlflow_does_not_take_stay_apart(store_uri, tmp_path):
    run = tmp_path / "runs" / "one"
    names = ["tëst a", "a+b", "a*b", "../up", "/top", "x//y", "n" * 300 + "1", "n" * 300 + "2", "\0 \ud800", "."]
    with Tracker.open(run) as tracker:
        tracker.start("evaluate", {name: name for name in names}, {name: name for name in names})
        for number, name in enumerate(names):
            tracker.log(0, **{f"{name}/lavic/hit_rate": float(number)})
            tracker.dataset(name, f"d{number}", run / "metrics.jsonl", manifest=run / "config.json")
    sync(run)
    assert sync(run).points_sent == 0
    store = stored(run)
    values = {name: value for name, value in store.run.data.metrics.items() if name.endswith("hit_rate") or "-" in name}
    assert sorted(values.values()) == [float(number) for number in range(len(names))]
    assert values["tëst a/lavic/hit_rate"] == 0
    assert len(store.run.data.params) == len(names)
    assert {entry.dataset.digest for entry in store.run.inputs.dataset_inputs} == {f"d{n}" for n in range(len(names))}


def test_runs_are_called_after_their_folders(tmp_path):
    for folder in ("a/run", "b/run"):
        tracked(tmp_path / folder, range(1, 2))
    tracked(tmp_path / "a" / "run" / "runs" / "tune", range(1, 2))
    tracked(tmp_path / "c", range(1, 2), settings=TrackingSettings(run="mine"))
    names = [
        read_events(tmp_path / folder / "metrics.jsonl", "start")[0]["run"]
        for folder in ("a/run", "b/run", "a/run/runs/tune", "c")
    ]
    assert names == ["a/run", "b/run", "runs/tune", "mine"]


@pytest.mark.dist
def test_a_real_server_that_comes_late_gets_everything_once(tmp_path):
    """`mlflow server` is down while the run goes on, comes up, and is synced by two processes at once, twice."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    run = tmp_path / "runs" / "one"
    tracked(run, range(1, 2501), settings=TrackingSettings(mlflow=True, uri=uri), status="KILLED")
    (run / "table.txt").write_text("a table")
    with Tracker.open(run) as tracker:
        tracker.start("distill", {"lr": 0.1})
        tracker.event("resume", step=2400)
        for step in range(2401, 2601):
            tracker.log(step, loss=1 / step)
        tracker.artifact(run / "table.txt")
    words = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1", "--backend-store-uri"]
    words += [f"sqlite:///{tmp_path}/server.db", "--artifacts-destination", str(tmp_path / "kept")]
    log = (tmp_path / "server.log").open("w")
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", *words], stdout=log, stderr=log, start_new_session=True
    )
    try:
        until = time.monotonic() + 240
        while time.monotonic() < until:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            assert server.poll() is None, (tmp_path / "server.log").read_text()
            time.sleep(0.5)
        line = [sys.executable, "-m", "lavic", "sync", str(run), "--uri", uri]
        for _ in range(2):
            both = [subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in "ab"]
            outputs = [process.communicate(timeout=240) for process in both]
            assert [process.returncode for process in both] == [0, 0], outputs
        store = stored(run, uri)
        assert store.points("loss") == [(step, 1 / step) for step in range(1, 2601)]
        assert store.run.info.status == "FINISHED"
        paths = {file.path for file in store.client.list_artifacts(store.run.info.run_id)}
        assert {"table.txt", "curves"} <= paths
        assert len(store.client.search_runs([store.run.info.experiment_id])) == 1
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        log.close()


def test_a_dead_server_neither_stops_nor_slows_the_run(store_uri, tmp_path, caplog, capfd):
    caplog.set_level(logging.WARNING)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{closed.getsockname()[1]}"
        settings = TrackingSettings(mlflow=True, uri=uri)
        tracker = Tracker(Journal(tmp_path / "run" / "metrics.jsonl"), settings, timeout_s=240)
        start = time.monotonic()
        tracker.start("x", {"lr": 1})
        for step in range(1, 501):
            tracker.log(step, loss=1.0)
        assert time.monotonic() - start < 1
        tracker.finish()
    assert len(read_journal(tmp_path / "run" / "metrics.jsonl")) == 500
    assert "lavic sync" in caplog.text
    assert capfd.readouterr().err.count("mlflow: ") == 1
    assert sync(tmp_path / "run", store_uri).points_sent == 500
    assert stored(tmp_path / "run", store_uri).run.data.params == {"lr": "1"}


def test_a_server_that_never_answers_holds_the_end_only_for_the_patience(tmp_path, caplog):
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        settings = TrackingSettings(mlflow=True, uri=f"http://127.0.0.1:{mute.getsockname()[1]}")
        tracker = Tracker(Journal(tmp_path / "run" / "metrics.jsonl"), settings, timeout_s=1.0)
        tracker.start("x")
        tracker.log(1, loss=1.0)
        start = time.monotonic()
        tracker.finish()
        assert time.monotonic() - start < 5
    assert "lavic sync" in caplog.text


def test_a_run_that_is_killed_does_not_stay_running(store_uri, tmp_path):
    run = tmp_path / "runs" / "one"
    dead = subprocess.run([sys.executable, "-c", DEAD, str(run)], timeout=120)
    assert dead.returncode == -signal.SIGKILL
    until = time.monotonic() + 60
    # the feeding process outlives the run, and may not have spoken yet
    while time.monotonic() < until:
        if read_record(run, store_uri) and stored(run).run.info.status != "RUNNING":
            break
        time.sleep(0.2)
    assert stored(run).run.info.status == "KILLED"
    assert stored(run).points("loss") == [(1, 2.0)]


VANISHES = """
import os, signal, sys, time
from pathlib import Path
from lavic.tracking.tracker import Tracker

tracker = Tracker.open(Path(sys.argv[1]))
tracker.start("vanishes")
tracker.log(int(sys.argv[2]), loss=2.0)
if not os.fork():  # as a data loader's worker: it outlives its parent, and must not pass for it
    time.sleep(30)
print("going", flush=True)
time.sleep(30)
"""


def test_a_synced_run_has_its_true_status(store_uri, tmp_path):
    """Killed with all that was beside it, as by a scheduler: nobody but `lavic sync` can tell MLflow."""
    run = tmp_path / "runs" / "one"

    def process(step: int) -> subprocess.Popen[str]:
        words = [sys.executable, "-c", VANISHES, str(run), str(step)]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True)
        assert process.stdout and process.stdout.readline() == "going\n"
        return process

    first = process(1)
    sync(run, store_uri)
    assert stored(run).run.info.status == "RUNNING"
    first.kill()
    first.wait()
    sync(run, store_uri)
    os.killpg(first.pid, signal.SIGKILL)
    killed = stored(run)
    assert killed.run.info.status == "KILLED"
    assert abs(killed.run.info.end_time / 1000 - time.time()) < 60

    # taken for dead where locks do not reach another node, it speaks
    journal = Journal(run / "metrics.jsonl")
    journal.log(2, loss=2.0)
    sync(run, store_uri)
    assert stored(run).run.info.status == "RUNNING"
    journal.close()
    sync(run, store_uri)
    assert stored(run).run.info.status == "KILLED"

    second = process(2)
    sync(run, store_uri)
    assert stored(run).run.info.status == "RUNNING"
    os.killpg(second.pid, signal.SIGKILL)
    second.wait()
    tracked(run, range(3, 5))
    sync(run, store_uri)
    assert (stored(run).run.info.run_id, stored(run).run.info.status) == (killed.run.info.run_id, "FINISHED")
    assert [step for step, _ in stored(run).points("loss")] == [1, 2, 3, 4]


def test_without_mlflow_installed_there_is_one_warning(tmp_path):
    code = (
        "import sys, logging; sys.modules['mlflow'] = None; logging.basicConfig()\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'mlflow' else find(name, *a)\n"
        "from pathlib import Path; from lavic.tracking.tracker import Tracker, TrackingSettings\n"
        "t = Tracker.open(Path(sys.argv[1]), TrackingSettings(mlflow=True))\n"
        "t.start('x'); t.log(1, loss=1.0); t.finish()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("MLflow is not installed") == 1
    assert len(read_journal(tmp_path / "run" / "metrics.jsonl")) == 1


def test_sync_says_what_is_wrong(tmp_path):
    with pytest.raises(DataError, match=r"holds no metrics\.jsonl"):
        sync(tmp_path)
    tracked(tmp_path / "run", range(1, 2))
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(LaunchError, match="did not take"):
            sync(tmp_path / "run", f"http://127.0.0.1:{closed.getsockname()[1]}")


def test_the_address_is_the_setting_then_the_environment_then_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://env")
    assert TrackingSettings(uri="http://flag").resolve_uri(tmp_path) == "http://flag"
    assert TrackingSettings().resolve_uri(tmp_path) == "http://env"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert TrackingSettings().resolve_uri(tmp_path / "run") == f"sqlite:///{tmp_path}/mlflow.db"
    assert os.environ.get("MLFLOW_TRACKING_URI") is None


@pytest.mark.parametrize(
    "words", [["lavic.tracking.system_metrics", "0", "10"], ["lavic.tracking.live_sync", "sqlite:///{}/mlflow.db"]]
)
def test_a_process_beside_a_run_goes_when_the_run_was_gone_before_it_looked(tmp_path, words):
    (tmp_path / "metrics.jsonl").touch()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    module, *more = (word.format(tmp_path) for word in words)
    line = [sys.executable, "-m", module, str(tmp_path), *more, str(gone.pid)]
    assert subprocess.run(line, timeout=60).returncode == 0


def test_an_experiment_and_a_run_with_names_that_are_no_text_are_sent(store_uri, tmp_path):
    chosen = TrackingSettings(uri=store_uri, experiment="caf\udce9", run="x\udce9")
    tracker = Tracker.open(tmp_path / "run", chosen)
    tracker.start("tune", {})
    tracker.finish()
    sync(tmp_path / "run")
    store = stored(tmp_path / "run", store_uri)
    assert store.client.get_experiment(store.run.info.experiment_id).name == "caf?"
    sync(tmp_path / "run", experiment="caf\udce9")
    assert store.run.info.run_name == "x?"
