"""An S3 server on loopback, behind a proxy that counts what is read of it and breaks answers on demand."""

from __future__ import annotations

import http.client
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import unquote

import pytest

BUCKET = "photos"
Fault = Literal["cut", "busy", "stall"]
"""Half of the body and then nothing; 503; half of the body and then silence until the store closes."""


class ObjectStore:
    """A bucket that this process, and the processes that it starts, find by their environment.

    Attributes:
        served: Bytes of the bodies that GET requests got, by key.
    """

    def __init__(self, host: str, port: int) -> None:
        self.upstream = (host, port)
        self.served: Counter[str] = Counter()
        self.faults: dict[str, list[Fault]] = {}
        self.stalled, self.closed = threading.Event(), threading.Event()
        self.lock = threading.Lock()
        store = self

        class Handler(_Handler):
            owner = store

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.server.server_address[1]}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def put(self, key: str, data: bytes) -> str:
        """Stores an object; returns its address."""
        connection = http.client.HTTPConnection(*self.upstream)
        connection.request("PUT", f"/{BUCKET}/{key}", data, {"Host": "127.0.0.1", "Authorization": _AUTHORIZATION})
        answer = connection.getresponse()
        answer.read()
        assert answer.status == 200, answer.status
        connection.close()
        return f"s3://{BUCKET}/{key}"

    def fail(self, key: str, *faults: Fault) -> None:
        """Breaks the next answers to GET requests of an object, one fault each."""
        with self.lock:
            self.faults[key] = list(faults)

    def close(self) -> None:
        self.closed.set()
        self.server.shutdown()
        self.server.server_close()


_AUTHORIZATION = "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"


class _Handler(BaseHTTPRequestHandler):
    owner: ObjectStore
    protocol_version = "HTTP/1.1"

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        connection = http.client.HTTPConnection(*self.owner.upstream)
        connection.request(self.command, self.path, body or None, dict(self.headers.items()))
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        key = unquote(self.path.partition("?")[0]).removeprefix(f"/{BUCKET}/")
        fault: Fault | None = None
        if self.command == "GET" and answer.status in (200, 206):
            with self.owner.lock:
                waiting = self.owner.faults.get(key)
                fault = waiting.pop(0) if waiting else None
                if fault is None:
                    self.owner.served[key] += len(data)
        if fault == "busy":
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "content-length", "date", "server"):
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        if fault:
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            if fault == "stall":
                self.owner.stalled.set()
                self.owner.closed.wait(120)
            self.close_connection = True
            return
        self.wfile.write(data)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    """A store with an empty bucket; skips where the S3 server is not installed."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    forget_clients()
    server.start()
    store = ObjectStore(*server.get_host_and_port())
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in store.environment.items():
                patch.setenv(name, value)
            connection = http.client.HTTPConnection(*store.upstream)
            connection.request("PUT", f"/{BUCKET}", None, {"Authorization": _AUTHORIZATION})
            assert connection.getresponse().status == 200
            yield store
    finally:
        store.close()
        server.stop()
        forget_clients()


def forget_clients() -> None:
    """Has the next reader ask the server that the environment names now: fsspec keeps its clients."""
    pytest.importorskip("s3fs").S3FileSystem.clear_instance_cache()
