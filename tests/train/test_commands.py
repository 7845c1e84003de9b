"""`lavic distill` and `lavic tune` as a user types them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lavic.cli import main
from lavic.data.conversations import read_conversations
from lavic.distributed.context import DistributedContext
from lavic.model.bundle import Bundle, BundleInfo
from lavic.model.item_store import ItemStore
from lavic.tracking.journal import read_events, read_journal
from lavic.train.recommendation.dataset import TuneDataset
from lavic.train.recommendation.task import TuneTask
from tests.fork_server import ForkServer
from tests.train.assets import KEY, Assets

pytestmark = pytest.mark.slow


def command_argv(command: str, assets: Assets, out: Path, *options: str) -> list[str]:
    inputs = {
        "distill": ["--shards", assets.photos, "--valid", assets.valid],
        "tune": [
            "--store",
            assets.store,
            "--train",
            assets.rows,
            "--valid",
            assets.rows,
            "--max-length",
            "400",
        ],
    }[command]
    loop = [
        "--loop.steps",
        "4",
        "--loop.global-batch-size",
        "8",
        "--loop.lr",
        "0.01",
        "--loop.save-every",
        "2",
        "--lora.r",
        "4",
    ]
    return [command, *map(str, inputs), "--out", str(out), "--model.name", str(assets.base), *loop, *options]


@pytest.mark.dist
def test_distill_with_two_ranks_completes_once(assets: Assets, tmp_path: Path, fork_server: ForkServer) -> None:
    out = tmp_path / "run"
    argv = command_argv("distill", assets, out)
    run = fork_server.lavic(*argv, ranks=2)
    assert run.returncode == 0, run.stderr
    captions = json.loads((out / "captions.json").read_text())
    assert captions.keys() == {"full", "cls_before", "cls_after"}
    assert captions["cls_after"]["loss"] < captions["cls_before"]["loss"]
    assert len({arm["tokens"] for arm in captions.values()}) == 1
    rows = read_journal(out / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert [event["status"] for event in read_events(out / "metrics.jsonl", "end")] == ["FINISHED"]
    info = BundleInfo.read(out / "bundle")
    assert info.vision_adapter and not info.language_adapter

    repeated = fork_server.lavic(*argv, ranks=2)
    assert repeated.returncode == 0
    assert "already complete" in repeated.stdout
    assert read_journal(out / "metrics.jsonl") == rows

    changed = fork_server.lavic(*command_argv("distill", assets, out, "--loop.seed", "5"))
    assert changed.returncode == 2
    assert "loop.seed was 0, is 5" in changed.stderr
    assert "Traceback" not in changed.stderr


@pytest.mark.dist
def test_tune_resumes_after_sigterm_with_the_same_result(
    assets: Assets, tmp_path: Path, fork_server: ForkServer
) -> None:
    """The launcher gets SIGTERM, as from `timeout` or a scheduler; its two ranks save and exit with 75."""
    interrupted, uninterrupted = tmp_path / "interrupted", tmp_path / "uninterrupted"
    options = ("--loop.steps", "40", "--loop.eval-every", "5", "--shuffle")
    command = [sys.executable, "-m", "lavic", *command_argv("tune", assets, interrupted, *options, "--nproc", "2")]
    env = {**os.environ, "LAVIC_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    checkpoint = interrupted / "checkpoints/step-000002"
    while not checkpoint.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    message = process.communicate(timeout=60)[1]
    assert process.returncode == 75, message
    assert "run the same command again" in message
    assert not (interrupted / "result.json").exists()
    for out in (interrupted, uninterrupted):
        run = fork_server.lavic(*command_argv("tune", assets, out, *options), ranks=2)
        assert run.returncode == 0, run.stderr

    def curve(folder: Path) -> list[tuple]:
        rows = read_journal(folder / "metrics.jsonl")
        return [(row["step"], row.get("loss"), row.get("grad_norm"), row.get("valid_loss")) for row in rows]

    assert curve(interrupted) == curve(uninterrupted)
    assert [event["status"] for event in read_events(interrupted / "metrics.jsonl", "end")] == ["KILLED", "FINISHED"]
    check_bundle(assets, uninterrupted)


def check_bundle(assets: Assets, run: Path) -> None:
    """The loaded bundle gives the validation loss of the training run."""
    bundle = Bundle.load(run / "bundle")
    assert bundle.info.vision_adapter and bundle.info.language_adapter
    data = TuneDataset(
        read_conversations(assets.rows),
        ItemStore.open(assets.store),
        bundle.backbone.encoder,
        candidates=KEY,
        max_length=400,
    )
    with torch.no_grad():
        losses = TuneTask(bundle.backbone.model)(data.collate([data[p] for p in range(len(data))]))
    best = json.loads((run / "result.json").read_text())["best_loss"]
    assert losses.mean().item() == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--loop.lrr", "1"], "loop.lr"),
        (["--train", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--store", "nowhere"], "nowhere: no such item store"),
        (["--candidates", "candidates_gpt"], "candidates_gpt"),
        (["--deepspeed", "nowhere.json"], "nowhere.json"),
        (["--model.name", "nowhere/at/all"], "nowhere/at/all"),
    ],
)
def test_invalid_input_is_one_line_and_exit_code_2(
    assets: Assets,
    tmp_path: Path,
    change: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    world: DistributedContext,
) -> None:
    assert main(command_argv("tune", assets, tmp_path / "run", *change)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("lavic tune: error: ")
    assert message in error


def test_a_store_of_another_base_is_refused_before_loading_the_model(
    assets: Assets, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "other"
    shutil.copytree(assets.base, base)
    weights = bytearray((base / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (base / "model.safetensors").write_bytes(weights)
    assert main(command_argv("tune", assets, tmp_path / "run", "--model.name", str(base))) == 2
    assert "an item store of another base model" in capsys.readouterr().err


def test_items_missing_from_the_store_are_refused_or_dropped(
    assets: Assets, tmp_path: Path, fork_server: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:pw-1234@127.0.0.1:9")
    rows = [json.loads(line) for line in assets.rows.read_text().splitlines()]
    rows[0][KEY][-1] = "GONE000001"
    rows[1]["gt_items"] = ["GONE000002"]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = command_argv("tune", assets, tmp_path / "run", "--loop.steps", "1", "--train", str(tmp_path / "train.jsonl"))
    refused = fork_server.lavic(*argv)
    assert refused.returncode == 2
    assert "GONE000001" in refused.stderr
    dropped = fork_server.lavic(*argv, "--missing", "drop")
    assert dropped.returncode == 0, dropped.stderr
    assert f"1 of {len(rows)} rows and 1 candidates left out: not in the store" in dropped.stdout
    assert "pw-1234" not in dropped.stdout + dropped.stderr
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not [path for path in files if b"pw-1234" in path.read_bytes()]
    assert "env:MLFLOW_TRACKING_URI" in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_rows_with_an_empty_list_are_dropped(assets: Assets, tmp_path: Path, fork_server: ForkServer) -> None:
    rows = [json.loads(line) for line in assets.rows.read_text().splitlines()]
    rows[0][KEY] = []
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = command_argv(
        "tune", assets, tmp_path / "run", "--loop.steps", "1", "--train", str(file), "--valid", str(file)
    )
    run = fork_server.lavic(*argv)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count(f"{file}: 1 of {len(rows)} rows left out: their list `{KEY}` is empty") == 2
    file.write_text("".join(json.dumps({**row, KEY: []}) + "\n" for row in rows))
    refused = fork_server.lavic(*argv)
    assert refused.returncode == 2
    assert f"{file}: every list `{KEY}` is empty" in refused.stderr


DAMAGING = """
import sys
from safetensors.torch import load_file, save_file
from lavic.cli import main
from lavic.model import bundle

save_bundle = bundle.save_bundle

def save_damaged(folder, *parts, **options):
    info = save_bundle(folder, *parts, **options)
    (file,) = (folder / "language_adapter").glob("*.safetensors")
    weights = load_file(file)
    name = next(name for name in weights if "lora_B" in name)
    save_file({**weights, name: weights[name] + 1}, file, {"format": "pt"})
    return info

bundle.save_bundle = save_damaged
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.dist
def test_a_damaged_bundle_ends_the_run(assets: Assets, tmp_path: Path, fork_server: ForkServer) -> None:
    """The command runs the bundle check; test_bundle_check.py tests what it finds."""
    run = fork_server.run(["-c", DAMAGING, *command_argv("tune", assets, tmp_path / "run")])
    assert run.returncode == 1
    assert "bundle" in run.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "run" / "result.json").exists()
