"""Settings of an endpoint: its address, its key, and where the key must not appear."""

from __future__ import annotations

import logging

import pytest

from lavic.config import dump
from lavic.config.secrets import redact
from lavic.endpoint.client import Endpoint
from lavic.endpoint.settings import EndpointSettings, base_url
from lavic.errors import ConfigError
from tests.endpoint.conftest import prompt


def test_the_key_is_sent_but_never_logged_or_stored(connect, server, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("MY_SERVERS_KEY", "sk-very-secret-9")
    client = connect(api_key="env:MY_SERVERS_KEY", cache=tmp_path / "answers", concurrency=1)
    (answer,) = client.chat([prompt("x")])
    assert server.headers[0]["authorization"] == "Bearer sk-very-secret-9"
    server.faults.append((401, {}, b'{"error": {"message": "wrong key sk-very-secret-9"}}'))
    with pytest.raises(ConfigError) as caught:
        list(client.chat([prompt("y")]))
    cached = "".join(file.read_text() for file in (tmp_path / "answers").rglob("*.json"))
    texts = [str(caught.value), cached, caplog.text, repr(answer), dump(client.settings), repr(client.settings)]
    assert not [text for text in texts if "very-secret" in text]
    assert "env:MY_SERVERS_KEY" in dump(client.settings) and redact("sk-very-secret-9") == "***"


def test_a_key_on_the_command_line_is_refused(server, tmp_path):
    with pytest.raises(ValueError, match="not the key itself"):
        EndpointSettings(url=(server.url,), model="m", api_key="sk-1234567890")
    with pytest.raises(ConfigError, match="NO_SUCH_VARIABLE is not set"):
        Endpoint(EndpointSettings(url=(server.url,), model="m", api_key="env:NO_SUCH_VARIABLE"))
    file = tmp_path / "key"
    file.write_text("sk-from-a-file\n")
    file.chmod(0o600)
    with Endpoint(EndpointSettings(url=(server.url,), model="m", api_key=f"@{file}")) as client:
        list(client.chat([prompt("x")]))
    assert server.headers[-1]["authorization"] == "Bearer sk-from-a-file"


def test_missing_settings_are_named():
    with pytest.raises(ConfigError, match=r"missing --chat\.url and --chat\.model"):
        Endpoint(EndpointSettings(), "--chat")


@pytest.mark.parametrize(
    ("address", "base"),
    [
        ("http://n1:8000", "http://n1:8000/v1"),
        ("http://n1:8000/", "http://n1:8000/v1"),
        ("https://api.example.org/v1/", "https://api.example.org/v1"),
        ("https://h/openai/v1/chat/completions", "https://h/openai/v1"),
        ("https://h/v1/embeddings?api-version=3", "https://h/v1?api-version=3"),
    ],
)
def test_base_url_of_each_form_of_address(address, base):
    assert base_url(address) == base


@pytest.mark.parametrize("address", ["n1:8000", "ftp://n1/v1", "", "http://", "/v1", "http://n1:80800", "http://n1:a"])
def test_invalid_addresses_are_refused(address):
    with pytest.raises(ValueError, match="address of a server"):
        base_url(address)


def test_environment_proxies_are_used_only_on_request(connect, server, monkeypatch):
    monkeypatch.setenv("http_proxy", server.url.removesuffix("/v1"))
    monkeypatch.delenv("no_proxy", raising=False)
    unresolvable = "http://models.invalid/v1"
    (answer,) = connect(url=(unresolvable,), proxy="env").chat([prompt("x")])
    assert answer.text == "you said: x" and server.paths == {f"{unresolvable}/chat/completions": 1}
    (answer,) = connect(url=(unresolvable,), retries=0).chat([prompt("x")])
    assert answer.fault.kind == "connect" and server.requests == 1
