"""The content of a run in MLflow (SQLite), sent from its journal."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from pathlib import Path

import pytest

from lavic.errors import DataError, LaunchError
from lavic.launch import sync as command
from lavic.tracking.journal import Journal
from lavic.tracking.mlflow_sync import sync
from lavic.tracking.settings import TrackingSettings
from lavic.tracking.system_metrics import SYSTEM_FOLDER
from lavic.tracking.tracker import Tracker
from tests.tracking.mlflow_runs import lines, stored, tracked

pytestmark = pytest.mark.slow


def test_mlflow_gets_everything_and_a_resumed_run_has_no_duplicates(store_uri, tmp_path, monkeypatch):
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


def test_a_run_that_was_deleted_in_mlflow_is_sent_again(store_uri, tmp_path):
    uri, run = store_uri, tmp_path / "run"
    tracked(run, range(1, 3))
    sync(run, uri)
    store = stored(run, uri)
    store.client.delete_run(store.run.info.run_id)
    sync(run, uri)
    again = stored(run, uri)
    assert again.run.info.run_id != store.run.info.run_id
    assert len(again.points("loss")) == 2


def test_a_run_has_tags_of_its_environment(store_uri, tmp_path):
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


def test_plots_are_sent_as_artifacts(store_uri, tmp_path):
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


def test_each_node_has_its_system_metrics(store_uri, tmp_path):
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


def test_names_that_mlflow_refuses_stay_distinct(store_uri, tmp_path):
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


def test_sync_reports_wrong_arguments(tmp_path):
    with pytest.raises(DataError, match=r"holds no metrics\.jsonl"):
        sync(tmp_path)
    tracked(tmp_path / "run", range(1, 2))
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(LaunchError, match="did not take"):
            sync(tmp_path / "run", f"http://127.0.0.1:{closed.getsockname()[1]}")


def test_names_that_are_not_utf8_are_sent(store_uri, tmp_path):
    chosen = TrackingSettings(uri=store_uri, experiment="caf\udce9", run="x\udce9")
    tracker = Tracker.open(tmp_path / "run", chosen)
    tracker.start("tune", {})
    tracker.finish()
    sync(tmp_path / "run")
    store = stored(tmp_path / "run", store_uri)
    assert store.client.get_experiment(store.run.info.experiment_id).name == "caf?"
    sync(tmp_path / "run", experiment="caf\udce9")
    assert store.run.info.run_name == "x?"
