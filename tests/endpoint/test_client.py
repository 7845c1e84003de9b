"""The client against a server on loopback: right answers, each kind of fault, cache, cost, secrets."""

from __future__ import annotations

import base64
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from email.utils import formatdate

import pytest

from lavic.config import dump
from lavic.config.secrets import redact
from lavic.endpoint.chat import ChatRequest, Photo
from lavic.endpoint.client import Endpoint
from lavic.endpoint.faults import EndpointError, backoff_s, fault_of_status
from lavic.endpoint.settings import EndpointSettings, base_url
from lavic.errors import ConfigError
from tests.endpoint.openai_server import chat_body, openai_server, photos, question

HTML = (200, {"Content-Type": "text/html"}, b"<!doctype html><title>Sign in</title>")
BUSY = (429, {"Retry-After": "0"}, b'{"error": {"message": "slow down", "code": "rate_limit_exceeded"}}')
BROKEN = (500, {}, b"<h1>Internal Server Error</h1>")
HALF = (200, {"Content-Type": "application/json"}, b'{"choices": [{"message": {"con')


def ask(words: str, **more) -> ChatRequest:
    return ChatRequest(parts=[words], **more)


def test_answers_come_in_the_order_of_the_questions(connect, server):
    client = connect(concurrency=5)
    answers = list(client.chat(ask(f"n{n}") for n in range(60)))
    assert [answer.text for answer in answers] == [f"you said: n{n}" for n in range(60)]
    assert client.usage.as_dict()["prompt_tokens"] == 600
    assert server.paths == {"/v1/chat/completions": 60}


def test_as_many_are_in_flight_as_was_asked_for(connect, server):
    client = connect(concurrency=5)
    server.faults.extend(["hang"] * 40)
    answers = client.chat(ask(str(n)) for n in range(40))
    thread = threading.Thread(target=list, args=(answers,))
    thread.start()
    assert all(server.hanging.acquire(timeout=60) for _ in range(5))
    server.release.set()
    thread.join()
    assert server.most_in_flight == 5 and server.requests == 40


def test_the_body_is_what_openai_documents(connect, server):
    client = connect(extra={"reasoning_effort": "low"})
    request = ChatRequest(parts=["look: ", Photo(b"jpeg")], system="be brief", max_tokens=7, seed=3)
    list(client.chat([request]))
    (body,) = server.bodies
    assert body == {
        "model": "drawn",
        "messages": [
            {"role": "system", "content": "be brief"},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "look: "},
                    {
                        "type": "image_url",
                        "image_url": {"url": "data:image/jpeg;base64," + base64.b64encode(b"jpeg").decode()},
                    },
                ],
            },
        ],
        "max_tokens": 7,
        "temperature": 0.0,
        "seed": 3,
        "reasoning_effort": "low",
    }
    assert photos(body) and question(body) == "look: "


def test_max_completion_tokens_replaces_max_tokens(connect, server):
    list(connect(extra={"max_completion_tokens": 5, "temperature": None}).chat([ask("x", max_tokens=9)]))
    assert "max_tokens" not in server.bodies[0] and "temperature" not in server.bodies[0]
    assert server.bodies[0]["max_completion_tokens"] == 5


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
        (HALF, "json"),
        ((200, {}, b""), "json"),
        ((200, {}, b"[" * 100_000), "json"),
        ((200, {}, b"[]"), "shape"),
        ((200, {}, b'{"choices": []}'), "shape"),
        ((200, {}, b'{"choices": [{"message": {"content": 7}}]}'), "shape"),
        ((200, {}, b'{"error": {"message": "out of memory", "code": 503}}'), "server"),
    ],
    ids=str,
)
def test_a_fault_that_may_pass_is_retried(connect, server, fault, kind):
    client = connect()
    server.faults.extend([fault, fault])
    (answer,) = client.chat([ask("hello")])
    assert answer.text == "you said: hello" and answer.fault is None
    assert client.usage.faults == {kind: 2} and not client.usage.failed
    assert server.requests == 3


def test_retries_are_bounded_and_the_next_question_is_asked(connect, server):
    client = connect(concurrency=1)
    server.faults.extend([HALF] * 3)
    (bad,) = client.chat([ask("first")])
    (good,) = client.chat([ask("second")])
    assert bad.text == "" and bad.fault.kind == "json" and "not JSON" in bad.fault.message
    assert good.text == "you said: second"
    assert client.usage.failed == {"json": 1} and server.requests == 4


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_request_that_is_refused_is_not_repeated(connect, server, status):
    client = connect(concurrency=1)
    server.faults.append((status, {}, b'{"error": {"message": "the context\\nis too long"}}'))
    bad, good = client.chat([ask("first"), ask("second")])
    assert bad.fault.kind == "refused" and good.fault is None
    assert bad.fault.message == f"{server.url} answers {status} (the context is too long)"
    assert server.requests == 2


@pytest.mark.parametrize(
    ("fault", "mend"),
    [
        ((401, {}, b'{"error": {"message": "no such key"}}'), "check --endpoint.api-key"),
        ((403, {}, b""), "check --endpoint.api-key"),
        ((404, {}, b'{"detail": "Not Found"}'), "check --endpoint.url and --endpoint.model drawn"),
        ((429, {}, b'{"error": {"message": "pay", "code": "insufficient_quota"}}'), "top up"),
        ((307, {"Location": "http://192.0.2.1/"}, b""), "redirects"),
    ],
    ids=str,
)
def test_what_would_fail_every_time_ends_with_one_line(connect, server, fault, mend):
    client = connect(concurrency=1)
    server.faults.extend([fault] * 50)
    with pytest.raises(ConfigError) as caught:
        list(client.chat(ask(str(n)) for n in range(50)))
    assert mend in str(caught.value) and "\n" not in str(caught.value) and server.url in str(caught.value)
    assert server.requests <= 4  # those that had begun


def test_it_gives_up_when_nothing_works_any_more(connect, server):
    server.chat = lambda body: BROKEN
    client = connect(retries=0, give_up_after=5, concurrency=1)
    with pytest.raises(EndpointError, match=r"5 requests in a row failed, the last one: http.* answers 500"):
        list(client.chat(ask(str(n)) for n in range(1000)))
    assert server.requests < 20


def test_a_server_that_is_not_there_is_said():
    with openai_server() as server:
        url = server.url
    chosen = EndpointSettings(url=(url,), model="m", retries=1, backoff_s=0.0)
    with Endpoint(chosen) as client:
        (answer,) = client.chat([ask("x")])
    assert answer.fault.kind == "connect" and "cannot be connected to" in answer.fault.message


def test_a_slow_answer_is_a_timeout(connect, server):
    server.faults.append("hang")
    client = connect(timeout_s=0.5)
    (answer,) = client.chat([ask("x")])
    assert answer.text == "you said: x" and client.usage.faults == {"timeout": 1}


def test_retry_after_is_waited_for(connect, server):
    server.faults.append((429, {"Retry-After": "1"}, b""))
    client = connect()
    started = time.monotonic()
    (answer,) = client.chat([ask("x")])
    assert answer.fault is None and time.monotonic() - started >= 1.0


def test_a_retry_after_of_an_hour_fails_at_once(connect, server):
    server.faults.append((429, {"Retry-After": formatdate(time.time() + 3600, usegmt=True)}, b""))
    (answer,) = connect(max_wait_s=60.0).chat([ask("x")])
    assert answer.fault.kind == "throttled" and 3000 < answer.fault.wait_s <= 3600 and server.requests == 1


@pytest.mark.parametrize(("header", "seconds"), [("7", 7.0), ("-3", 0.0), ("soon", None), ("nan", None), (None, None)])
def test_retry_after_is_read(header, seconds):
    assert fault_of_status(429, b"", header).wait_s == seconds


def test_the_backoff_doubles_up_to_a_minute_with_jitter():
    assert 0.5 <= backoff_s(1.0, 0) <= 1.0 and 2.0 <= backoff_s(1.0, 2) <= 4.0 and 30.0 <= backoff_s(1.0, 99) <= 60.0
    assert len({backoff_s(1.0, 0) for _ in range(20)}) > 1


def test_several_servers_take_turns_and_one_that_is_down_is_left_out(connect, server):
    with openai_server() as second, openai_server() as gone:
        down = gone.url
        gone.close()
        client = connect(url=(server.url, second.url, down), concurrency=1, backoff_s=30.0)
        answers = list(client.chat(ask(str(n)) for n in range(20)))
        assert all(answer.fault is None for answer in answers)
        assert abs(server.requests - second.requests) <= 1 and server.requests + second.requests == 20
        assert client.usage.faults == {"connect": 1}


def test_a_retry_goes_to_another_server(connect, server):
    with openai_server() as second:
        server.chat = lambda body: BROKEN
        client = connect(url=(server.url, second.url), concurrency=1, retries=1)
        assert all(answer.fault is None for answer in client.chat(ask(str(n)) for n in range(10)))


def test_requests_per_minute_are_a_pace(connect, server):
    client = connect(requests_per_minute=1200.0)
    started = time.monotonic()
    list(client.chat(ask(str(n)) for n in range(11)))
    assert time.monotonic() - started >= 0.5


def test_a_second_run_costs_nothing(connect, server, tmp_path):
    prices = {"input_price": 2.0, "output_price": 10.0, "cache": tmp_path / "answers"}
    first = connect(**prices)
    before = [a.text for a in first.chat(ask(f"n{n}") for n in range(20))]
    assert first.usage.cost == pytest.approx((200 * 2 + 60 * 10) / 1e6) and first.usage.cached_cost == 0
    with openai_server() as other:  # another address, another key: the same answers
        again = connect(**prices, url=(other.url,))
        answers = list(again.chat(ask(f"n{n}") for n in range(20)))
        assert [a.text for a in answers] == before and all(a.cached for a in answers)
        assert other.requests == 0
    assert again.usage.cost == 0 and again.usage.cached_cost == pytest.approx(first.usage.cost)
    list(again.chat([ask("n1", temperature=0.5), ask("n1", attempt=1)]))
    assert server.requests == 20 and again.usage.requests == 0 and again.usage.failed == {"connect": 2}


def test_failures_are_not_kept(connect, server, tmp_path):
    server.faults.extend([(400, {}, b"")])
    client = connect(cache=tmp_path)
    assert next(client.chat([ask("x")])).fault
    assert next(client.chat([ask("x")])).fault is None


def test_a_damaged_answer_is_asked_for_again(connect, server, tmp_path):
    client = connect(cache=tmp_path)
    list(client.chat([ask("x")]))
    (file,) = tmp_path.rglob("*.json")
    for damage in (file.read_bytes()[:-20], file.read_bytes().replace(b"you said", b"you lied"), b"\xff\xfe"):
        file.write_bytes(damage)
        assert next(client.chat([ask("x")])).text == "you said: x"
    assert server.requests == 4


def test_answers_are_shared_by_processes(server, tmp_path):
    code = (
        "import sys\nfrom lavic.endpoint.client import Endpoint\nfrom lavic.endpoint.settings import EndpointSettings\n"
        "from lavic.endpoint.chat import ChatRequest\n"
        "with Endpoint(EndpointSettings(url=(sys.argv[1],), model='m', cache=sys.argv[2])) as client:\n"
        "    print([a.text for a in client.chat(ChatRequest(parts=[f'n{n}']) for n in range(50))])\n"
    )
    command = [sys.executable, "-c", code, server.url, str(tmp_path)]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0] and not list(tmp_path.rglob("*.part"))
    before = server.requests
    assert subprocess.run(command, capture_output=True, text=True, timeout=120).stdout == outputs[0][0]
    assert server.requests == before <= 100


def test_questions_are_drawn_as_answers_come(connect, server):
    drawn = []

    def questions():
        for n in range(1000):
            drawn.append(n)
            yield ask(str(n))

    client = connect(concurrency=3)
    answers = client.chat(questions())
    for _ in range(5):
        next(answers)
    answers.close()
    assert len(drawn) <= 5 + 4 * 3


def test_the_key_is_sent_and_nowhere_else(connect, server, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("MY_SERVERS_WORD", "sk-very-secret-9")
    client = connect(api_key="env:MY_SERVERS_WORD", cache=tmp_path / "answers", concurrency=1)
    (answer,) = client.chat([ask("x")])
    assert server.headers[0]["authorization"] == "Bearer sk-very-secret-9"
    server.faults.append((401, {}, b'{"error": {"message": "wrong key sk-very-secret-9"}}'))
    with pytest.raises(ConfigError) as caught:
        list(client.chat([ask("y")]))
    kept = "".join(file.read_text() for file in (tmp_path / "answers").rglob("*.json"))
    everything = [str(caught.value), kept, caplog.text, repr(answer), dump(client.settings), repr(client.settings)]
    assert not [text for text in everything if "very-secret" in text]
    assert "env:MY_SERVERS_WORD" in dump(client.settings) and redact("sk-very-secret-9") == "***"


def test_a_key_on_the_command_line_is_refused(server, tmp_path):
    with pytest.raises(ValueError, match="not the key itself"):
        EndpointSettings(url=(server.url,), model="m", api_key="sk-1234567890")
    with pytest.raises(ConfigError, match="NO_SUCH_VARIABLE is not set"):
        Endpoint(EndpointSettings(url=(server.url,), model="m", api_key="env:NO_SUCH_VARIABLE"))
    file = tmp_path / "key"
    file.write_text("sk-from-a-file\n")
    file.chmod(0o600)
    with Endpoint(EndpointSettings(url=(server.url,), model="m", api_key=f"@{file}")) as client:
        list(client.chat([ask("x")]))
    assert server.headers[-1]["authorization"] == "Bearer sk-from-a-file"


def test_missing_settings_are_named():
    with pytest.raises(ConfigError, match=r"missing --chat\.url and --chat\.model"):
        Endpoint(EndpointSettings(), "--chat")


@pytest.mark.parametrize(
    ("given", "base"),
    [
        ("http://n1:8000", "http://n1:8000/v1"),
        ("http://n1:8000/", "http://n1:8000/v1"),
        ("https://api.example.org/v1/", "https://api.example.org/v1"),
        ("https://h/openai/v1/chat/completions", "https://h/openai/v1"),
        ("https://h/v1/embeddings?api-version=3", "https://h/v1?api-version=3"),
    ],
)
def test_addresses_in_any_form(given, base):
    assert base_url(given) == base


@pytest.mark.parametrize("given", ["n1:8000", "ftp://n1/v1", "", "http://", "/v1", "http://n1:80800", "http://n1:a"])
def test_what_is_no_address_is_refused(given):
    with pytest.raises(ValueError, match="address of a server"):
        base_url(given)


def test_hostile_text_reaches_the_server(connect, server):
    words = "\ud83d lone \x00 \u2028 </s>[INST] " + "x" * 200_000
    (answer,) = connect().chat([ask(words)])
    assert answer.text == "you said: " + words.replace("\ud83d", "\ufffd")


def test_ctrl_c_ends_it_at_once(server):
    code = (
        "import sys\nfrom lavic.endpoint.client import Endpoint\nfrom lavic.endpoint.settings import EndpointSettings\n"
        "from lavic.endpoint.chat import ChatRequest\n"
        "with Endpoint(EndpointSettings(url=(sys.argv[1],), model='m')) as client:\n"
        "    print([a.text for a in client.chat(ChatRequest(parts=[f'n{n}']) for n in range(50))])\n"
    )
    server.faults.extend(["hang"] * 50)
    run = subprocess.Popen([sys.executable, "-c", code, server.url], stderr=subprocess.PIPE, text=True)
    assert server.hanging.acquire(timeout=60)
    os.kill(run.pid, signal.SIGINT)
    _, error = run.communicate(timeout=60)
    assert error.rstrip().endswith("KeyboardInterrupt") and "never" not in error


def test_threads_share_a_client(connect, server):
    client = connect()
    results = {}

    def work(name):
        results[name] = [a.text for a in client.chat(ask(f"{name}{n}") for n in range(20))]

    threads = [threading.Thread(target=work, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {name: [f"you said: {name}{n}" for n in range(20)] for name in "abc"}


def test_a_server_that_does_not_count_tokens(connect, server):
    server.chat = lambda body: {"choices": [{"message": {"content": [{"type": "text", "text": "parts"}]}}]}
    client = connect(input_price=1.0)
    assert next(client.chat([ask("x")])).text == "parts"
    assert client.usage.without_usage == 1 and json.dumps(client.usage.as_dict())


def test_a_refusal_is_told(connect, server):
    body = chat_body(None)
    body["choices"][0]["message"]["refusal"] = "I cannot"
    server.chat = lambda _: body
    (answer,) = connect().chat([ask("x")])
    assert (answer.text, answer.refusal) == ("", "I cannot")


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ("<think>\nA mug? A cup.\n</think>\n\nA cup.\n", "A cup."),
        ("A mug? A cup.\n</think>\n\nA cup.", "A cup."),  # the prompt has the opening tag
        ("<think>It never ends", ""),
        ("<think></think>", ""),
        ("<think>a</think>One. <think>b</think>Two.", "One. Two."),
        ("<think>The tags <think> and </think> hide it.</think>A cup.", "A cup."),
        ("[THINK]A mug?[/THINK]A cup.", "A cup."),
        ("<thinking>A mug?</thinking> A cup.", "A cup."),
        (" A cup, <i>I think</i>.\n", " A cup, <i>I think</i>.\n"),
        ([{"type": "text", "text": "<think>A mug?"}, {"type": "text", "text": "</think>A cup."}], "A cup."),
    ],
)
def test_thoughts_are_no_answer(connect, server, said, text):
    server.chat = lambda body: chat_body(said)
    assert [answer.text for answer in connect().chat([ask("?")])] == [text]


def test_servers_that_still_load_are_waited_for(connect, server):
    server.loading = 2
    with openai_server() as second:
        client = connect(url=(server.url, second.url), startup_s=60.0)
        assert server.paths["/v1/models"] == 3 and next(client.chat([ask("x")])).fault is None
    with pytest.raises(EndpointError, match=r"1 of 2 servers do not answer within --endpoint.startup-s 0.1: http"):
        connect(url=(server.url, second.url), startup_s=0.1)


def test_proxies_of_the_environment_are_used_where_asked_for(connect, server, monkeypatch):
    monkeypatch.setenv("http_proxy", server.url.removesuffix("/v1"))
    monkeypatch.delenv("no_proxy", raising=False)
    there = "http://models.invalid/v1"
    (answer,) = connect(url=(there,), proxy="env").chat([ask("x")])
    assert answer.text == "you said: x" and server.paths == {f"{there}/chat/completions": 1}
    (answer,) = connect(url=(there,), retries=0).chat([ask("x")])
    assert answer.fault.kind == "connect" and server.requests == 1
