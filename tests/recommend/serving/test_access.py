"""Access to the server: addresses, tokens, host names, other origins."""

from __future__ import annotations

import http.client
import logging
from collections.abc import Iterator

import httpx
import pytest

from lavic.cli import main
from tests.fork_server import ForkServer

from ..conftest import Assets
from .conftest import Server, serve

pytestmark = pytest.mark.slow

TOKEN = "0123456789abcdef-of-a-test"
SHOP = "https://shop.example.org"


@pytest.fixture(scope="module")
def token_server(assets: Assets, fork_server: ForkServer) -> Iterator[Server]:
    """A server on all addresses with a token and one allowed origin."""
    args = ("--bundle", assets.bundle, "--store", assets.store, "--host", "0.0.0.0", "--cors", SHOP)
    args = (*args, "--token", "env:LAVIC_SERVE_TOKEN")
    with serve(*args, env={"LAVIC_SERVE_TOKEN": TOKEN}, fork_server=fork_server) as server:
        server.url = server.url.replace("0.0.0.0", "127.0.0.1")
        yield server


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--host", "0.0.0.0"), "give a token with --token env:NAME"),
        (("--host", "::"), "give a token with --token env:NAME"),
        (("--token", TOKEN), "write env:NAME or @FILE"),
        (("--token", "env:LAVIC_NO_TOKEN"), "LAVIC_NO_TOKEN is not set"),
        (("--token", "env:LAVIC_SHORT_TOKEN"), "shorter than 16 characters"),
        (("--host", "192.0.2.1", "--token", "env:LAVIC_SERVE_TOKEN"), "cannot listen there"),
    ],
)
def test_unsafe_access_settings_are_refused_at_start(assets: Assets, args, message: str, monkeypatch, capsys):
    monkeypatch.setenv("LAVIC_SHORT_TOKEN", "short")
    monkeypatch.setenv("LAVIC_SERVE_TOKEN", TOKEN)
    monkeypatch.delenv("LAVIC_NO_TOKEN", raising=False)
    assert main(["serve", "--bundle", str(assets.bundle), "--store", str(assets.store), *args]) == 2
    error = capsys.readouterr().err
    assert message in error and TOKEN not in error
    logging.getLogger("lavic").handlers.clear()


def test_requests_without_the_token_are_refused(token_server: Server):
    wrong = ("", "Bearer", "Bearer x", f"Bearer {TOKEN}x", f"Token {TOKEN}", TOKEN, "Basic !!!", "Bearer \xff")
    with token_server.client() as client:
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
        assert named.status_code == 200  # with a token any host name is accepted
    assert not [line for line in token_server.lines if TOKEN in line]


def test_cors_allows_only_the_given_origin(token_server: Server, client: httpx.Client):
    preflight_headers = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    token = {"Authorization": f"Bearer {TOKEN}"}
    with token_server.client() as other:
        preflight = other.options("/v1/recommend", headers={**preflight_headers, "Origin": SHOP})
        assert preflight.status_code == 200 and preflight.headers["access-control-allow-origin"] == SHOP
        answer = other.get("/v1/models", headers={**token, "Origin": SHOP})
        assert answer.headers["access-control-allow-origin"] == SHOP
        other_origin = other.get("/v1/models", headers={**token, "Origin": "https://evil.example.org"})
        assert "access-control-allow-origin" not in other_origin.headers
    for origin in (SHOP, "null"):
        refused = client.options("/v1/recommend", headers={**preflight_headers, "Origin": origin})
        assert refused.status_code >= 400
        assert not [name for name in refused.headers if name.startswith("access-control")]


def test_a_server_is_asked_under_the_address_that_it_listens_on(assets: Assets, fork_server: ForkServer):
    args = ("--bundle", assets.bundle, "--store", assets.store, "--host", "127.0.0.2")
    with serve(*args, fork_server=fork_server) as local, local.client() as client:
        assert local.url.startswith("http://127.0.0.2:") and client.get("/readyz").status_code == 200
        assert client.get("/readyz", headers={"Host": "evil.org"}).status_code == 403


def test_a_local_server_accepts_only_local_host_names(server: Server, client: httpx.Client):
    for host, status in (("localhost", 200), (f"127.0.0.1:{server.port}", 200), ("[::1]:80", 200), ("evil.org", 403)):
        assert client.get("/healthz", headers={"Host": host}).status_code == status
    for hosts in (("evil.org", "localhost"), ("localhost", "evil.org")):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
        connection.putrequest("GET", "/healthz", skip_host=True)
        for host in hosts:
            connection.putheader("Host", host)
        connection.endheaders()
        assert connection.getresponse().status in (400, 403)
        connection.close()
