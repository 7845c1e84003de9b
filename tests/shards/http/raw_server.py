"""A web server on loopback that sends given bytes, for responses that no correct server writes."""

from __future__ import annotations

import socket
import socketserver
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

Answer = bytes | Sequence[bytes | Callable[[], object]]


class RawServer:
    """Answers each request target with fixed bytes; 404 where it has none.

    The connection stays open after an answer unless the target is in `closing` or the client asked to close it. A
    value may be a list of pieces, which are sent one at a time; between them, functions of the list are called.

    Args:
        answers: Bytes by request target, such as `{"/a.jpg": b"HTTP/1.1 200 OK\\r\\n..."}`.
        closing: Targets after whose answer the server closes the connection.
    """

    def __init__(self, answers: Mapping[str, Answer], closing: frozenset[str] = frozenset()) -> None:
        self.answers = dict(answers)
        self.closing = set(closing)
        self.targets: list[str] = []
        """Request targets as received, in order, without robots.txt."""
        self.headers: list[dict[str, str]] = []
        """Headers of each of these requests, names in lower case."""
        self.robots_headers: list[dict[str, str]] = []
        """Of requests for robots.txt."""
        self.connections = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(socketserver.StreamRequestHandler):
            disable_nagle_algorithm = True

            def handle(self) -> None:
                with outer._lock:
                    outer.connections += 1
                try:
                    while first := self.rfile.readline():
                        headers = {}
                        while line := self.rfile.readline().strip():
                            name, _, value = line.decode("latin-1").partition(":")
                            headers[name.lower()] = value.strip()
                        if not self._answer(first.split()[1].decode("latin-1"), headers):
                            return
                except OSError:
                    return

            def _answer(self, target: str, headers: dict[str, str]) -> bool:
                with outer._lock:
                    if target == "/robots.txt":
                        outer.robots_headers.append(headers)
                    else:
                        outer.targets.append(target)
                        outer.headers.append(headers)
                answer = outer.answers.get(target, b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
                for piece in [answer] if isinstance(answer, bytes) else answer:
                    if isinstance(piece, bytes):
                        self.wfile.write(piece)
                        self.wfile.flush()
                    else:
                        piece()
                if target not in outer.closing:
                    return True
                self.request.shutdown(socket.SHUT_RDWR)
                return False

        class Server(socketserver.ThreadingTCPServer):
            allow_reuse_address = daemon_threads = True
            request_queue_size = 256

            def handle_error(self, request: object, client_address: object) -> None:
                """Some tests close connections early."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def requests(self) -> Counter[str]:
        """Number of requests by target."""
        return Counter(self.targets)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def raw_server(answers: Mapping[str, Answer], closing: frozenset[str] = frozenset()) -> Iterator[RawServer]:
    running = RawServer(answers, closing)
    try:
        yield running
    finally:
        running.close()


def answer(
    body: bytes, *lines: bytes, status: bytes = b"HTTP/1.1 200 OK", length: bool = True, end: bytes = b"\r\n"
) -> bytes:
    """A response with the given header lines.

    Args:
        body: Follows the head as it is.
        lines: Header lines without their ends.
        status: The first line.
        length: Add the right Content-Length.
        end: Ends each line of the head.
    """
    head = [status, *lines, *([b"Content-Length: %d" % len(body)] if length else [])]
    return b"".join(line + end for line in head) + end + body
