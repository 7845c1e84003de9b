"""Crawls by local processes: no Ray, the same bytes, and workers that die, are stopped or lose their driver."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lavic.config import parse
from lavic.errors import ConfigError
from lavic.shards.cluster.executor import uses_ray
from lavic.shards.crawl_settings import CrawlSettings
from tests.shards.cluster.test_kills import below, kill
from tests.shards.test_crawl import QUICK, leftovers, tar_bytes

pytestmark = pytest.mark.slow

SHARDS, PER_SHARD = 6, 20


def settings(*words: str) -> CrawlSettings:
    return parse(CrawlSettings, ["--items", "x.jsonl", "--out", "out", *words], command="crawl")


def on_ray(*words: str, large: bool = False) -> bool:
    chosen = settings(*words)
    return uses_ray(chosen.executor, chosen.ray, large=large)


def test_small_crawls_run_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert not on_ray() and on_ray(large=True)
    assert on_ray("--executor", "ray") and not on_ray("--executor", "local", large=True)
    assert on_ray("--ray.address", "auto") and on_ray("--ray.nodes", "2")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert on_ray() and not on_ray("--executor", "local")
    with pytest.raises(ConfigError, match=r"--ray\.address"):
        settings("--executor", "local", "--ray.address", "auto")


class Crawl:
    """A crawl in a process of its own, of a server that takes its time."""

    def __init__(self, items: Path, out: Path, log: Path, *more: str) -> None:
        words = ["crawl", "--items", str(items), "--out", str(out), "--photos-per-shard", str(PER_SHARD), *QUICK]
        program = "import sys; from lavic.cli import main; code = main(sys.argv[1:]); "
        program += "print('modules:', *sorted({name.partition('.')[0] for name in sys.modules})); sys.exit(code)"
        command = [sys.executable, "-c", program, *words, "--fetch.concurrency", "4", "--ray.workers", "2", *more]
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        self.log = log
        self.process = subprocess.Popen(
            command, stdout=log.open("a"), stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )

    def workers(self) -> list[int]:
        """Forked by the fork server, which has the same command line and is nearer to the driver."""
        return [pid for pid, words in below(self.process.pid) if "forkserver" in words][1:]

    def await_requests(self, server: Any, more: int) -> None:
        enough, until = server.requests.total() + more, time.monotonic() + 120
        while server.requests.total() < enough and time.monotonic() < until:
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.01)

    def end(self) -> int:
        return self.process.wait(120)


@pytest.fixture
def items(catalogue: Callable[..., Path]) -> Path:
    return catalogue(*(f"n/{n}.jpg" for n in range(SHARDS * PER_SHARD)))


def test_the_same_bytes_whatever_dies(tmp_path: Path, items: Path, server: Any) -> None:
    log, out = tmp_path / "log", tmp_path / "out"
    undisturbed = Crawl(items, tmp_path / "undisturbed", log)
    assert undisturbed.end() == 0, log.read_text()
    assert " ray " not in log.read_text() and "modules:" in log.read_text()

    # The driver is killed: its workers notice, and leave nothing that counts.
    server.delay = 0.05
    first = Crawl(items, out, log)
    first.await_requests(server, 30)
    orphans = first.workers()
    assert len(orphans) == 2
    kill(first.process.pid)
    first.end()
    until = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in orphans):
        assert time.monotonic() < until, "workers outlive their driver"
        time.sleep(0.02)

    # A scheduler's signal, to the whole group of processes.
    second = Crawl(items, out, log)
    second.await_requests(server, 10)
    os.killpg(second.process.pid, signal.SIGUSR1)
    assert second.end() == 75, log.read_text()
    assert "run the same command again" in log.read_text() and not (out / "manifest.json").exists()

    # Workers are killed one after the other while the crawl goes on.
    third = Crawl(items, out, log)
    for _ in range(3):
        third.await_requests(server, 10)
        kill(third.workers()[0])
    server.delay = 0.0
    assert third.end() == 0, log.read_text()
    assert "its worker died (SIGKILL); another one rebuilds it" in log.read_text()
    assert tar_bytes(out) == tar_bytes(tmp_path / "undisturbed") and not leftovers(out)


def test_a_shard_that_kills_every_worker_ends_the_crawl_with_one_line(tmp_path: Path, items: Path, server: Any) -> None:
    server.delay = 0.2
    crawl = Crawl(items, tmp_path / "out", tmp_path / "log", "--ray.workers", "1")
    until = time.monotonic() + 120
    while crawl.process.poll() is None and time.monotonic() < until:
        for pid in crawl.workers():
            kill(pid)
        time.sleep(0.01)
    lines = (tmp_path / "log").read_text().splitlines()
    assert crawl.end() == 1
    assert any("3 workers died while they made it, the last with SIGKILL" in line for line in lines), lines
    assert not any("Traceback" in line for line in lines)


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, items: Path, server: Any) -> None:
    out = tmp_path / "out"
    server.delay = 0.1
    crawl = Crawl(items, out, tmp_path / "log")
    crawl.await_requests(server, 5)
    # A folder in a tar's place: it cannot be put there, whoever asks.
    (out / "photos-train-000004.tar").mkdir()
    server.delay = 0.0
    assert crawl.end() == 1
    text = (tmp_path / "log").read_text()
    assert "cannot be written to" in text and "Traceback" not in text


def test_a_ctrl_c_while_workers_load_is_the_driver_s_alone() -> None:
    """The process that workers are forked from ignores it from its start: no traceback of its imports."""
    code = (
        "import re, pathlib\n"
        "from multiprocessing import forkserver\n"
        "from lavic.shards.cluster.worker_process import prepare\n"
        "prepare('lavic.shards.cluster.local_processes')\n"
        "status = pathlib.Path(f'/proc/{forkserver._forkserver._forkserver_pid}/status').read_text()\n"
        "print(int(re.search(r'SigIgn:\\s*(\\w+)', status)[1], 16) >> 1 & 1)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "1\n"
