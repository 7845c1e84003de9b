"""The endpoint client against a local server: answers, concurrency, several servers, interruption, text in and out."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from lavic.endpoint.chat import ChatRequest, Photo
from tests.endpoint.conftest import prompt
from tests.endpoint.openai_server import chat_body, photos, question


def test_answers_come_in_request_order(connect, server):
    client = connect(concurrency=5)
    answers = list(client.chat(prompt(f"n{n}") for n in range(60)))
    assert [answer.text for answer in answers] == [f"you said: n{n}" for n in range(60)]
    assert client.usage.as_dict()["prompt_tokens"] == 600
    assert server.paths == {"/v1/chat/completions": 60}


def test_concurrency_bounds_requests_in_flight(connect, server):
    client = connect(concurrency=5)
    server.faults.extend(["hang"] * 40)
    answers = client.chat(prompt(str(n)) for n in range(40))
    thread = threading.Thread(target=list, args=(answers,))
    thread.start()
    assert all(server.hanging.acquire(timeout=60) for _ in range(5))
    server.release.set()
    thread.join()
    assert server.most_in_flight == 5 and server.requests == 40


def test_request_body_follows_the_openai_api(connect, server):
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
    list(connect(extra={"max_completion_tokens": 5, "temperature": None}).chat([prompt("x", max_tokens=9)]))
    assert "max_tokens" not in server.bodies[0] and "temperature" not in server.bodies[0]
    assert server.bodies[0]["max_completion_tokens"] == 5


def test_requests_per_minute_limit_the_rate(connect, server):
    client = connect(requests_per_minute=1200.0)
    started = time.monotonic()
    list(client.chat(prompt(str(n)) for n in range(11)))
    assert time.monotonic() - started >= 0.5


def test_requests_are_read_lazily(connect, server):
    numbers = []

    def requests():
        for n in range(1000):
            numbers.append(n)
            yield prompt(str(n))

    client = connect(concurrency=3)
    answers = client.chat(requests())
    for _ in range(5):
        next(answers)
    answers.close()
    assert len(numbers) <= 5 + 4 * 3


def test_control_characters_and_long_text_reach_the_server(connect, server):
    text = "\ud83d lone \x00 \u2028 </s>[INST] " + "x" * 200_000
    (answer,) = connect().chat([prompt(text)])
    assert answer.text == "you said: " + text.replace("\ud83d", "\ufffd")


def test_ctrl_c_ends_requests_at_once(server):
    code = (
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job ignores it
        "from lavic.endpoint.client import Endpoint\nfrom lavic.endpoint.settings import EndpointSettings\n"
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
        results[name] = [a.text for a in client.chat(prompt(f"{name}{n}") for n in range(20))]

    threads = [threading.Thread(target=work, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {name: [f"you said: {name}{n}" for n in range(20)] for name in "abc"}


def test_answers_without_usage_are_counted(connect, server):
    server.chat = lambda body: {"choices": [{"message": {"content": [{"type": "text", "text": "parts"}]}}]}
    client = connect(input_price=1.0)
    assert next(client.chat([prompt("x")])).text == "parts"
    assert client.usage.without_usage == 1 and json.dumps(client.usage.as_dict())


def test_a_refusal_is_returned(connect, server):
    body = chat_body(None)
    body["choices"][0]["message"]["refusal"] = "I cannot"
    server.chat = lambda _: body
    (answer,) = connect().chat([prompt("x")])
    assert (answer.text, answer.refusal) == ("", "I cannot")


@pytest.mark.parametrize(
    ("content", "text"),
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
def test_thinking_is_removed_from_answers(connect, server, content, text):
    server.chat = lambda body: chat_body(content)
    assert [answer.text for answer in connect().chat([prompt("?")])] == [text]
