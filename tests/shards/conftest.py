"""A web server on loopback that does what servers do wrong, and catalogues that link to it."""

from __future__ import annotations

import io
import json
import socket
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SIZE = (64, 48)


def drawn(mode: str = "RGB") -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", SIZE, "blue")
    image.paste("red", (0, 0, SIZE[0] // 2, SIZE[1]))
    return image.convert(mode)


def encoded(image: Image.Image, format: str = "JPEG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it is huge."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def make_photos() -> dict[str, bytes]:
    turned = Image.Exif()
    turned[0x0112] = 6
    clear = drawn("RGBA")
    clear.putpixel((0, 0), (0, 0, 0, 0))
    jpeg = encoded(Image.blend(drawn(), Image.effect_noise(SIZE, 80).convert("RGB"), 0.3), quality=90)
    return {
        "plain.jpg": jpeg,
        "grey.jpg": encoded(drawn("L")),
        "rotated.jpg": encoded(drawn().transpose(Image.Transpose.ROTATE_90), exif=turned),
        "bad-exif.jpg": encoded(drawn(), exif=b"Exif\0\0II*\0\xff\xff\xff\xff broken"),
        "clear.png": encoded(clear, "PNG"),
        "palette.gif": encoded(drawn("P"), "GIF"),
        "animated.gif": encoded(drawn(), "GIF", save_all=True, append_images=[Image.new("RGB", SIZE, "green")]),
        "animated.webp": encoded(drawn(), "WEBP", save_all=True, append_images=[Image.new("RGB", SIZE, "green")]),
        "cmyk.jpg": encoded(drawn("CMYK")),
        "deep.png": encoded(Image.fromarray(np.full((48, 64), 0x8000, np.uint16)), "PNG"),
        "cut.jpg": jpeg[: len(jpeg) * 2 // 3],
        "cut.png": encoded(Image.effect_noise(SIZE, 50), "PNG")[:400],
        "bomb.png": png_header(50_000, 50_000),
        "page.jpg": b"<!DOCTYPE html><html>Robot check</html>",
        "empty.jpg": b"",
        "drawing.jpg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "apple.jpg": b"\x00\x00\x00\x18ftypheic" + bytes(40),
        "big.jpg": jpeg + bytes(3_000_000),
    }


PHOTOS = make_photos()


class FaultServer:
    """Serves `PHOTOS`, any number of `/n/<number>.jpg`, and faults by name; counts requests by path."""

    def __init__(self) -> None:
        self.requests: Counter[str] = Counter()
        self.agents: set[str] = set()
        self.connections: set[object] = set()
        self.broken = False
        self.delay = 0.0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True
            wbufsize = -1

            def do_GET(self) -> None:
                outer.connections.add(self.client_address)
                outer.agents.add(self.headers["User-Agent"])
                outer.requests[self.path] += 1
                time.sleep(outer.delay)
                outer.answer(self, self.path.removeprefix("/"))

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, to: BaseHTTPRequestHandler, path: str) -> None:
        first, _, rest = path.partition("/")
        if self.broken and first == "n" and int(rest.partition(".")[0]) % 3 == 0:
            send(to, 500)
        elif first == "n":
            number = int(rest.partition(".")[0])
            send(to, 200, encoded(Image.new("RGB", (16, 16), (number % 256, number // 256 % 256, 99))))
        elif path in PHOTOS:
            send(to, 200, PHOTOS[path])
        elif first == "status":
            send(to, int(rest))
        elif first == "flaky":
            status = int(rest)
            send(to, status if self.requests[to.path] < 3 else 200, PHOTOS["plain.jpg"], {"Retry-After": "0"})
        elif first == "patience":
            send(to, 429 if self.requests[to.path] < 2 else 200, PHOTOS["plain.jpg"], {"Retry-After": "1"})
        elif first == "moved":
            send(to, 302, headers={"Location": "/plain.jpg"})
        elif first == "loop":
            send(to, 302, headers={"Location": "/loop"})
        elif first == "to-file":
            send(to, 302, headers={"Location": "file:///etc/passwd"})
        elif first == "short":
            send(to, 200, PHOTOS["plain.jpg"], {"Content-Length": "99999"})
            to.close_connection = True
        elif first == "slow":
            time.sleep(3)
            send(to, 200, PHOTOS["plain.jpg"])
        elif first in ("drip", "endless"):
            pour(to, b"x" * (1 if first == "drip" else 100_000), 0.1 if first == "drip" else 0.0)
        elif first == "hang-up":
            to.connection.shutdown(socket.SHUT_RDWR)
            to.close_connection = True
        else:
            send(to, 404)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that are killed or that hang up are what the tests are about."""


def send(to: BaseHTTPRequestHandler, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
    to.send_response(status)
    for name, value in {"Content-Type": "image/jpeg", "Content-Length": str(len(body)), **(headers or {})}.items():
        to.send_header(name, value)
    to.end_headers()
    to.wfile.write(body)
    to.wfile.flush()


def pour(to: BaseHTTPRequestHandler, piece: bytes, pause: float) -> None:
    to.send_response(200)
    to.send_header("Transfer-Encoding", "chunked")
    to.end_headers()
    try:
        for _ in range(100_000):
            to.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
            to.wfile.flush()
            time.sleep(pause)
    except OSError:
        to.close_connection = True


@pytest.fixture
def server() -> Iterator[FaultServer]:
    running = FaultServer()
    yield running
    running.close()


@pytest.fixture
def photos() -> dict[str, bytes]:
    return PHOTOS


@pytest.fixture
def catalogue(tmp_path: Path, server: FaultServer) -> Callable[..., Path]:
    """Writes an Amazon-like catalogue of one photo per path of the server."""

    def write(*paths: str, name: str = "meta.jsonl") -> Path:
        rows = [
            {"parent_asin": f"B{n:05d}", "title": f"Item {n}", "images": [{"large": f"{server.url}/{path}"}]}
            for n, path in enumerate(paths)
        ]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / name

    return write
