"""The server that does things wrong, and catalogues that link to it."""

from __future__ import annotations

import json
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trustme

from lavic.shards.http import connections
from tests.shards.fault_server import PHOTOS, FaultServer


@pytest.fixture
def server() -> Iterator[FaultServer]:
    running = FaultServer()
    yield running
    running.close()


@pytest.fixture
def second_server() -> Iterator[FaultServer]:
    running = FaultServer()
    yield running
    running.close()


@pytest.fixture
def tls_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[FaultServer, FaultServer]]:
    """Two that speak https: one whose certificate this process and its children trust, one whose they do not."""
    authority, stranger = trustme.CA(), trustme.CA()
    running = []
    for issuer in (authority, stranger):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        issuer.issue_cert("127.0.0.1").configure_cert(context)
        running.append(FaultServer(context))
    authority.cert_pem.write_to_path(str(tmp_path / "authority.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
    connections.ssl_context.cache_clear()
    yield running[0], running[1]
    for one in running:
        one.close()
    connections.ssl_context.cache_clear()


@pytest.fixture
def photos() -> dict[str, bytes]:
    return PHOTOS


@pytest.fixture
def catalogue(tmp_path: Path, server: FaultServer) -> Callable[..., Path]:
    """Writes an Amazon-like catalogue of one photo per path of the server, or per whole address."""

    def write(*paths: str, name: str = "meta.jsonl") -> Path:
        rows = [
            {
                "parent_asin": f"B{n:05d}",
                "title": f"Item {n}",
                "images": [{"large": path if "://" in path else f"{server.url}/{path}"}],
            }
            for n, path in enumerate(paths)
        ]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / name

    return write
