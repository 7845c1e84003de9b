"""The faulty photo server, catalogues that link to it, drawn sets, and SIGUSR1 at a chosen moment."""

from __future__ import annotations

import json
import os
import pkgutil
import signal
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trustme

from lavic.shards.http import connections
from tests.crawled_sets import write_set
from tests.shards.drawn_sets import photo
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
    for server in running:
        server.close()
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


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Thirty items in four shards; every fifth has a second photo."""
    samples = [photo(item, number) for item in range(30) for number in range(2 if item % 5 == 0 else 1)]
    write_set(tmp_path / "shards", samples, photos_per_shard=10)
    return tmp_path / "shards"


@pytest.fixture
def small_set(tmp_path: Path) -> Path:
    """Four items in one shard; the first photo is narrow, the third item has only its second photo."""
    samples = [photo(0, size=(40, 120)), photo(1), photo(2, number=1), photo(3)]
    write_set(tmp_path / "small", samples)
    return tmp_path / "small"


@pytest.fixture
def sigusr1_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sends SIGUSR1, SLURM's warning, to this process when the named function returns for the first time."""

    def patch(name: str) -> None:
        owner, _, function = name.rpartition(".")
        real, calls = getattr(pkgutil.resolve_name(owner), function), []

        def call(*args: object) -> object:
            result = real(*args)
            if not calls:
                os.kill(os.getpid(), signal.SIGUSR1)
            calls.append(args)
            return result

        monkeypatch.setattr(name, call)

    return patch
