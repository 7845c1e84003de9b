"""Which store, experiment and parent a run has in MLflow, and that it is the same run under any path."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time

import pytest

from lavic.errors import ConfigError, LaunchError
from lavic.launch import sync as command
from lavic.tracking.journal import Journal, read_events
from lavic.tracking.mlflow_store import store_key
from lavic.tracking.mlflow_sync import sync
from lavic.tracking.settings import TrackingSettings
from lavic.tracking.sync_record import read_record
from lavic.tracking.tracker import Tracker
from tests.tracking.mlflow_runs import stored, tracked

pytestmark = pytest.mark.slow


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


def test_an_unattended_pipeline_is_not_marked_as_killed(store_uri, tmp_path):
    pipeline = tmp_path / "runs" / "pipeline"
    tracker = Tracker.open(pipeline)
    tracker.start("pipeline", attended=False)
    tracker.detach()
    sync(pipeline, store_uri)
    assert stored(pipeline, store_uri).run.info.status == "RUNNING"
    Tracker.open(pipeline).finish("FAILED")  # its last job
    sync(pipeline, store_uri)
    assert stored(pipeline, store_uri).run.info.status == "FAILED"


def test_a_run_is_the_same_under_any_path(store_uri, tmp_path, monkeypatch, capsys):
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


def test_a_folder_that_was_moved_with_its_store_keeps_it(store_uri, tmp_path):
    tracked(tmp_path / "runs" / "one", range(1, 3), settings=TrackingSettings(mlflow=True))
    sync(tmp_path / "runs" / "one")
    (tmp_path / "runs").rename(tmp_path / "moved")
    run_sync = sync(tmp_path / "moved" / "one")
    assert run_sync.points_sent == 0 and run_sync.uri == f"sqlite:///{tmp_path}/moved/mlflow.db"
    store = stored(tmp_path / "moved" / "one")
    assert len(store.client.search_runs([store.run.info.experiment_id])) == 1


def test_a_run_without_an_id_is_sent_once(store_uri, tmp_path):
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


def test_sync_uses_the_store_of_the_run(store_uri, tmp_path, monkeypatch, capsys):
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


def test_a_deleted_experiment_is_restored_with_its_runs(store_uri, tmp_path):
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


def test_a_run_cannot_be_moved_to_another_experiment(store_uri, tmp_path):
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
def test_a_child_in_another_experiment_is_refused_before_it_is_created(store_uri, tmp_path, known_by):
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


def test_a_resumed_run_with_another_experiment_logs_a_warning(store_uri, tmp_path, caplog):
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


def test_runs_are_named_after_their_folders(tmp_path):
    for folder in ("a/run", "b/run"):
        tracked(tmp_path / folder, range(1, 2))
    tracked(tmp_path / "a" / "run" / "runs" / "tune", range(1, 2))
    tracked(tmp_path / "c", range(1, 2), settings=TrackingSettings(run="mine"))
    names = [
        read_events(tmp_path / folder / "metrics.jsonl", "start")[0]["run"]
        for folder in ("a/run", "b/run", "a/run/runs/tune", "c")
    ]
    assert names == ["a/run", "b/run", "runs/tune", "mine"]


def test_the_uri_is_the_setting_then_the_environment_then_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://env")
    assert TrackingSettings(uri="http://flag").resolve_uri(tmp_path) == "http://flag"
    assert TrackingSettings().resolve_uri(tmp_path) == "http://env"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert TrackingSettings().resolve_uri(tmp_path / "run") == f"sqlite:///{tmp_path}/mlflow.db"
    assert os.environ.get("MLFLOW_TRACKING_URI") is None
