"""Both stages as commands, killed or stopped at any time: the same command resumes and ends with the same result."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lavic.tracking.journal import read_events, read_journal
from lavic.tracking.mlflow_sync import sync
from tests.conftest import go_without
from tests.fork_server import ForkedProcess, ForkServer
from tests.train.assets import Assets
from tests.train.conftest import curve

pytestmark = pytest.mark.dist

STEPS, KILLS = 12, 11
"""Steps of a run; kills of each stage."""


def command_argv(command: str, assets: Assets, out: Path, *options: str) -> list[str]:
    inputs = {
        "distill": ["--shards", assets.photos, "--valid", assets.valid, "--loop.num-workers", "1"],
        "tune": ["--store", assets.store, "--train", assets.rows, "--valid", assets.rows, "--max-length", "400"],
    }[command]
    loop = {"steps": STEPS, "global-batch-size": 8, "lr": 0.01, "save-every": 2, "eval-every": 3}
    flags = [arg for key, value in loop.items() for arg in (f"--loop.{key}", str(value))]
    lora = ("--lora.r", "2", "--lora.dropout", "0.2")
    return [command, *map(str, inputs), "--out", str(out), "--model.name", str(assets.base), *flags, *lora, *options]


def adapter_digests(run: Path) -> dict[str, str]:
    """The bundle's weights, as digests."""
    files = sorted((run / "bundle").rglob("*.safetensors"))
    return {str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def output(ranks: list[ForkedProcess]) -> str:
    return "".join(rank.log.read_text() for rank in ranks)[-4000:]


@pytest.mark.parametrize(("command", "ranks", "every", "seed"), [("distill", 1, 2, 11), ("tune", 2, 1, 12)])
def test_sigkill_at_any_time_gives_the_same_run(
    command: str, ranks: int, every: int, seed: int, assets: Assets, tmp_path: Path, fork_server: ForkServer
) -> None:
    """With dropout, a loader worker and frequent checkpoints; one rank is killed each time, the others soon after."""
    save_often = ("--loop.save-every", str(every))
    rng = random.Random(seed)
    uninterrupted, log = tmp_path / "uninterrupted", tmp_path / "log"
    started = time.monotonic()
    first = fork_server.start(command_argv(command, assets, uninterrupted, *save_often), log, ranks=ranks)
    assert fork_server.wait(first) == [0] * ranks, output(first)
    duration = time.monotonic() - started

    def resumes(killed: Path) -> int:
        """Compares a finished run with the uninterrupted one; returns how often it resumed from a checkpoint."""
        assert curve(killed) == curve(uninterrupted)
        assert adapter_digests(killed) == adapter_digests(uninterrupted)
        return sum(event["step"] > 0 for event in read_events(killed / "metrics.jsonl", "resume"))

    kills = resumed = 0
    killed = tmp_path / "killed-0"
    while kills < KILLS or not (killed / "result.json").exists():
        if (killed / "result.json").exists():  # a kill may come between the last file and the end of the process
            resumed += resumes(killed)
            killed = tmp_path / f"killed-{kills}"
        run = fork_server.start(command_argv(command, assets, killed, *save_often), log, ranks=ranks)
        if kills < KILLS:
            delay = rng.uniform(0.0, 0.9) * duration
            if kills % 3 == 0:  # some kills must come after a checkpoint, even on a slow machine
                while not list(killed.glob("checkpoints/step-*/COMPLETE")) and not any(rank.gone for rank in run):
                    time.sleep(0.002)
                delay /= 4
            deadline = time.monotonic() + delay
            while time.monotonic() < deadline and not any(rank.gone for rank in run):
                time.sleep(0.002)
            if not any(rank.gone for rank in run):
                victim = rng.choice(run)
                os.kill(victim.pid, signal.SIGKILL)
                kills += 1
                print(f"{command}: seed {seed}, kill {kills} after {delay:.2f} of {duration:.2f} s")
                if ranks > 1 and rng.random() < 0.5:
                    time.sleep(0.05)
                fork_server.kill(run)  # as a launcher ends the other ranks
                fork_server.wait(run)
                continue
        assert fork_server.wait(run) == [0] * ranks, output(run)
    resumed += resumes(killed)
    assert resumed, "no kill came after a checkpoint"
    assert [row["step"] for row in curve(uninterrupted) if "loss" in row] == list(range(1, STEPS + 1))


def test_a_run_resumes_on_other_numbers_of_ranks(assets: Assets, tmp_path: Path, fork_server: ForkServer) -> None:
    """2 -> 1 -> 4 ranks with the same global batch: the samples and losses of each step are the same."""
    dropout = ("--lora.dropout", "0.0")
    uninterrupted, moved, log = tmp_path / "uninterrupted", tmp_path / "moved", tmp_path / "log"
    run = fork_server.start(command_argv("tune", assets, uninterrupted, *dropout), log)
    assert fork_server.wait(run) == [0], output(run)
    for ranks, step in ((2, 4), (1, 8), (4, STEPS)):
        run = fork_server.start(command_argv("tune", assets, moved, *dropout), log, ranks=ranks)
        if step < STEPS:
            stop_when(run, lambda step=step: (moved / f"checkpoints/step-{step:06d}").exists(), signal.SIGUSR1)
        assert fork_server.wait(run) == [75 if step < STEPS else 0] * ranks, output(run)
    starts = [event["step"] for event in read_events(moved / "metrics.jsonl", "resume")]
    assert starts[0] == 0 and 4 <= starts[1] < 8 <= starts[2] < STEPS, starts
    for expected_row, resumed_row in zip(curve(uninterrupted), curve(moved), strict=True):
        assert expected_row.keys() == resumed_row.keys()
        for key, value in expected_row.items():
            assert resumed_row[key] == pytest.approx(value, rel=1e-4), (expected_row["step"], key)


def stop_when(
    run: list[ForkedProcess], condition: Callable[[], bool], number: int, send: Callable[[int, int], None] = os.kill
) -> None:
    """Sends a signal to the last rank, alone or with its whole group, as soon as a condition holds."""
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline and not run[-1].gone, output(run)
        time.sleep(0.002)
    send(run[-1].pid, number)


def test_loader_workers_survive_a_signal_to_the_process_group(
    assets: Assets, tmp_path: Path, fork_server: ForkServer
) -> None:
    """Ctrl-C, scancel and a time limit signal the loader workers too; the step still completes."""
    uninterrupted, stopped, log = tmp_path / "uninterrupted", tmp_path / "stopped", tmp_path / "log"
    run = fork_server.start(command_argv("distill", assets, uninterrupted), log)
    assert fork_server.wait(run) == [0], output(run)
    run = fork_server.start(command_argv("distill", assets, stopped), log)
    stop_when(run, (stopped / "checkpoints/step-000002").exists, signal.SIGTERM, os.killpg)
    signalled = time.monotonic()
    assert fork_server.wait(run) == [75], output(run)
    assert time.monotonic() - signalled < 60, "within SLURM's grace period"
    run = fork_server.start(command_argv("distill", assets, stopped), log)
    assert fork_server.wait(run) == [0], output(run)
    assert curve(stopped) == curve(uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_request_during_startup_exits_with_75(
    number: int, assets: Assets, tmp_path: Path, fork_server: ForkServer
) -> None:
    """One of two ranks is signalled while models are loaded: no step runs."""
    out, log = tmp_path / "run", tmp_path / "log"
    run = fork_server.start(command_argv("distill", assets, out), log, ranks=2)
    stop_when(run[:1], (out / ".lock").exists, number)  # rank 0 creates it after installing its signal handler
    assert fork_server.wait(run) == [75, 75], output(run)
    assert "lavic distill: stopped on request" in run[0].log.read_text()
    assert output(run).count("stopped on request") == 1
    assert "Traceback" not in output(run)
    assert not read_journal(out / "metrics.jsonl")
    assert [event["status"] for event in read_events(out / "metrics.jsonl", "end")] in ([], ["KILLED"])


def test_the_teachers_score_is_reused_after_a_restart(assets: Assets, tmp_path: Path, fork_server: ForkServer) -> None:
    """Stopped between the teacher's score and the first step; another --max-length scores it again."""
    out, log = tmp_path / "run", tmp_path / "log"
    run = fork_server.start(command_argv("distill", assets, out, "--loop.steps", "1"), log)
    stop_when(run, (out / "captions.json").exists, signal.SIGTERM)
    code = fork_server.wait(run)
    assert code in ([75], [0]), output(run)  # one step may be done before the signal is seen
    full = json.loads((out / "captions.json").read_text())["full"]
    (out / "captions.json").write_text(json.dumps({"full": {**full, "perplexity": 4.5}}))
    for folder in ("checkpoints", "bundle"):
        for file in (out / folder).rglob("*"):
            if file.is_file():
                file.unlink()
    (out / "result.json").unlink(missing_ok=True)
    run = fork_server.start(command_argv("distill", assets, out, "--loop.steps", "1"), log)
    assert fork_server.wait(run) == [0], output(run)
    assert json.loads((out / "captions.json").read_text())["full"]["perplexity"] == 4.5
    scored = [event for event in read_events(out / "metrics.jsonl", "captions") if event["arm"] == "full"]
    assert len(scored) == 1

    other = tmp_path / "other"
    other.mkdir()
    for name in ("config.yaml", "captions.json"):
        (other / name).write_bytes((out / name).read_bytes())
    run = fork_server.start(command_argv("distill", assets, other, "--loop.steps", "1", "--max-length", "300"), log)
    assert fork_server.wait(run) == [0], output(run)
    assert json.loads((other / "captions.json").read_text())["full"]["perplexity"] != 4.5


def test_a_signal_during_validation_saves_a_checkpoint(assets: Assets, tmp_path: Path, fork_server: ForkServer) -> None:
    """Validation on 60 times the rows, so that the signal arrives during it; the resumed run validates again."""
    rows = tmp_path / "valid.jsonl"
    rows.write_text(assets.rows.read_text() * 60)
    out, log = tmp_path / "run", tmp_path / "log"
    options = ("--valid", str(rows), "--loop.steps", "3", "--loop.save-every", "100", "--loop.eval-every", "2")
    run = fork_server.start(command_argv("tune", assets, out, *options), log, ranks=2)

    def validating() -> bool:
        return any(row["step"] == 2 for row in curve(out)) if (out / "metrics.jsonl").exists() else False

    stop_when(run, validating, signal.SIGUSR1)
    assert fork_server.wait(run) == [75, 75], output(run)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000002"]
    assert not any("valid_loss" in row for row in curve(out) if row["step"] == 2)
    run = fork_server.start(command_argv("tune", assets, out, *options), log)
    assert fork_server.wait(run) == [0], output(run)
    assert [row["step"] for row in curve(out) if "valid_loss" in row] == [0, 2, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("rows", "belongs to another training set"),
        ("torn", "step-000002 is damaged (state.safetensors changed): ignored"),
    ],
)
def test_another_training_set_and_a_damaged_checkpoint_are_reported(
    change: str, message: str, assets: Assets, tmp_path: Path, fork_server: ForkServer
) -> None:
    out, log, rows = tmp_path / "run", tmp_path / "log", tmp_path / "train.jsonl"
    rows.write_text(assets.rows.read_text())
    argv = command_argv("tune", assets, out, "--train", str(rows), "--loop.save-every", "1", "--loop.steps", "40")
    run = fork_server.start(argv, log)
    stop_when(run, (out / "checkpoints/step-000002").exists, signal.SIGTERM)
    assert fork_server.wait(run) == [75], output(run)
    newest, older = sorted((out / "checkpoints").iterdir(), reverse=True)
    message = message.replace("step-000002", newest.name)
    if change == "rows":
        rows.write_text(rows.read_text() + rows.read_text().splitlines()[0] + "\n")
    else:
        with (newest / "state.safetensors").open("r+b") as file:
            file.truncate(100)
    run[0].log.unlink()
    run = fork_server.start(argv, log)
    if change == "rows":
        assert fork_server.wait(run) == [2]
        (line,) = output(run).strip().splitlines()
        assert line.startswith("lavic tune: error: ") and message in line
    else:
        stop_when(run, lambda: len(read_events(out / "metrics.jsonl", "resume")) == 2, signal.SIGTERM)
        assert fork_server.wait(run) == [75], output(run)
        assert message in output(run)
        assert read_events(out / "metrics.jsonl", "resume")[-1]["step"] == int(older.name.removeprefix("step-"))


@pytest.mark.parametrize("command", ["distill", "tune"])
def test_a_full_disk_is_one_line_and_the_run_resumes(
    command: str, assets: Assets, tmp_path: Path, fork_server: ForkServer
) -> None:
    """On a small file system: whichever write fails, the run resumes from its last checkpoint."""
    disk, log = tmp_path / "disk", tmp_path / "log"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        go_without("no permission to mount a file system")
    try:
        out = disk / "run"
        argv = command_argv(
            command, assets, out, "--loop.save-every", "1", "--loop.save-total-limit", "100", "--loop.steps", "40"
        )
        run = fork_server.start(argv, log, ranks=2)
        codes = fork_server.wait(run, until_one=True)
        assert 1 in codes, output(run)
        (line,) = [line for line in output(run).splitlines() if "error: " in line and "[rank" not in line]
        assert "make room" in line, line
        assert "Traceback" not in output(run)
        complete = sorted(folder.name for folder in (out / "checkpoints").glob("step-*"))
        assert not list((out / "checkpoints").glob(".step*")), "a partial checkpoint is left"
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        run = fork_server.start(argv, log, ranks=2)
        assert fork_server.wait(run) == [0, 0], output(run)
        starts = [event["step"] for event in read_events(out / "metrics.jsonl", "resume")]
        assert starts == [0, int(complete[-1].removeprefix("step-"))]
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_dead_tracking_server_does_not_change_the_run(
    assets: Assets, tmp_path: Path, fork_server: ForkServer
) -> None:
    """Two ranks, one MLflow run; the adapters are equal without MLflow, with it, and with a dead server."""
    plain, tracked, dead, log = (tmp_path / name for name in ("plain", "runs/tracked", "dead", "log"))
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
        options_by_run = {plain: [], tracked: ["--tracking.mlflow", "--tracking.uri", uri]}
        options_by_run[dead] = ["--tracking.mlflow", "--tracking.uri", address]
        for out, options in options_by_run.items():
            run = fork_server.start(command_argv("tune", assets, out, *options), log, ranks=2)
            assert fork_server.wait(run) == [0, 0], output(run)
    assert output(run).count("MLflow does not have all of this run (") == 1
    assert adapter_digests(plain) == adapter_digests(tracked) == adapter_digests(dead)
    assert curve(plain) == curve(tracked) == curve(dead)

    for out in (tracked, dead):
        sync(out, uri)
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    runs = client.search_runs([client.get_experiment_by_name("lavic").experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED"] * 2
    losses = [(row["step"], row["loss"]) for row in curve(plain) if "loss" in row]
    for run in runs:
        points = client.get_metric_history(run.info.run_id, "loss")
        assert sorted((point.step, point.value) for point in points) == losses
        assert len(run.data.tags["adapter.language"]) == 16
        names = {dataset_input.dataset.name for dataset_input in run.inputs.dataset_inputs}
        assert names == {"item store", "training set", "validation set"}


def test_a_finished_run_continues_with_more_steps_and_another_learning_rate(
    assets: Assets, tmp_path: Path, fork_server: ForkServer
) -> None:
    """The change of settings is recorded, and earlier steps are kept."""
    out, log = tmp_path / "run", tmp_path / "log"
    argv = command_argv("tune", assets, out, "--loop.steps", "3", "--loop.schedule", "constant", "--loop.warmup", "0")
    run = fork_server.start(argv, log, ranks=2)
    assert fork_server.wait(run) == [0, 0], output(run)
    before = curve(out)

    argv += ["--loop.steps", "5", "--loop.lr", "0.02", "--loop.max-grad-norm", "0.5"]
    run = fork_server.start(argv, log, ranks=2)
    assert fork_server.wait(run) == [0, 0], output(run)
    assert (
        "from step 4 on: loop.lr was 0.01, is 0.02; loop.max_grad_norm was 1.0, is 0.5; loop.steps was 3, is 5"
        in output(run)
    )
    assert curve(out)[: len(before)] == before
    assert [row["lr"] for row in curve(out) if "lr" in row] == [0.01, 0.01, 0.01, 0.02, 0.02]
    (event,) = read_events(out / "metrics.jsonl", "settings")
    assert event["step"] == 3
    assert event["changed"] == {"loop.max_grad_norm": [1.0, 0.5], "loop.lr": [0.01, 0.02], "loop.steps": [3, 5]}
    assert json.loads((out / "result.json").read_text())["steps"] == 5

    run = fork_server.start([*argv, "--loop.steps", "4"], log)
    assert fork_server.wait(run) == [2], output(run)
    assert "5 steps are done, more than the 4 of --loop.steps or --loop.epochs" in output(run)
    assert json.loads((out / "result.json").read_text())["steps"] == 5, "the run stays complete"

    shutil.rmtree(out / "checkpoints")
    run = fork_server.start([*argv, "--loop.steps", "9"], log)
    assert fork_server.wait(run) == [2], output(run)
    assert "its run is complete and has no checkpoint to continue from" in output(run)
    assert json.loads((out / "result.json").read_text())["steps"] == 5, "the run stays complete"
