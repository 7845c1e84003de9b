"""Sending a run during the run: servers that fail, processes that are killed, the final status."""

from __future__ import annotations

import contextlib
import http.server
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from lavic.errors import LaunchError
from lavic.tracking.journal import Journal, read_journal
from lavic.tracking.mlflow_sync import sync
from lavic.tracking.settings import TrackingSettings
from lavic.tracking.sync_record import read_record
from lavic.tracking.tracker import Tracker
from tests.fork_server import MLFLOW_MODULES, ForkServer
from tests.tracking.mlflow_runs import stored, tracked

pytestmark = pytest.mark.slow


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


def test_a_wrong_server_is_one_line_and_changes_nothing(store_uri, tmp_path, capfd, caplog):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Wrong)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    uri = f"http://127.0.0.1:{server.server_address[1]}"
    tracked(tmp_path / "run", range(1, 6), settings=TrackingSettings(mlflow=True, uri=uri))
    (warning,) = caplog.messages
    assert re.fullmatch(r"MLflow does not have all of this run \(.+\); `lavic sync \S+` sends the rest", warning)
    output = capfd.readouterr().err  # the process that sends may be killed before it prints the same reason
    assert output.count("mlflow: ") <= 1 and "Traceback" not in output
    with pytest.raises(LaunchError, match="did not take"):
        sync(tmp_path / "run", uri)
    server.shutdown()
    assert sync(tmp_path / "run", store_uri).points_sent == 8
    assert stored(tmp_path / "run", store_uri).points("loss") == [(step, 1 / step) for step in range(1, 6)]


@pytest.mark.dist
def test_a_server_that_starts_late_gets_everything_once(tmp_path, fork_server: ForkServer):
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
        fork_server.preload(*MLFLOW_MODULES)
        for _ in range(2):
            both = [fork_server.popen(["-m", "lavic", "sync", run, "--uri", uri]) for _ in "ab"]
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
    (warning,) = caplog.messages
    assert "does not have all of this run (" in warning and "lavic sync" in warning
    assert capfd.readouterr().err.count("mlflow: ") <= 1
    assert sync(tmp_path / "run", store_uri).points_sent == 500
    assert stored(tmp_path / "run", store_uri).run.data.params == {"lr": "1"}


def test_a_store_that_takes_no_files_gets_everything_else(store_uri, tmp_path, caplog, capfd):
    """Without credentials or a package for the artifact store, or behind a proxy with a limit on sizes."""
    from mlflow import MlflowClient

    blocked, run = tmp_path / "blocked", tmp_path / "runs" / "run"
    blocked.touch()
    MlflowClient(tracking_uri=store_uri).create_experiment("lavic", f"file://{blocked}/artifacts")
    tracker = Tracker(Journal(run / "metrics.jsonl"), TrackingSettings(mlflow=True, uri=store_uri), timeout_s=240)
    for name in ("manifest.json", "config.yaml"):
        (run / name).write_text("{}")
    tracker.start("distill", {"lr": 0.1})
    tracker.dataset("training set", "abc", run, manifest=run / "manifest.json")
    tracker.artifact(run / "config.yaml")
    for step in range(1, 6):
        tracker.log(step, loss=1 / step)
    tracker.finish()
    (warning,) = caplog.messages
    assert re.fullmatch(
        r"MLflow does not have all of this run \(.*blocked.*\); `lavic sync \S+` sends the rest", warning
    )
    assert capfd.readouterr().err.count("mlflow: it does not take the run's files") == 1
    with pytest.raises(LaunchError, match=r"has the metrics of .*, but did not take 3 of its files \(.*blocked"):
        sync(run, store_uri)
    store = stored(run, store_uri)
    assert store.points("loss") == [(step, 1 / step) for step in range(1, 6)]
    assert store.run.info.status == "FINISHED" and store.run.inputs.dataset_inputs

    blocked.unlink()
    run = run.rename(run.with_name("renamed"))
    assert sync(run, store_uri).points_sent == 0
    files = {str(file.relative_to(blocked)) for file in blocked.rglob("*") if file.is_file()}
    names = ("config.yaml", "curves/loss.png")  # the manifest was named by its absolute path
    assert files == {f"artifacts/{store.run.info.run_id}/artifacts/{name}" for name in names}


def test_a_server_that_never_responds_delays_the_end_only_by_the_timeout(tmp_path, caplog):
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


def test_a_killed_run_is_not_shown_as_running(store_uri, tmp_path):
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


def test_a_synced_run_has_the_right_status(store_uri, tmp_path):
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


@pytest.mark.parametrize(
    "words", [["lavic.tracking.system_metrics", "0", "10"], ["lavic.tracking.live_sync", "sqlite:///{}/mlflow.db"]]
)
def test_a_background_process_ends_if_its_parent_has_already_exited(tmp_path, words):
    (tmp_path / "metrics.jsonl").touch()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    module, *more = (word.format(tmp_path) for word in words)
    line = [sys.executable, "-m", module, str(tmp_path), *more, str(gone.pid)]
    assert subprocess.run(line, timeout=60).returncode == 0
