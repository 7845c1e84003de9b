"""`lavic serve` as a separate process on loopback."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.fork_server import DEFAULTS, ForkedProcess, ForkServer

from ..conftest import Assets

TOKEN = "0123456789abcdef-of-a-test"


@dataclass
class Server:
    """A running `lavic serve`."""

    process: subprocess.Popen[bytes] | ForkedProcess
    log: Path
    url: str = ""

    @property
    def lines(self) -> list[str]:
        """Complete lines that it has printed and logged."""
        text = self.log.read_text("utf-8")
        return text[: text.rfind("\n") + 1].splitlines()

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def client(self, **options) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=600, trust_env=False, **options)

    def wait_for(self, text: str, count: int = 1) -> str:
        """Waits until a text has been logged `count` times; returns that line."""
        until = time.monotonic() + 600
        while True:
            ended = self.process.poll() is not None
            matching = [line for line in self.lines if text in line]
            if len(matching) >= count:
                return matching[count - 1]
            assert not ended and time.monotonic() < until, self.lines
            time.sleep(0.02)

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(300)


@contextlib.contextmanager
def serve(
    *args: object, env: Mapping[str, str] | None = None, fork_server: ForkServer | None = None
) -> Iterator[Server]:
    """Starts `lavic serve` on a free port, by a fork or else in a new interpreter, and waits until it serves."""
    argv = ["-m", "lavic", "serve", "--port", "0", *map(str, args)]
    env = {**os.environ, **DEFAULTS, "PYTHONUNBUFFERED": "1", **(env or {})}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        process: subprocess.Popen[bytes] | ForkedProcess
        if fork_server:
            process = fork_server.popen(argv, env=env, log=log)
        else:
            with log.open("wb") as output:
                process = subprocess.Popen([sys.executable, *argv], stdout=output, stderr=output, env=env)
        server = Server(process, log)
        try:
            match = re.search(r"http://\S+", server.wait_for("serving on"))
            assert match
            server.url = match[0]
            yield server
        finally:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def server(assets: Assets, index: Path, fork_server: ForkServer) -> Iterator[Server]:
    """One server for all tests that do not change it."""
    args = ("--bundle", assets.bundle, "--store", assets.store, "--index", index, "--retrieved", 20)
    with serve(*args, fork_server=fork_server) as running:
        yield running


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as connected:
        yield connected
