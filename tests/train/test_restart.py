"""Both stages, as commands, killed and stopped at any moment: the same command goes on to the same end."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lavic.tracking.journal import read_events, read_journal
from lavic.tracking.mlflow_sync import sync
from tests.train.assets import Assets
from tests.train.conftest import curve
from tests.train.fork_server import ForkServer, Rank

pytestmark = pytest.mark.dist

STEPS, KILLS = 12, 11
"""Steps of a run; kills of each stage."""


def words(command: str, assets: Assets, out: Path, *more: str) -> list[str]:
    inputs = {
        "distill": ["--shards", assets.photos, "--valid", assets.valid, "--loop.num-workers", "1"],
        "tune": ["--store", assets.store, "--train", assets.rows, "--valid", assets.rows, "--max-length", "400"],
    }[command]
    loop = {"steps": STEPS, "global-batch-size": 8, "lr": 0.01, "save-every": 2, "eval-every": 3}
    flags = [word for key, value in loop.items() for word in (f"--loop.{key}", str(value))]
    lora = ("--lora.r", "2", "--lora.dropout", "0.2")
    return [command, *map(str, inputs), "--out", str(out), "--model.name", str(assets.base), *flags, *lora, *more]


def adapters(run: Path) -> dict[str, str]:
    """The bundle's weights, as digests."""
    files = sorted((run / "bundle").rglob("*.safetensors"))
    return {str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def output(ranks: list[Rank]) -> str:
    return "".join(rank.log.read_text() for rank in ranks)[-4000:]


@pytest.mark.parametrize(("command", "ranks", "every", "seed"), [("distill", 1, 2, 11), ("tune", 2, 1, 12)])
def test_sigkill_at_any_moment(
    command: str, ranks: int, every: int, seed: int, assets: Assets, tmp_path: Path, fork_server: ForkServer
) -> None:
    """Dropout, a loader worker, often a checkpoint; each time one rank is killed, and the others soon after."""
    often = ("--loop.save-every", str(every))
    moments = random.Random(seed)
    whole, log = tmp_path / "whole", tmp_path / "log"
    began = time.monotonic()
    first = fork_server.start(words(command, assets, whole, *often), log, ranks=ranks)
    assert fork_server.wait(first) == [0] * ranks, output(first)
    length = time.monotonic() - began

    def resumes(cut: Path) -> int:
        """Compares a finished run with the undisturbed one; how often it resumed from a checkpoint."""
        assert curve(cut) == curve(whole)
        assert adapters(cut) == adapters(whole)
        return sum(event["step"] > 0 for event in read_events(cut / "metrics.jsonl", "resume"))

    kills = resumed = 0
    cut = tmp_path / "cut-0"
    while kills < KILLS or not (cut / "result.json").exists():
        if (cut / "result.json").exists():  # a kill may come after the last file and before the process has left
            resumed += resumes(cut)
            cut = tmp_path / f"cut-{kills}"
        run = fork_server.start(words(command, assets, cut, *often), log, ranks=ranks)
        if kills < KILLS:
            moment = moments.uniform(0.0, 0.9) * length
            if kills % 3 == 0:  # some must come after a checkpoint, however slow the machine is just now
                while not list(cut.glob("checkpoints/step-*/COMPLETE")) and not any(rank.gone for rank in run):
                    time.sleep(0.002)
                moment /= 4
            until = time.monotonic() + moment
            while time.monotonic() < until and not any(rank.gone for rank in run):
                time.sleep(0.002)
            if not any(rank.gone for rank in run):
                victim = moments.choice(run)
                os.kill(victim.pid, signal.SIGKILL)
                kills += 1
                print(f"{command}: seed {seed}, kill {kills} after {moment:.2f} of {length:.2f} s")
                if ranks > 1 and moments.random() < 0.5:
                    time.sleep(0.05)
                fork_server.kill(run)  # as a launcher ends those that are left
                fork_server.wait(run)
                continue
        assert fork_server.wait(run) == [0] * ranks, output(run)
    resumed += resumes(cut)
    assert resumed, "no kill came after a checkpoint: the test saw fresh starts only"
    assert [row["step"] for row in curve(whole) if "loss" in row] == list(range(1, STEPS + 1))


def test_other_numbers_of_ranks(assets: Assets, tmp_path: Path, fork_server: ForkServer) -> None:
    """2 -> 1 -> 4 ranks, at the same global batch: the samples of a step are the same, so are the losses."""
    dropout = ("--lora.dropout", "0.0")
    whole, moved, log = tmp_path / "whole", tmp_path / "moved", tmp_path / "log"
    run = fork_server.start(words("tune", assets, whole, *dropout), log)
    assert fork_server.wait(run) == [0], output(run)
    for ranks, step in ((2, 4), (1, 8), (4, STEPS)):
        run = fork_server.start(words("tune", assets, moved, *dropout), log, ranks=ranks)
        if step < STEPS:
            stop_when(run, lambda step=step: (moved / f"checkpoints/step-{step:06d}").exists(), signal.SIGUSR1)
        assert fork_server.wait(run) == [75 if step < STEPS else 0] * ranks, output(run)
    starts = [event["step"] for event in read_events(moved / "metrics.jsonl", "resume")]
    assert starts[0] == 0 and 4 <= starts[1] < 8 <= starts[2] < STEPS, starts
    for there, here in zip(curve(whole), curve(moved), strict=True):
        assert there.keys() == here.keys()
        for key, value in there.items():
            assert here[key] == pytest.approx(value, rel=1e-4), (there["step"], key)


def stop_when(
    run: list[Rank], condition: Callable[[], bool], number: int, send: Callable[[int, int], None] = os.kill
) -> None:
    """Sends a signal to the last rank, alone or with its whole group, as soon as a condition holds."""
    until = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < until and not run[-1].gone, output(run)
        time.sleep(0.002)
    send(run[-1].pid, number)


def test_loader_workers_outlive_a_signal_to_the_whole_group(
    assets: Assets, tmp_path: Path, fork_server: ForkServer
) -> None:
    """As Ctrl-C, scancel and a time limit reach a rank: its workers get the signal too, and the step still ends."""
    whole, cut, log = tmp_path / "whole", tmp_path / "cut", tmp_path / "log"
    run = fork_server.start(words("distill", assets, whole), log)
    assert fork_server.wait(run) == [0], output(run)
    run = fork_server.start(words("distill", assets, cut), log)
    stop_when(run, (cut / "checkpoints/step-000002").exists, signal.SIGTERM, os.killpg)
    asked = time.monotonic()
    assert fork_server.wait(run) == [75], output(run)
    assert time.monotonic() - asked < 60, "a grace period of SLURM's"
    run = fork_server.start(words("distill", assets, cut), log)
    assert fork_server.wait(run) == [0], output(run)
    assert curve(cut) == curve(whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_request_at_the_start_is_75_too(
    number: int, assets: Assets, tmp_path: Path, fork_server: ForkServer
) -> None:
    """One of two ranks is asked while models are loaded: no step is taken, and the same command begins again."""
    out, log = tmp_path / "run", tmp_path / "log"
    run = fork_server.start(words("distill", assets, out), log, ranks=2)
    stop_when(run[:1], (out / ".lock").exists, number)  # rank 0 makes it: it can be asked from then on
    assert fork_server.wait(run) == [75, 75], output(run)
    assert "lavic distill: stopped on request" in run[0].log.read_text()
    assert output(run).count("stopped on request") == 1
    assert "Traceback" not in output(run)
    assert not read_journal(out / "metrics.jsonl")
    assert [event["status"] for event in read_events(out / "metrics.jsonl", "end")] in ([], ["KILLED"])


def test_what_the_teacher_said_is_not_asked_again(assets: Assets, tmp_path: Path, fork_server: ForkServer) -> None:
    """Stopped between the teacher's score and the first step; at another length it is scored anew."""
    out, log = tmp_path / "run", tmp_path / "log"
    run = fork_server.start(words("distill", assets, out, "--loop.steps", "1"), log)
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
    run = fork_server.start(words("distill", assets, out, "--loop.steps", "1"), log)
    assert fork_server.wait(run) == [0], output(run)
    assert json.loads((out / "captions.json").read_text())["full"]["perplexity"] == 4.5
    scored = [event for event in read_events(out / "metrics.jsonl", "captions") if event["arm"] == "full"]
    assert len(scored) == 1

    other = tmp_path / "other"
    other.mkdir()
    for name in ("config.yaml", "captions.json"):
        (other / name).write_bytes((out / name).read_bytes())
    run = fork_server.start(words("distill", assets, other, "--loop.steps", "1", "--max-length", "300"), log)
    assert fork_server.wait(run) == [0], output(run)
    assert json.loads((other / "captions.json").read_text())["full"]["perplexity"] != 4.5


def test_a_signal_while_validating_saves_the_steps_before(
    assets: Assets, tmp_path: Path, fork_server: ForkServer
) -> None:
    """Ten times the rows to validate with: the signal falls into it, the run goes on with the validation."""
    rows = tmp_path / "valid.jsonl"
    rows.write_text(assets.rows.read_text() * 60)
    out, log = tmp_path / "run", tmp_path / "log"
    more = ("--valid", str(rows), "--loop.steps", "3", "--loop.save-every", "100", "--loop.eval-every", "2")
    run = fork_server.start(words("tune", assets, out, *more), log, ranks=2)

    def validating() -> bool:
        return any(row["step"] == 2 for row in curve(out)) if (out / "metrics.jsonl").exists() else False

    stop_when(run, validating, signal.SIGUSR1)
    assert fork_server.wait(run) == [75, 75], output(run)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000002"]
    assert not any("valid_loss" in row for row in curve(out) if row["step"] == 2)
    run = fork_server.start(words("tune", assets, out, *more), log)
    assert fork_server.wait(run) == [0], output(run)
    assert [row["step"] for row in curve(out) if "valid_loss" in row] == [0, 2, 3]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("rows", "belongs to another training set"),
        ("torn", "step-000002 is damaged (state.safetensors changed): ignored"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(
    change: str, complaint: str, assets: Assets, tmp_path: Path, fork_server: ForkServer
) -> None:
    out, log, rows = tmp_path / "run", tmp_path / "log", tmp_path / "train.jsonl"
    rows.write_text(assets.rows.read_text())
    argv = words("tune", assets, out, "--train", str(rows), "--loop.save-every", "1", "--loop.steps", "40")
    run = fork_server.start(argv, log)
    stop_when(run, (out / "checkpoints/step-000002").exists, signal.SIGTERM)
    assert fork_server.wait(run) == [75], output(run)
    newest, older = sorted((out / "checkpoints").iterdir(), reverse=True)
    complaint = complaint.replace("step-000002", newest.name)
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
        assert line.startswith("lavic tune: error: ") and complaint in line
    else:
        stop_when(run, lambda: len(read_events(out / "metrics.jsonl", "resume")) == 2, signal.SIGTERM)
        assert fork_server.wait(run) == [75], output(run)
        assert complaint in output(run)
        assert read_events(out / "metrics.jsonl", "resume")[-1]["step"] == int(older.name.removeprefix("step-"))


@pytest.mark.parametrize("command", ["distill", "tune"])
def test_a_disk_that_fills_up_is_said_in_one_line(
    command: str, assets: Assets, tmp_path: Path, fork_server: ForkServer
) -> None:
    """A small file system of its own; whichever file finds it full, what was saved is used once there is room."""
    disk, log = tmp_path / "disk", tmp_path / "log"
    disk.mkdir()
    small = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)]
    if subprocess.run(small, capture_output=True).returncode:
        pytest.skip("may not mount a file system here")
    try:
        out = disk / "run"
        argv = words(
            command, assets, out, "--loop.save-every", "1", "--loop.save-total-limit", "100", "--loop.steps", "40"
        )
        run = fork_server.start(argv, log, ranks=2)
        codes = fork_server.wait(run, until_one=True)
        assert 1 in codes, output(run)
        (line,) = [line for line in output(run).splitlines() if "error: " in line and "[rank" not in line]
        assert "make room" in line, line
        assert "Traceback" not in output(run)
        whole = sorted(folder.name for folder in (out / "checkpoints").glob("step-*"))
        assert not list((out / "checkpoints").glob(".step*")), "half a checkpoint takes up the room"
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        run = fork_server.start(argv, log, ranks=2)
        assert fork_server.wait(run) == [0, 0], output(run)
        starts = [event["step"] for event in read_events(out / "metrics.jsonl", "resume")]
        assert starts == [0, int(whole[-1].removeprefix("step-"))]
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_dead_tracking_server_changes_nothing(assets: Assets, tmp_path: Path, fork_server: ForkServer) -> None:
    """Two ranks, one MLflow run; the adapter is the same to the last byte with MLflow and with a dead one."""
    plain, kept, dead, log = (tmp_path / name for name in ("plain", "runs/kept", "dead", "log"))
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
        ways = {plain: [], kept: ["--tracking.mlflow", "--tracking.uri", uri]}
        ways[dead] = ["--tracking.mlflow", "--tracking.uri", address]
        for out, more in ways.items():
            run = fork_server.start(words("tune", assets, out, *more), log, ranks=2)
            assert fork_server.wait(run) == [0, 0], output(run)
    assert output(run).count("mlflow: ") == 1
    assert adapters(plain) == adapters(kept) == adapters(dead)
    assert curve(plain) == curve(kept) == curve(dead)

    for out in (kept, dead):
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
        names = {one.dataset.name for one in run.inputs.dataset_inputs}
        assert names == {"item store", "training set", "validation set"}


def test_a_finished_run_goes_on_with_another_rate_to_more_steps(
    assets: Assets, tmp_path: Path, fork_server: ForkServer
) -> None:
    """As a run whose loss has left the rails: the change is noted, what was learnt before it stays."""
    out, log = tmp_path / "run", tmp_path / "log"
    argv = words("tune", assets, out, "--loop.steps", "3", "--loop.schedule", "constant", "--loop.warmup", "0")
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
    assert json.loads((out / "result.json").read_text())["steps"] == 5, "it stays done"
