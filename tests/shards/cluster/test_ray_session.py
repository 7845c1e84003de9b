"""A Ray cluster that is already there, with a token: joined by its address, and given jobs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lavic.data.manifest import Manifest
from lavic.distributed.launcher_env import free_port

pytestmark = pytest.mark.ray
QUICK = ["--fetch.allow-private", "--fetch.retries", "1", "--photos-per-shard", "5"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """One node, started as an administrator would, by a token file; yields the environment of its users."""
    token = tmp_path_factory.mktemp("token") / "auth_token"
    token.write_text("a-token-that-only-this-test-knows")
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # sockets stand in it
    port, dashboard = free_port(), free_port()
    env = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    start = ["start", "--head", "--block", "--num-cpus", "2", "--temp-dir", str(folder), "--port", str(port)]
    start += ["--node-ip-address", "127.0.0.1", "--dashboard-port", str(dashboard)]
    # The agent that takes jobs has a fixed port, which another Ray may hold, and half a minute to start.
    start += ["--dashboard-agent-listen-port", str(free_port())]
    env["RAY_agent_register_timeout_ms"] = "240000"
    log = folder / "head.log"
    with log.open("w") as out:
        words = [sys.executable, "-m", "ray.scripts.scripts", *start]
        head = subprocess.Popen(words, env=env, stdout=out, stderr=subprocess.STDOUT)
    try:
        until = time.monotonic() + 120
        while "Ray runtime started" not in log.read_text():
            assert head.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.2)
        yield {**env, "HEAD": f"127.0.0.1:{port}", "DASHBOARD": f"http://127.0.0.1:{dashboard}"}
    finally:
        head.terminate()
        try:
            head.wait(20)
        except subprocess.TimeoutExpired:
            head.kill()
        shutil.rmtree(folder, ignore_errors=True)


def lavic(*words: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lavic", *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)


def test_a_cluster_is_joined_by_its_address(
    cluster: dict[str, str], tmp_path: Path, catalogue: Callable[..., Path]
) -> None:
    items = catalogue(*(f"n/{n}.jpg" for n in range(12)))
    command = ["crawl", "--items", str(items), "--out", str(tmp_path / "out"), *QUICK]
    done = lavic(*command, "--ray.address", cluster["HEAD"], env=cluster)
    assert done.returncode == 0, done.stderr
    assert Manifest.load(tmp_path / "out").samples == 12

    stranger = {**cluster, "RAY_AUTH_TOKEN": "another"}
    refused = lavic(*command, "--out", str(tmp_path / "no"), "--ray.address", cluster["HEAD"], env=stranger)
    assert refused.returncode != 0 and "Traceback" not in refused.stderr
    assert "token" in refused.stderr.strip().splitlines()[-1]


def test_a_job_that_is_submitted_runs_on_the_cluster_that_it_is_given_to(
    cluster: dict[str, str], tmp_path: Path, catalogue: Callable[..., Path], server: Any
) -> None:
    pytest.importorskip("aiohttp_cors", reason="jobs need ray[default]")
    items = catalogue(*(f"n/{n}.jpg" for n in range(12)))
    submit = ["-m", "ray.scripts.scripts", "job", "submit", "--address", cluster["DASHBOARD"], "--"]
    command = ["crawl", "--items", str(items), "--out", str(tmp_path / "out"), *QUICK]
    words = [sys.executable, *submit, sys.executable, "-m", "lavic", *command]
    until = time.monotonic() + 240
    while True:
        done = subprocess.run(words, env=cluster, capture_output=True, text=True, timeout=240)
        # The head says that it runs before its dashboard answers and before an agent takes jobs: how it refuses one
        # until then depends on which of them is missing.
        if "submitted successfully" in done.stdout + done.stderr or time.monotonic() > until:
            break
        time.sleep(1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert Manifest.load(tmp_path / "out").samples == 12
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["outcomes"] == {"ok": 12}
