"""Faults of an endpoint: which are retried, which end the run, Retry-After and backoff."""

from __future__ import annotations

import time
from email.utils import formatdate

import pytest

from lavic.endpoint.client import Endpoint
from lavic.endpoint.faults import EndpointError, backoff_s, fault_of_status
from lavic.endpoint.settings import EndpointSettings
from lavic.errors import ConfigError
from tests.endpoint.conftest import prompt
from tests.endpoint.openai_server import openai_server

HTML = (200, {"Content-Type": "text/html"}, b"<!doctype html><title>Sign in</title>")
BUSY = (429, {"Retry-After": "0"}, b'{"error": {"message": "slow down", "code": "rate_limit_exceeded"}}')
BROKEN = (500, {}, b"<h1>Internal Server Error</h1>")
TRUNCATED = (200, {"Content-Type": "application/json"}, b'{"choices": [{"message": {"con')


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (BUSY, "throttled"),
        (BROKEN, "server"),
        ((503, {}, b""), "server"),
        ((529, {}, b"overloaded"), "server"),
        ("close", "cut"),
        ("cut", "cut"),
        (HTML, "html"),
        (TRUNCATED, "json"),
        ((200, {}, b""), "json"),
        ((200, {}, b"[" * 100_000), "json"),
        ((200, {}, b"[]"), "shape"),
        ((200, {}, b'{"choices": []}'), "shape"),
        ((200, {}, b'{"choices": [{"message": {"content": 7}}]}'), "shape"),
        ((200, {}, b'{"error": {"message": "out of memory", "code": 503}}'), "server"),
    ],
    ids=str,
)
def test_transient_faults_are_retried(connect, server, fault, kind):
    client = connect()
    server.faults.extend([fault, fault])
    (answer,) = client.chat([prompt("hello")])
    assert answer.text == "you said: hello" and answer.fault is None
    assert client.usage.faults == {kind: 2} and not client.usage.failed
    assert server.requests == 3


def test_retries_are_bounded_and_the_next_request_is_sent(connect, server):
    client = connect(concurrency=1)
    server.faults.extend([TRUNCATED] * 3)
    (bad,) = client.chat([prompt("first")])
    (good,) = client.chat([prompt("second")])
    assert bad.text == "" and bad.fault.kind == "json" and "not JSON" in bad.fault.message
    assert good.text == "you said: second"
    assert client.usage.failed == {"json": 1} and server.requests == 4


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_request_is_not_retried(connect, server, status):
    client = connect(concurrency=1)
    server.faults.append((status, {}, b'{"error": {"message": "the context\\nis too long"}}'))
    bad, good = client.chat([prompt("first"), prompt("second")])
    assert bad.fault.kind == "refused" and good.fault is None
    assert bad.fault.message == f"{server.url} answers {status} (the context is too long)"
    assert server.requests == 2


@pytest.mark.parametrize(
    ("fault", "advice"),
    [
        ((401, {}, b'{"error": {"message": "no such key"}}'), "check --endpoint.api-key"),
        ((403, {}, b""), "check --endpoint.api-key"),
        ((404, {}, b'{"detail": "Not Found"}'), "check --endpoint.url and --endpoint.model drawn"),
        ((429, {}, b'{"error": {"message": "pay", "code": "insufficient_quota"}}'), "top up"),
        ((307, {"Location": "http://192.0.2.1/"}, b""), "redirects"),
    ],
    ids=str,
)
def test_permanent_faults_end_the_run_with_one_line(connect, server, fault, advice):
    client = connect(concurrency=1)
    server.faults.extend([fault] * 50)
    with pytest.raises(ConfigError) as caught:
        list(client.chat(prompt(str(n)) for n in range(50)))
    assert advice in str(caught.value) and "\n" not in str(caught.value) and server.url in str(caught.value)
    assert server.requests <= 4  # requests already in flight


def test_the_run_ends_after_give_up_after_failures_in_a_row(connect, server):
    server.chat = lambda body: BROKEN
    client = connect(retries=0, give_up_after=5, concurrency=1)
    with pytest.raises(EndpointError, match=r"5 requests in a row failed, the last one: http.* answers 500"):
        list(client.chat(prompt(str(n)) for n in range(1000)))
    assert server.requests < 20


def test_connection_refused_is_reported():
    with openai_server() as server:
        url = server.url
    settings = EndpointSettings(url=(url,), model="m", retries=1, backoff_s=0.0)
    with Endpoint(settings) as client:
        (answer,) = client.chat([prompt("x")])
    assert answer.fault.kind == "connect" and "cannot be connected to" in answer.fault.message


def test_a_slow_answer_is_a_timeout(connect, server):
    server.faults.append("hang")
    client = connect(timeout_s=0.5)
    (answer,) = client.chat([prompt("x")])
    assert answer.text == "you said: x" and client.usage.faults == {"timeout": 1}


def test_retry_after_is_obeyed(connect, server):
    server.faults.append((429, {"Retry-After": "1"}, b""))
    client = connect()
    started = time.monotonic()
    (answer,) = client.chat([prompt("x")])
    assert answer.fault is None and time.monotonic() - started >= 1.0


def test_a_retry_after_above_max_wait_fails_at_once(connect, server):
    server.faults.append((429, {"Retry-After": formatdate(time.time() + 3600, usegmt=True)}, b""))
    (answer,) = connect(max_wait_s=60.0).chat([prompt("x")])
    assert answer.fault.kind == "throttled" and 3000 < answer.fault.wait_s <= 3600 and server.requests == 1


@pytest.mark.parametrize(("header", "seconds"), [("7", 7.0), ("-3", 0.0), ("soon", None), ("nan", None), (None, None)])
def test_retry_after_is_parsed(header, seconds):
    assert fault_of_status(429, b"", header).wait_s == seconds


def test_the_backoff_doubles_up_to_a_minute_with_jitter():
    assert 0.5 <= backoff_s(1.0, 0) <= 1.0 and 2.0 <= backoff_s(1.0, 2) <= 4.0 and 30.0 <= backoff_s(1.0, 99) <= 60.0
    assert len({backoff_s(1.0, 0) for _ in range(20)}) > 1


def test_servers_share_requests_and_a_dead_one_is_skipped(connect, server):
    with openai_server() as second, openai_server() as closed:
        closed_url = closed.url
        closed.close()
        client = connect(url=(server.url, second.url, closed_url), concurrency=1, backoff_s=30.0)
        answers = list(client.chat(prompt(str(n)) for n in range(20)))
        assert all(answer.fault is None for answer in answers)
        assert abs(server.requests - second.requests) <= 1 and server.requests + second.requests == 20
        assert client.usage.faults == {"connect": 1}


def test_a_retry_goes_to_another_server(connect, server):
    with openai_server() as second:
        server.chat = lambda body: BROKEN
        client = connect(url=(server.url, second.url), concurrency=1, retries=1)
        assert all(answer.fault is None for answer in client.chat(prompt(str(n)) for n in range(10)))


def test_loading_servers_are_waited_for(connect, server):
    server.loading = 2
    with openai_server() as second:
        client = connect(url=(server.url, second.url), startup_s=60.0)
        assert server.paths["/v1/models"] == 3 and next(client.chat([prompt("x")])).fault is None
    with pytest.raises(EndpointError, match=r"1 of 2 servers do not answer within --endpoint.startup-s 0.1: http"):
        connect(url=(server.url, second.url), startup_s=0.1)
