"""`lavic serve` as a separate process on loopback."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from ..conftest import Assets

TOKEN = "0123456789abcdef-of-a-test"


@dataclass
class Server:
    """A running `lavic serve`."""

    process: subprocess.Popen[str]
    url: str
    lines: list[str] = field(default_factory=list)
    """Lines that it has printed and logged."""
    changed: threading.Condition = field(default_factory=threading.Condition)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def client(self, **options) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=600, trust_env=False, **options)

    def wait_for(self, text: str, count: int = 1) -> str:
        """Waits until a text has been logged `count` times; returns that line."""

        def line() -> str | None:
            matching = [line for line in self.lines if text in line]
            return matching[count - 1] if len(matching) >= count else None

        with self.changed:
            assert self.changed.wait_for(lambda: line() or self.process.poll() is not None, 600), self.lines
            shown = line()
        assert shown, self.lines
        return shown

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(300)


@contextlib.contextmanager
def serve(*args: object, env: dict[str, str] | None = None) -> Iterator[Server]:
    """Starts `lavic serve` on a free port and waits until it serves."""
    command = [sys.executable, "-m", "lavic", "serve", "--port", "0", *map(str, args)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **(env or {})},
    )
    server = Server(process, "")

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            with server.changed:
                server.lines.append(line.rstrip("\n"))
                server.changed.notify_all()
        with server.changed:
            server.changed.notify_all()

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        match = re.search(r"http://\S+", server.wait_for("serving on"))
        assert match
        server.url = match[0]
        yield server
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        thread.join(10)


@pytest.fixture(scope="session")
def server(assets: Assets, index: Path) -> Iterator[Server]:
    """One server for all tests that do not change it."""
    with serve("--bundle", assets.bundle, "--store", assets.store, "--index", index, "--retrieved", "20") as running:
        yield running


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as connected:
        yield connected
