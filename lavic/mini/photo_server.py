"""A web server for a folder's photos, on loopback by default: for the miniature and for benchmarks."""

from __future__ import annotations

import mimetypes
import sys
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from lavic.errors import DataError, LaunchError


class PhotoServer:
    """Serves `folder` over HTTP/1.1 with connections that stay open, from threads of this process.

    with PhotoServer(folder) as server:
        fetch(f"{server.url}/photo.jpg")

    Requests are answered from `__enter__` on.

    Args:
        folder: Folder to serve; files outside it are not served.
        port: 0 takes any free port.
        host: Address to listen on.

    Raises:
        DataError: There is no such folder.
        LaunchError: The port is in use, or the host is not an address of this machine.
    """

    def __init__(self, folder: str | Path, port: int = 0, host: str = "127.0.0.1") -> None:
        self.folder = Path(folder).resolve()
        if not self.folder.is_dir():
            raise DataError(f"{folder}: no such folder of photos")
        handler = type("Handler", (_Handler,), {"folder": self.folder})
        try:
            self._server = _Server((host, port), handler)
        except OSError as error:
            raise LaunchError(
                f"cannot listen on {host}:{port} ({error.strerror}); choose another port or host"
            ) from None
        self.url = f"http://{host}:{self._server.server_address[1]}"

    def __enter__(self) -> PhotoServer:
        threading.Thread(target=self.serve, name="photo-server", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def serve(self) -> None:
        """Answer requests until the process ends or `__exit__`."""
        self._server.serve_forever(poll_interval=0.1)


def serve_forever(folder: str | Path, port: int = 8000, host: str = "127.0.0.1") -> None:
    """Serve a folder until Ctrl-C."""
    server = PhotoServer(folder, port, host)
    print(f"serving {server.folder} at {server.url}; Ctrl-C ends it", flush=True)
    server.serve()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Otherwise each response waits 40 ms for a delayed acknowledgement.
    disable_nagle_algorithm = True
    wbufsize = -1
    timeout = 60
    folder: Path

    def do_GET(self) -> None:
        name = unquote(urlsplit(self.path).path).lstrip("/")
        try:
            path = (self.folder / name).resolve()
            body = path.read_bytes() if path.is_relative_to(self.folder) else None
        except (OSError, ValueError):
            body = None
        self.send_response(HTTPStatus.OK if body is not None else HTTPStatus.NOT_FOUND)
        self.send_header("Content-Type", mimetypes.guess_type(name)[0] or "application/octet-stream")
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body or b"")
        self.wfile.flush()

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Does not print a line per request."""
