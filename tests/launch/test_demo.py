"""`lavic demo --small`: every stage through its command, then a second call that serves."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.fork_server import ForkServer

FORKING = """
import subprocess, sys
from tests.forked_program import ForkingPopen
subprocess.Popen = ForkingPopen
sys.argv[0] = "lavic"
from lavic.cli import entry
entry()
"""
"""`lavic` whose stages, and their ranks, are forked processes."""


def demo(out: Path, *options: str) -> list[str]:
    """The arguments of the command."""
    return ["demo", "--small", "--out", str(out), *options]


def check_server(out: Path) -> None:
    """The same demo with --serve repeats nothing and serves a page, products and photos."""
    command = [sys.executable, "-m", "lavic", *demo(out, "--serve", "--port", "0")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    lines: list[str] = []
    try:
        for line in process.stdout:
            lines.append(line)
            if match := re.search(r"serving on (http://127\.0\.0\.1:\d+)$", line):
                break
        assert match, "".join(lines)[-3000:]
        commands = [line.split()[2] for line in lines if line.startswith("$ lavic")]
        complete = [line.split()[2] for line in lines if line.endswith("# already complete\n")]
        assert [command for command in commands if command not in complete] == ["recommend", "sync", "serve"]
        assert len(complete) == 14
        with httpx.Client(base_url=match[1], timeout=120, trust_env=False) as client:
            assert "What are you looking for?" in client.get("/").text
            answer = client.post("/v1/recommend", json={"conversation": "a red striped mug"})
            items = answer.json()["items"]
            assert len(items) == 10 and {item["title"].split()[-1] for item in items} == {"Mug"}
            for item in items:
                photo = client.get(item["photo"])
                assert photo.headers["Content-Type"] == "image/jpeg" and photo.content[:3] == b"\xff\xd8\xff"
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
    finally:
        process.kill()
        process.communicate()


@pytest.mark.dist
@pytest.mark.ray
def test_the_demo_completes_once_and_serves(tmp_path: Path, fork_server: ForkServer) -> None:
    first = fork_server.run(["-c", FORKING, *demo(tmp_path / "demo")], timeout=900)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert set(summary["captions"]) == {"full", "cls_before", "cls_after"}
    arms = {"lavic", "text_only", "shuffled", "before_tuning", "random", "undistilled"}
    assert arms <= set(summary["hit_rate"]) and arms <= set(summary["hit_rate_held_out_combinations"])
    for hit in summary["hit_rate"].values():
        assert hit["low"] <= hit["value"] <= hit["high"] and hit["n"] == 8
    for test_set in ("held_out_items", "held_out_combinations"):
        rows = summary["full_catalogue"][test_set]
        assert set(rows) == {"chance", "bm25", "tokens", "fused"} and "recall_at_100" in rows["tokens"]
        assert all(0 <= value <= 1 for row in rows.values() for value in row.values())
    assert "random item of the kind" in first.stdout
    assert {"crawl", "describe", "distill", "embed", "tune", "evaluate", "total"} <= set(summary["seconds"])
    # captions: the packaged base model reads photos; six steps are too few to learn five tokens
    full, before = summary["captions"]["full"], summary["captions"]["cls_before"]
    assert full["perplexity"] < 1.2 < before["perplexity"]

    # a separate client: mlflow.set_tracking_uri would affect later tests
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'demo' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("demo")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert {"runs/distill", "runs/retriever", "runs/tune", "evaluation", "retrieval"} <= {
        run.info.run_name for run in runs
    }
    assert {run.info.status for run in runs} == {"FINISHED"}
    (parent,) = (run.info.run_id for run in runs if run.data.tags["lavic.command"] == "demo")
    assert {run.data.tags.get("mlflow.parentRunId") for run in runs if run.info.run_id != parent} == {parent}
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "<svg" in page and "http://" not in page.replace("http://www.w3.org", "")

    bundle = tmp_path / "demo" / "runs" / "tune" / "bundle" / "bundle.json"
    modified = bundle.stat().st_mtime_ns
    check_server(tmp_path / "demo")
    assert bundle.stat().st_mtime_ns == modified
    seconds = json.loads((tmp_path / "demo" / "summary.json").read_text())["seconds"]
    rerun = {"recommend", "mlflow", "total"}
    assert {name for name, value in seconds.items() if value != summary["seconds"][name]} <= rerun
    other = fork_server.lavic(*demo(tmp_path / "demo", "--seed", "1"))
    assert other.returncode == 2 and "a demo that was started with --seed 0 --small" in other.stderr
