"""Faults while a server runs: clients, files, signals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import httpx
import pytest

from tests.fork_server import ForkServer

from ..conftest import KEY, Assets
from .conftest import Server, serve

pytestmark = pytest.mark.slow


CHUNKED = (
    b"POST /v1/recommend HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)


def request_body(assets: Assets, number: int) -> dict:
    conversation = assets.conversations[number]
    return {"conversation": conversation.turns[0].text, "candidates": list(conversation.candidates[KEY])}


def request_bytes(body: bytes, length: int | None = None) -> bytes:
    head = (
        f"POST /v1/recommend HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}"
    )
    return f"{head}\r\n\r\n".encode().replace(b"None", str(len(body)).encode()) + body


def read_answer(connection: socket.socket) -> tuple[int, bytes]:
    """Status and bytes of a response until the server closes the connection; status 0 without a response."""
    connection.settimeout(120)
    data = b""
    try:
        while block := connection.recv(65536):
            data += block
    except ConnectionResetError:
        pass
    return (int(data.split(b" ")[1]) if data else 0), data


def metric(client: httpx.Client, name: str) -> float:
    lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith(name)]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


@pytest.fixture(scope="module")
def slow_batches(assets: Assets, index: Path, fork_server: ForkServer):
    """A server that collects requests for a second, with small limits."""
    args = ("--bundle", assets.bundle, "--store", assets.store, "--index", index)
    limits = ("--batch-ms", 1000, "--body-seconds", 2, "--queue", 12, "--max-turns", 50)
    with serve(*args, *limits, fork_server=fork_server) as running:
        yield running


def test_a_batch_of_valid_invalid_and_cancelled_requests(assets: Assets, slow_batches: Server):
    """Eight requests at once: one malformed, one with an unknown id, one cancelled; five answers."""
    with slow_batches.client() as client:
        dropped, batches = 'lavic_dropped_requests_total{cause="client_left"}', "lavic_batch_requests_count"
        before = metric(client, batches), metric(client, dropped)
        expected = [client.post("/v1/recommend", json=request_body(assets, number)).json() for number in range(5)]
        alone = metric(client, batches)
        leaving = socket.create_connection(("127.0.0.1", slow_batches.port))
        leaving.sendall(request_bytes(json.dumps(request_body(assets, 6)).encode()))
        while metric(client, "lavic_waiting_requests") < 1:
            pass
        leaving.close()
        bodies = [json.dumps(request_body(assets, number)) for number in range(5)]
        bodies += ["{", json.dumps({"conversation": "a mug", "candidates": ["B0NOWHERE0"]})]

        def send(body: str) -> httpx.Response:
            with slow_batches.client() as other:
                return other.post("/v1/recommend", content=body, headers={"Content-Type": "application/json"})

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(send, bodies))
        assert [answer.status_code for answer in answers] == [200] * 5 + [400, 422]
        for answer, other in zip(answers, expected, strict=False):
            assert [item["id"] for item in answer.json()["items"]] == [item["id"] for item in other["items"]]
        assert metric(client, dropped) == before[1] + 1
        assert alone == before[0] + 5 and metric(client, batches) <= alone + 3


def test_a_full_queue_is_refused_with_retry_after(assets: Assets, slow_batches: Server):
    def send(number: int) -> httpx.Response:
        with slow_batches.client() as other:
            return other.post("/v1/recommend", json=request_body(assets, number % 20))

    with ThreadPoolExecutor(30) as pool:
        answers = list(pool.map(send, range(30)))
    assert {answer.status_code for answer in answers} == {200, 429}
    for answer in answers:
        if answer.status_code == 429:
            assert int(answer.headers["Retry-After"]) >= 1 and answer.json()["error"]["code"] == "overloaded"


def test_slow_request_bodies_time_out_without_delaying_others(assets: Assets, slow_batches: Server):
    """Bodies that do not arrive get 408; other requests are served meanwhile."""
    body = json.dumps(request_body(assets, 0)).encode()
    slow = [socket.create_connection(("127.0.0.1", slow_batches.port)) for _ in range(5)]
    for connection in slow:
        connection.sendall(request_bytes(body[:10], length=len(body)))
    with slow_batches.client() as client:
        assert client.post("/v1/recommend", json=request_body(assets, 1)).status_code == 200
    for connection in slow:
        connection.sendall(body[10:11])  # single bytes do not extend the time
        status, answer = read_answer(connection)
        assert status == 408 and b"request_timeout" in answer
        connection.close()


def test_incomplete_request_headers_close_the_connection(slow_batches: Server):
    with socket.create_connection(("127.0.0.1", slow_batches.port)) as connection:
        connection.sendall(b"POST /v1/recommend HTTP/1.1\r\nHost: loc")
        assert read_answer(connection) == (0, b"")


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        (b"GET /", b"a" * 8192),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n", b"X-A: " + b"a" * 8192 + b"\r\n"),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX-A: ", b"a" * 8192),
        (CHUNKED + b"2\r\n{}\r\n0\r\n", b"X-A: " + b"a" * 8192 + b"\r\n"),
        (CHUNKED + b"2;", b"a" * 8192),
    ],
    ids=["path", "headers", "header", "trailers", "extension"],
)
def test_a_too_large_head_closes_the_connection(slow_batches: Server, start: bytes, piece: bytes):
    """httptools keeps what is no body in memory, whatever its size."""
    sent = 0
    with socket.create_connection(("127.0.0.1", slow_batches.port)) as connection:
        connection.settimeout(120)
        try:
            connection.sendall(start)
            while sent < 64 << 20:
                connection.sendall(piece)
                sent += len(piece)
        except (BrokenPipeError, ConnectionResetError):
            pass
        status, _ = read_answer(connection)
    assert sent < 64 << 20 and status in (400, 0)  # what was sent after the answer may hide it
    with slow_batches.client() as client:
        assert client.get("/healthz").status_code == 200


def test_a_large_body_in_many_pieces_is_no_head(assets: Assets, slow_batches: Server):
    body = json.dumps({**request_body(assets, 0), "exclude": ["x" * 300] * 900}).encode()
    with socket.create_connection(("127.0.0.1", slow_batches.port)) as connection:
        connection.sendall(CHUNKED.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        for first in range(0, len(body), 1000):
            piece = body[first : first + 1000]
            connection.sendall(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        connection.sendall(b"0\r\n\r\n")
        assert read_answer(connection)[0] == 200


@pytest.mark.parametrize("declared", [True, False])
def test_too_large_bodies_are_refused(slow_batches: Server, declared: bool):
    data = b'{"conversation": "' + b"a" * 10_000_000 + b'"}'

    def pieces():
        for first in range(0, len(data), 1 << 16):
            yield data[first : first + (1 << 16)]

    head = b"POST /v1/recommend HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    kind = f"Content-Length: {len(data)}\r\n\r\n" if declared else "Transfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection(("127.0.0.1", slow_batches.port)) as connection:
        connection.sendall(head + kind.encode())
        try:
            for piece in pieces():
                connection.sendall(piece if declared else f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        except (BrokenPipeError, ConnectionResetError):
            pass  # refused before the body was complete
        status, answer = read_answer(connection)
    assert status in (413, 0) and (status == 0 or b"too_large" in answer)
    with slow_batches.client() as client:
        assert client.get("/healthz").status_code == 200


def test_too_many_turns_and_characters_are_refused(assets: Assets, slow_batches: Server):
    with slow_batches.client() as client:
        body = {"conversation": [{"role": "user", "content": "a mug"}] * 10_000}
        answer = client.post("/v1/recommend", json=body)
        assert (
            answer.status_code == 422
            and "10000 turns, the server takes 50 at most" in answer.json()["error"]["message"]
        )
        answer = client.post("/v1/recommend", json={"conversation": "a mug " * 10_000})
        assert answer.status_code == 422 and "60000 characters" in answer.json()["error"]["message"]
        ids = request_body(assets, 0)["candidates"]
        answer = client.post("/v1/recommend", json={"conversation": ["a mug " * 200] * 40, "candidates": ids})
        assert answer.status_code == 200, answer.text


def test_a_store_truncated_while_served_gives_503_until_restored(
    assets: Assets, tmp_path: Path, fork_server: ForkServer
):
    """Requests get 503, the process survives, and the restored store is loaded."""
    store = tmp_path / "store"
    shutil.copytree(assets.store, store)
    args = ("--bundle", assets.bundle, "--store", store)
    with serve(*args, fork_server=fork_server) as server, server.client() as client:
        first = client.post("/v1/recommend", json=request_body(assets, 0))
        assert first.status_code == 200
        files = [*store.glob("tokens-*.safetensors"), *store.glob("items-*.safetensors")]
        contents = {path: path.read_bytes() for path in files}
        assert len(contents) == 2
        for path in files:
            os.truncate(path, 100)
        for number in range(3):
            answer = client.post("/v1/recommend", json=request_body(assets, number))
            assert answer.status_code == 503 and answer.json()["error"]["code"] == "unavailable"
        server.process.send_signal(signal.SIGHUP)
        server.wait_for("not taken up")
        assert client.get("/readyz").status_code == 200
        for path, data in contents.items():
            path.with_suffix(".new").write_bytes(data)
            path.with_suffix(".new").replace(path)
        server.process.send_signal(signal.SIGHUP)
        server.wait_for("serving bundle", 2)
        restored = client.post("/v1/recommend", json=request_body(assets, 0))
        assert restored.json() == first.json()
        assert server.stop() == 0


def test_sighup_loads_a_new_bundle_without_dropping_requests(assets: Assets, tmp_path: Path, fork_server: ForkServer):
    for name, source in (("bundle", assets.bundle), ("store", assets.store)):
        (tmp_path / name).symlink_to(source)
    with serve("--bundle", tmp_path / "bundle", "--store", tmp_path / "store", fork_server=fork_server) as server:
        statuses: list[int] = []
        orders: list[tuple[str, ...]] = []
        going = True

        def ask() -> None:
            with server.client() as client:
                while going:
                    answer = client.post("/v1/recommend", json=request_body(assets, 0))
                    statuses.append(answer.status_code)
                    orders.append(tuple(f"{item['id']} {item['probability']:.4f}" for item in answer.json()["items"]))

        with ThreadPoolExecutor(4) as pool:
            clients = [pool.submit(ask) for _ in range(4)]
            try:
                while len(statuses) < 4:
                    time.sleep(0.01)
                (tmp_path / "new").symlink_to(assets.titles_only)
                (tmp_path / "new").replace(tmp_path / "bundle")
                server.process.send_signal(signal.SIGHUP)
                server.wait_for("serving bundle", 2)
                count = len(statuses)
                while len(statuses) < count + 12:
                    time.sleep(0.01)
            finally:
                going = False
            wait(clients)
        assert set(statuses) == {200} and orders[0] != orders[-1] and len(set(orders)) == 2
        assert server.stop() == 0


def test_sigterm_answers_accepted_requests_first(assets: Assets, fork_server: ForkServer):
    """Accepted requests are answered, then the process exits with 0."""
    args = ("--bundle", assets.bundle, "--store", assets.store, "--batch-ms", 1000)
    with serve(*args, fork_server=fork_server) as server:

        def send(number: int) -> int:
            with server.client() as client:
                return client.post("/v1/recommend", json=request_body(assets, number)).status_code

        with ThreadPoolExecutor(6) as pool, server.client() as client:
            sent = [pool.submit(send, number) for number in range(6)]
            while metric(client, "lavic_waiting_requests") < 6:
                pass
            server.process.send_signal(signal.SIGTERM)
            assert [answer.result() for answer in sent] == [200] * 6
        assert server.process.wait(120) == 0
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", server.port), timeout=5)


def test_requests_past_the_deadline_are_refused(assets: Assets, fork_server: ForkServer):
    args = ("--bundle", assets.bundle, "--store", assets.store, "--batch-ms", 1000, "--deadline", 0.2)
    with serve(*args, fork_server=fork_server) as server, server.client() as client:
        answer = client.post("/v1/recommend", json=request_body(assets, 0))
        assert answer.status_code == 503 and int(answer.headers["Retry-After"]) >= 1
        assert client.get("/healthz").status_code == 200
        assert metric(client, 'lavic_dropped_requests_total{cause="deadline"}') == 1


def test_an_index_truncated_while_served_gives_503_until_restored(
    assets: Assets, index: Path, tmp_path: Path, fork_server: ForkServer
):
    """Requests get 503, the process survives, and the restored index is loaded."""
    copy = tmp_path / "index"
    shutil.copytree(index, copy)
    args = ("--bundle", assets.bundle, "--store", assets.store, "--index", copy, "--retrieved", 10)
    with serve(*args, fork_server=fork_server) as server, server.client() as client:
        first = client.post("/v1/recommend", json={"conversation": "a mug"})
        assert first.status_code == 200
        for path in copy.glob("*.safetensors"):
            os.truncate(path, 0)
        for body in ({"conversation": "a mug"}, request_body(assets, 0)):
            answer = client.post("/v1/recommend", json=body)
            assert answer.status_code == 503 and answer.json()["error"]["code"] == "unavailable"
        copy.rename(tmp_path / "cut")
        shutil.copytree(index, copy)
        server.process.send_signal(signal.SIGHUP)
        server.wait_for("serving bundle", 2)
        assert client.post("/v1/recommend", json={"conversation": "a mug"}).json() == first.json()
        assert server.stop() == 0
