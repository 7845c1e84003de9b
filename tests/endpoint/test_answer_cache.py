"""The cache of answers: no second request, damaged files, several processes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.endpoint.conftest import prompt
from tests.endpoint.openai_server import openai_server


def test_a_second_run_sends_no_request(connect, server, tmp_path):
    prices = {"input_price": 2.0, "output_price": 10.0, "cache": tmp_path / "answers"}
    first = connect(**prices)
    before = [a.text for a in first.chat(prompt(f"n{n}") for n in range(20))]
    assert first.usage.cost == pytest.approx((200 * 2 + 60 * 10) / 1e6) and first.usage.cached_cost == 0
    with openai_server() as other:  # the address is not part of the cache key
        second = connect(**prices, url=(other.url,))
        answers = list(second.chat(prompt(f"n{n}") for n in range(20)))
        assert [a.text for a in answers] == before and all(a.cached for a in answers)
        assert other.requests == 0
    assert second.usage.cost == 0 and second.usage.cached_cost == pytest.approx(first.usage.cost)
    list(second.chat([prompt("n1", temperature=0.5), prompt("n1", attempt=1)]))
    assert server.requests == 20 and second.usage.requests == 0 and second.usage.failed == {"connect": 2}


def test_failures_are_not_cached(connect, server, tmp_path):
    server.faults.extend([(400, {}, b"")])
    client = connect(cache=tmp_path)
    assert next(client.chat([prompt("x")])).fault
    assert next(client.chat([prompt("x")])).fault is None


def test_a_damaged_cached_answer_is_requested_again(connect, server, tmp_path):
    client = connect(cache=tmp_path)
    list(client.chat([prompt("x")]))
    (file,) = tmp_path.rglob("*.json")
    for damage in (file.read_bytes()[:-20], file.read_bytes().replace(b"you said", b"you lied"), b"\xff\xfe"):
        file.write_bytes(damage)
        assert next(client.chat([prompt("x")])).text == "you said: x"
    assert server.requests == 4


@pytest.mark.slow
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
