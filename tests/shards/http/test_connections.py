"""Proxies from the environment and headers from a file: who receives them, and that no credential is recorded."""

from __future__ import annotations

import asyncio
import ipaddress
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from yarl import URL

from lavic.cli import main
from lavic.errors import ConfigError
from lavic.shards.http import ssrf_guard
from lavic.shards.http.custom_headers import CustomHeaders
from lavic.shards.http.fetch_settings import FetchSettings
from lavic.shards.http.fetcher import Fetcher
from lavic.shards.http.proxy import Proxies
from lavic.shards.http.request import Response
from tests.shards.fault_server import PHOTOS
from tests.shards.http.proxy_server import ProxyServer
from tests.shards.http.raw_server import answer, raw_server

PHOTO = PHOTOS["plain.jpg"]
PROXIED = FetchSettings(allow_private=True, retries=0, host_rate=0, robots=False, proxy="env")


def fetch(*links: str, settings: FetchSettings = PROXIED) -> list[Response]:
    async def run() -> list[Response]:
        async with Fetcher(settings) as fetcher:
            return [await fetcher.fetch(link) for link in links]

    return asyncio.run(run())


@pytest.fixture(autouse=True)
def no_proxy_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[ProxyServer]:
    running = ProxyServer("user:p@ss")
    address = f"user:p%40ss@127.0.0.1:{running.port}"
    monkeypatch.setenv("HTTP_PROXY", f"http://{address}")
    monkeypatch.setenv("HTTPS_PROXY", address)
    yield running
    running.close()


class TestProxy:
    def test_http_and_https_use_the_proxy_with_escapes_unchanged(
        self, proxy: ProxyServer, server: Any, tls_servers: tuple[Any, Any]
    ) -> None:
        trusted, foreign = tls_servers
        links = [f"{server.url}/n/1.jpg?a=%2F&b=?", f"{trusted.url}/n/2.jpg", f"{trusted.url}/n/2.jpg"]
        kinds = [response.kind for response in fetch(*links, f"{foreign.url}/n/3.jpg")]
        assert kinds == ["ok", "ok", "ok", "tls"] and not foreign.requests
        tunnels = [f"CONNECT {tls_server.url.removeprefix('https://')}" for tls_server in (trusted, foreign)]
        assert proxy.requests == [links[0], *tunnels], "the tunnel is reused for the second photo"
        assert "Proxy-Authorization" in proxy.heads[0] and "Proxy-Authorization" in proxy.heads[1]
        assert "/n/2.jpg" not in "".join(proxy.heads), "the request is inside the tunnel"

    def test_the_proxy_is_unused_by_default(self, proxy: ProxyServer, server: Any) -> None:
        (response,) = fetch(f"{server.url}/n/1.jpg", settings=FetchSettings(allow_private=True, host_rate=0))
        assert response.kind == "ok" and not proxy.requests

    def test_private_targets_are_blocked_before_the_proxy(self, proxy: ProxyServer, server: Any) -> None:
        """The proxy itself is on loopback, but targets on loopback are blocked."""
        port = server.url.rpartition(":")[2]
        hosts = [f"localhost:{port}", f"127.0.0.1:{port}", f"2130706433:{port}", "169.254.169.254", "[fe80::1]"]
        strict = FetchSettings(retries=0, host_rate=0, robots=False, proxy="env")
        responses = fetch(*(f"http://{host}/1.jpg" for host in hosts), settings=strict)
        assert {response.kind for response in responses} == {"blocked_address"}
        assert fetch("https://localhost/1.jpg", settings=strict)[0].kind == "blocked_address"
        (secret,) = fetch("http://169.254.169.254/latest")
        assert secret.kind == "blocked_address" and not proxy.requests

    def test_redirects_to_private_targets_are_blocked(
        self, proxy: ProxyServer, server: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        loopback = ipaddress.ip_address("127.0.0.1")
        real = ssrf_guard.is_public
        monkeypatch.setattr(ssrf_guard, "is_public", lambda address: address == loopback or real(address))
        server.elsewhere = "http://127.0.0.2/1.jpg"
        strict = FetchSettings(retries=0, host_rate=0, robots=False, proxy="env")
        (response,) = fetch(f"{server.url}/away", settings=strict)
        assert response.kind == "blocked_address" and proxy.requests == [f"{server.url}/away"]

    def test_an_unknown_host_is_not_sent_to_the_proxy(self, proxy: ProxyServer) -> None:
        (response,) = fetch("http://no-such-host.invalid/1.jpg")
        assert response.kind == "dns" and "before a proxy is used" in response.reason and not proxy.requests

    def test_no_proxy_hosts_are_reached_directly(
        self, proxy: ProxyServer, server: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("NO_PROXY", "example.org, 127.0.0.0/8")
        assert fetch(f"{server.url}/n/1.jpg")[0].kind == "ok" and not proxy.requests
        strict = FetchSettings(retries=0, host_rate=0, robots=False, proxy="env")
        assert fetch(f"{server.url}/n/1.jpg", settings=strict)[0].kind == "blocked_address"

    def test_a_failing_proxy_is_a_connect_failure(
        self, proxy: ProxyServer, tls_servers: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        trusted, _ = tls_servers
        monkeypatch.setenv("HTTPS_PROXY", f"http://user:wrong@127.0.0.1:{proxy.port}")
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy.port}")
        refused, plain = fetch(f"{trusted.url}/n/1.jpg", f"{trusted.url.replace('https', 'http')}/n/1.jpg")
        for response in (refused, plain):
            assert response.kind == "connect" and "proxy" in response.reason and "407" in response.reason
        proxy.close()
        (down,) = fetch(f"{trusted.url}/n/1.jpg")
        assert down.kind == "connect" and "proxy" in down.reason
        monkeypatch.setenv("HTTPS_PROXY", "http://no-such-proxy.invalid:3128")
        (unknown,) = fetch(f"{trusted.url}/n/1.jpg")
        assert unknown.kind == "connect" and "proxy" in unknown.reason
        assert not any("wrong" in response.reason for response in (refused, down, unknown))

    @pytest.mark.parametrize(
        ("entries", "covered"),
        [
            ("*", ["h.com", "sub.h.com", "nh.com", "10.0.0.1", "[fd00::1]"]),
            ("h.com", ["h.com", "sub.h.com"]),
            (".h.com", ["h.com", "sub.h.com"]),
            ("*.h.com", ["h.com", "sub.h.com"]),
            ("H.COM.", ["h.com", "sub.h.com"]),
            ("h.com:8080", ["h.com:8080"]),
            ("x, 10.0.0.0/8", ["10.0.0.1"]),
            ("10.0.0.1", ["10.0.0.1"]),
            ("[fd00::1] y", ["[fd00::1]"]),
            ("fd00::/16", ["[fd00::1]"]),
            ("", []),
            ("com.", ["h.com", "sub.h.com", "nh.com", "h.com:8080"]),
        ],
    )
    def test_no_proxy_entries_match_hosts(
        self, entries: str, covered: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HTTP_PROXY", "proxy.example:3128")
        monkeypatch.setenv("NO_PROXY", entries)
        proxies = Proxies.from_environment()
        hosts = ["h.com", "sub.h.com", "nh.com", "h.com:8080", "10.0.0.1", "[fd00::1]"]
        direct = [host for host in hosts if proxies.for_url(URL(f"http://{host}/")) is None]
        assert direct == [host for host in hosts if host in covered or (host == "h.com:8080" and "h.com" in covered)]

    def test_each_scheme_has_its_proxy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("http_proxy", "a.example:1")
        monkeypatch.setenv("HTTP_PROXY", "b.example:1")
        monkeypatch.setenv("ALL_PROXY", "https://c.example:1")
        proxies = Proxies.from_environment()
        assert [str(proxies.for_url(URL(f"{scheme}://h/")).url) for scheme in ("http", "https")] == [  # type: ignore[union-attr]
            "http://a.example:1",
            "https://c.example:1",
        ]

    @pytest.mark.parametrize("value", ["socks5://user:secret@h:1", "http://user:secret@h:port", "http://", "a b"])
    def test_a_wrong_proxy_is_refused_without_its_value(
        self, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        monkeypatch.setenv("HTTPS_PROXY", value)
        assert main(["crawl", "--items", "x.jsonl", "--out", str(tmp_path / "o"), "--fetch.proxy", "env"]) == 2
        error = capsys.readouterr().err
        assert "HTTPS_PROXY" in error and "secret" not in error

    def test_proxy_env_without_a_variable_is_refused(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        assert main(["crawl", "--items", "x.jsonl", "--out", str(tmp_path / "o"), "--fetch.proxy", "env"]) == 2
        assert "HTTPS_PROXY" in capsys.readouterr().err


class TestHeaders:
    def test_headers_are_sent_and_credentials_stay_with_their_host(self, tmp_path: Path) -> None:
        path = tmp_path / "headers.txt"
        redirect = b"HTTP/1.1 302 Found"
        with raw_server({"/1.jpg": answer(PHOTO)}) as other, raw_server({"/2.jpg": answer(PHOTO)}) as home:
            home.answers["/away"] = answer(b"", b"Location: " + other.url.encode() + b"/1.jpg", status=redirect)
            home.answers["/near"] = answer(b"", b"Location: /2.jpg", status=redirect)
            path.write_text(
                "# of the shop\nReferer: https://shop.example/\nAuthorization: Bearer t0ken\nX-Api-Key : k3y\n\n"
                f"[127.0.0.1:{other.port}]\nCookie: c00kie\n[elsewhere.example]\nX-Other: s3cret\n"
            )
            settings = FetchSettings(allow_private=True, retries=0, host_rate=0, headers=str(path))
            links = [
                f"{home.url}/away",
                f"{home.url}/near",
                f"{other.url}/1.jpg",
                f"http://u:p@127.0.0.1:{home.port}/2.jpg",
            ]
            assert [response.kind for response in fetch(*links, settings=settings)] == ["ok"] * 4
            assert home.targets == ["/away", "/near", "/2.jpg", "/2.jpg"]
            for sent in home.headers:
                assert sent["authorization"] == "Bearer t0ken" and sent["x-api-key"] == "k3y", (
                    "they win over the user in a link"
                )
                assert "cookie" not in sent and "x-other" not in sent
            followed, direct = other.headers
            assert followed["referer"] == direct["referer"] == "https://shop.example/"
            assert not {"authorization", "x-api-key", "cookie"} & followed.keys()
            assert direct["authorization"] == "Bearer t0ken" and direct["cookie"] == "c00kie"
            for sent in (*other.robots_headers, *home.robots_headers):
                assert not {"authorization", "x-api-key", "cookie"} & sent.keys() and "referer" in sent

    def test_headers_replace_the_defaults(self, tmp_path: Path) -> None:
        path = tmp_path / "headers.txt"
        path.write_bytes(b"\xef\xbb\xbfuser-agent: mine/1.0\r\nAccept: image/webp\r\n")
        with raw_server({"/1.jpg": answer(PHOTO)}) as server:
            settings = FetchSettings(allow_private=True, retries=0, robots=False, headers=str(path))
            assert fetch(f"{server.url}/1.jpg", settings=settings)[0].kind == "ok"
            assert server.headers[0]["user-agent"] == "mine/1.0" and server.headers[0]["accept"] == "image/webp"

    @pytest.mark.parametrize(
        "text",
        ["secret", "Na me: secret", "Host: secret", "Proxy-Authorization: secret", "A: secret\x07", "[a b]", "[h:x]"],
    )
    def test_an_invalid_headers_file_is_refused_with_its_line(
        self, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "headers.txt"
        path.write_text(f"Accept: image/*\n{text}\n")
        assert main(["crawl", "--items", "x", "--out", str(tmp_path / "o"), "--fetch.headers", str(path)]) == 2
        error = capsys.readouterr().err
        assert f"{path}:2" in error and "secret" not in error

    def test_a_missing_headers_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"none\.txt"):
            CustomHeaders.read(tmp_path / "none.txt")


@pytest.mark.slow
def test_no_output_of_a_crawl_holds_a_credential(
    tmp_path: Path,
    catalogue: Callable[..., Path],
    server: Any,
    tls_servers: tuple[Any, Any],
    proxy: ProxyServer,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("mlflow")
    trusted, _ = tls_servers
    secrets = ["t0ken", "p@ss", "p%40ss", "dXNlcjpwQHNz"]
    headers = tmp_path / "headers.txt"
    headers.write_text("Authorization: Bearer t0ken\n")
    items = catalogue(
        "n/1.jpg", "moved", "status/404", "hang-up", f"{trusted.url}/n/2.jpg", "https://127.0.0.1:9/1.jpg"
    )
    out, store = tmp_path / "out", tmp_path / "mlflow.db"
    argv = ["crawl", "--items", str(items), "--out", str(out), "--fetch.proxy", "env", "--fetch.headers", str(headers)]
    argv += ["--fetch.allow-private", "--fetch.retries", "0", "--fetch.patience", "0", "--min-success", "0"]
    argv += ["--tracking.mlflow", "--tracking.uri", f"sqlite:///{store}"]
    assert main(argv) == 0
    assert len(proxy.requests) > 5 and any("t0ken" in head for head in proxy.heads), "proxy and headers were used"
    assert not [head for head in proxy.heads if head.startswith("CONNECT") and "t0ken" in head], (
        "tunnelled headers are not sent to the proxy"
    )
    captured = capfd.readouterr()
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path != headers]
    assert any(path.name == "metrics.jsonl" for path in files) and store in files
    for secret in secrets:
        assert secret not in captured.out + captured.err
        assert not [path for path in files if secret.encode() in path.read_bytes()]
    with sqlite3.connect(store) as database:
        assert str(headers) in [value for (value,) in database.execute("select value from params")]


def test_a_headers_file_in_utf_16_is_read(tmp_path: Path) -> None:
    file = tmp_path / "headers.txt"
    file.write_bytes("Referer: https://shop.example/\r\n[A.example]\r\nX-Token: one two\r\n".encode("utf-16"))
    assert CustomHeaders.read(file).for_url(URL("https://a.example/1.jpg"), None) == {
        "Referer": "https://shop.example/"
    }
    assert CustomHeaders.read(file).by_host == {"a.example": {"X-Token": "one two"}}
