"""An OpenAI-compatible server on loopback that answers by a function, and does wrong what it is told to."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

DIMENSIONS = 8


def vector_of(text: str) -> list[float]:
    """The embedding of a text."""
    return [byte / 255 for byte in hashlib.sha256(text.encode()).digest()[:DIMENSIONS]]


def chat_body(text: Any, prompt_tokens: int = 10, completion_tokens: int = 3, finish: str = "stop") -> dict[str, Any]:
    return {
        "object": "chat.completion",
        "choices": [{"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}],
        "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens},
    }


def embeddings_body(texts: Sequence[str]) -> dict[str, Any]:
    rows = [{"object": "embedding", "index": n, "embedding": vector_of(text)} for n, text in enumerate(texts)]
    return {"object": "list", "data": rows, "usage": {"prompt_tokens": sum(map(len, texts))}}


def question(body: dict[str, Any]) -> str:
    """The words of a request for a chat completion."""
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def photos(body: dict[str, Any]) -> list[str]:
    """The data URLs in a request for a chat completion."""
    content = body["messages"][-1]["content"]
    return [] if isinstance(content, str) else [p["image_url"]["url"] for p in content if p["type"] == "image_url"]


def say_back(body: dict[str, Any]) -> Any:
    return chat_body(f"you said: {question(body)}")


Fault = tuple[int, dict[str, str], bytes] | str
"""(status, headers, body); or "" (none), `close` (no answer), `cut` (half of an answer), `hang` (until `release`)."""


class OpenAiServer:
    """Takes requests, by default on a free port of loopback.

    Attributes:
        chat: The answer to a chat request: an object for JSON, bytes as they are.
        embeddings: The answer to a list of texts.
        faults: What the next requests get instead, the first one first.
        bodies: Of the requests so far.
        headers: Of these.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self.chat: Callable[[dict[str, Any]], Any] = say_back
        self.embeddings: Callable[[list[str]], Any] = embeddings_body
        self.faults: deque[Fault] = deque()
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: Counter[str] = Counter()
        self.most_in_flight = 0
        self.release = threading.Event()
        """Lets hanging requests go."""
        self.hanging = threading.Semaphore(0)
        """Released by each request that begins to hang."""
        self.loading = 0
        """How many times it will say that it is not ready."""
        self._in_flight = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    outer.bodies.append(body)
                    outer.headers.append({name.lower(): value for name, value in self.headers.items()})
                    outer.paths[self.path] += 1
                    fault = outer.faults.popleft() if outer.faults else None
                    outer._in_flight += 1
                    outer.most_in_flight = max(outer.most_in_flight, outer._in_flight)
                try:
                    self._answer(body, fault)
                finally:
                    with outer._lock:
                        outer._in_flight -= 1

            def do_GET(self) -> None:
                with outer._lock:
                    outer.paths[self.path] += 1
                    status = 503 if outer.loading else 200
                    outer.loading -= bool(outer.loading)
                self._send(status, {"Content-Type": "application/json"}, b'{"object": "list", "data": []}')

            def _answer(self, body: dict[str, Any], fault: Fault | None) -> None:
                if fault == "close":
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                if fault == "hang":
                    outer.hanging.release()
                    outer.release.wait(60)
                if isinstance(fault, tuple):
                    self._send(*fault)
                    return
                answer = outer.embeddings(body["input"]) if "input" in body else outer.chat(body)
                if isinstance(answer, tuple):
                    self._send(*answer)
                    return
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                if fault == "cut":
                    self.close_connection = True
                self._send(200, {"Content-Type": "application/json"}, data, len(data) // 2 if fault == "cut" else None)

            def _send(self, status: int, headers: dict[str, str], data: bytes, until: int | None = None) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[:until])

            def log_message(self, *words: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 256

            def handle_error(self, request: object, client_address: object) -> None:
                """Clients that hang up are what some tests are about."""

        self._server = Server((host, port), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def requests(self) -> int:
        """Received so far."""
        return len(self.bodies)

    def close(self) -> None:
        self.release.set()
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def openai_server() -> Iterator[OpenAiServer]:
    server = OpenAiServer()
    try:
        yield server
    finally:
        server.close()
