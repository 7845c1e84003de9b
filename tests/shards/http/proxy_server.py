"""A small HTTP proxy on loopback: absolute-form requests and CONNECT tunnels, with or without credentials."""

from __future__ import annotations

import select
import socket
import socketserver
import threading
from base64 import b64encode
from urllib.parse import urlsplit


class ProxyServer:
    """Forwards requests and records them.

    Args:
        user: `name:password` that it requires; empty for none.
    """

    def __init__(self, user: str = "") -> None:
        self.requests: list[str] = []
        """Absolute links of forwarded requests and `CONNECT host:port`, in order."""
        self.heads: list[str] = []
        """Heads of these requests as received."""
        expected = f"Basic {b64encode(user.encode()).decode()}" if user else ""
        outer = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                try:
                    while head := self._read_head():
                        if not self._answer(head):
                            return
                except OSError:
                    return

            def _read_head(self) -> list[bytes]:
                lines = []
                while (line := self.rfile.readline()) and line.strip():
                    lines.append(line)
                return lines

            def _answer(self, head: list[bytes]) -> bool:
                method, target, _ = head[0].decode("latin-1").split()
                outer.heads.append(b"".join(head).decode("latin-1"))
                outer.requests.append(f"CONNECT {target}" if method == "CONNECT" else target)
                headers = dict(line.decode("latin-1").strip().split(": ", 1) for line in head[1:])
                if expected and headers.get("Proxy-Authorization") != expected:
                    self.wfile.write(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
                    return False
                if method == "CONNECT":
                    host, _, port = target.rpartition(":")
                    with socket.create_connection((host.strip("[]"), int(port))) as upstream:
                        self.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
                        _tunnel(self.request, upstream)
                    return False
                parts = urlsplit(target)
                path = target.partition("://")[2].partition("/")[2]
                with socket.create_connection((parts.hostname or "", parts.port or 80)) as upstream:
                    kept = [line for line in head[1:] if not line.lower().startswith((b"proxy-", b"connection"))]
                    upstream.sendall(
                        b"".join([f"GET /{path} HTTP/1.1\r\n".encode(), *kept, b"Connection: close\r\n\r\n"])
                    )
                    while data := upstream.recv(65536):
                        self.wfile.write(data)
                return False

        class Server(socketserver.ThreadingTCPServer):
            allow_reuse_address = daemon_threads = True

            def handle_error(self, request: object, client_address: object) -> None:
                """Clients and servers that hang up."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _tunnel(client: socket.socket, upstream: socket.socket) -> None:
    while True:
        for ready in select.select([client, upstream], [], [], 10.0)[0] or (None,):
            if ready is None or not (data := ready.recv(65536)):
                return
            (upstream if ready is client else client).sendall(data)
