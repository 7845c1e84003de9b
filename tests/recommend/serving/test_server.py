"""Signals and connections of the server, with a minimal app."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from lavic.recommend.serve_settings import ServeSettings
from lavic.recommend.serving.guard import Guard
from lavic.recommend.serving.metrics import Metrics

ROOT = Path(__file__).parents[3]
PROGRAM = """
import resource, sys
from lavic.recommend.serving.server import hangups_kept, listen, run

async def app(scope, receive, send):
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

async def reload():
    print("reloaded", flush=True)

resource.setrlimit(resource.RLIMIT_NOFILE, (100, 200))
with hangups_kept() as hangup, listen("127.0.0.1", 0) as server:
    print("loading", server.getsockname()[1], flush=True)
    sys.stdin.readline()
    run(app, server, grace=1, reload=reload, ready=lambda: print("ready", flush=True), hangup=hangup)
"""


def start() -> subprocess.Popen[str]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM], text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, **pipes
    )


def test_sighup_during_loading_reloads_afterwards():
    with start() as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline().startswith("loading")
        process.send_signal(signal.SIGHUP)
        process.stdin.write("\n")
        process.stdin.flush()
        assert [process.stdout.readline() for _ in range(2)] == ["ready\n", "reloaded\n"]
        process.send_signal(signal.SIGHUP)
        assert process.stdout.readline() == "reloaded\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0


def test_connections_beyond_the_file_limit_are_closed():
    """Excess connections are closed; an open one is still served."""
    with start() as process:
        assert process.stdin is not None and process.stdout is not None
        port = int(process.stdout.readline().split()[1])
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "ready\n"
        first = socket.create_connection(("127.0.0.1", port), timeout=120)
        idle = [socket.create_connection(("127.0.0.1", port), timeout=120) for _ in range(180)]
        with contextlib.suppress(ConnectionResetError):
            assert idle[-1].recv(1) == b""
        first.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert first.recv(12) == b"HTTP/1.1 200"
        for connection in (first, *idle):
            connection.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0


def test_too_many_concurrent_requests_are_refused_but_not_probes():
    async def test() -> None:
        proceed = asyncio.Event()

        async def app(scope, receive, send) -> None:
            if scope["path"] == "/":
                await proceed.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})

        settings = ServeSettings(bundle=Path("bundle"), store=Path("store"))
        guard = Guard(app, settings, None, Metrics(), max_requests=2)

        async def ask(path: str) -> int:
            statuses: list[int] = []

            async def receive() -> dict:
                return {"type": "http.request", "body": b"", "more_body": False}

            async def send(message: dict) -> None:
                if message["type"] == "http.response.start":
                    statuses.append(message["status"])

            await guard(
                {"type": "http", "method": "GET", "path": path, "headers": [(b"host", b"localhost")]}, receive, send
            )
            return statuses[0]

        running = [asyncio.ensure_future(ask("/")) for _ in range(2)]
        await asyncio.sleep(0)
        assert await ask("/") == 503 and await ask("/healthz") == 200
        proceed.set()
        assert await asyncio.gather(*running) == [200] * 2 and await ask("/") == 200

    asyncio.run(test())
