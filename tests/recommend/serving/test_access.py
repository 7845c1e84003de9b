"""Who may ask: addresses, tokens, names of the server, pages of other sites."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import httpx
import pytest

from lavic.cli import main

from ..conftest import Ground
from .conftest import Server, serve

TOKEN = "0123456789abcdef-of-a-test"
SHOP = "https://shop.example.org"


@pytest.fixture(scope="module")
def guarded(ground: Ground) -> Iterator[Server]:
    """A server on every address, which needs a token, and answers the pages of one other site."""
    words = ("--bundle", ground.bundle, "--store", ground.store, "--host", "0.0.0.0", "--cors", SHOP)
    with serve(*words, "--token", "env:LAVIC_SERVE_TOKEN", env={"LAVIC_SERVE_TOKEN": TOKEN}) as server:
        server.url = server.url.replace("0.0.0.0", "127.0.0.1")
        yield server


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--host", "0.0.0.0"), "give a token with --token env:NAME"),
        (("--host", "::"), "give a token with --token env:NAME"),
        (("--token", TOKEN), "write env:NAME or @FILE"),
        (("--token", "env:LAVIC_NO_TOKEN"), "LAVIC_NO_TOKEN is not set"),
        (("--token", "env:LAVIC_SHORT_TOKEN"), "shorter than 16 characters"),
        (("--host", "192.0.2.1", "--token", "env:LAVIC_SERVE_TOKEN"), "cannot listen there"),
    ],
)
def test_a_server_that_does_not_start(ground: Ground, words, message: str, monkeypatch, capsys):
    monkeypatch.setenv("LAVIC_SHORT_TOKEN", "short")
    monkeypatch.setenv("LAVIC_SERVE_TOKEN", TOKEN)
    monkeypatch.delenv("LAVIC_NO_TOKEN", raising=False)
    assert main(["serve", "--bundle", str(ground.bundle), "--store", str(ground.store), *words]) == 2
    error = capsys.readouterr().err
    assert message in error and TOKEN not in error
    logging.getLogger("lavic").handlers.clear()


def test_a_token_is_asked_for(guarded: Server):
    wrong = ("", "Bearer", "Bearer x", f"Bearer {TOKEN}x", f"Token {TOKEN}", TOKEN, "Basic !!!", "Bearer \xff")
    with guarded.client() as client:
        for header in wrong:
            for path in ("/v1/items/x", "/photos/x", "/metrics", "/docs", "/openapi.json", "/nowhere"):
                answer = client.get(path, headers={"Authorization": header.encode("latin-1")} if header else {})
                assert answer.status_code == 401 and answer.json()["error"]["code"] == "unauthorized"
                assert "Basic" in answer.headers["WWW-Authenticate"]
        assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200
        assert client.get("/v1/models", headers={"Authorization": f"bearer {TOKEN}"}).status_code == 200
        assert client.get("/v1/models", auth=("anyone", TOKEN)).status_code == 200
        assert client.get("/v1/models", auth=(TOKEN, "")).status_code == 401
        named = client.get("/v1/models", headers={"Authorization": f"Bearer {TOKEN}", "Host": "shop.example.org"})
        assert named.status_code == 200  # with a token any name will do
    assert not [line for line in guarded.lines if TOKEN in line]


def test_pages_of_other_sites(guarded: Server, client: httpx.Client):
    ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    token = {"Authorization": f"Bearer {TOKEN}"}
    with guarded.client() as other:
        preflight = other.options("/v1/recommend", headers={**ask, "Origin": SHOP})
        assert preflight.status_code == 200 and preflight.headers["access-control-allow-origin"] == SHOP
        answer = other.get("/v1/models", headers={**token, "Origin": SHOP})
        assert answer.headers["access-control-allow-origin"] == SHOP
        strange = other.get("/v1/models", headers={**token, "Origin": "https://evil.example.org"})
        assert "access-control-allow-origin" not in strange.headers
    for origin in (SHOP, "null"):
        refused = client.options("/v1/recommend", headers={**ask, "Origin": origin})
        assert refused.status_code >= 400
        assert not [name for name in refused.headers if name.startswith("access-control")]


def test_a_local_server_answers_to_local_names_alone(server: Server, client: httpx.Client):
    for host, status in (("localhost", 200), (f"127.0.0.1:{server.port}", 200), ("[::1]:80", 200), ("evil.org", 403)):
        assert client.get("/healthz", headers={"Host": host}).status_code == status
