"""A web server on loopback that does what servers do wrong, each fault under a path of its own."""

from __future__ import annotations

import gzip
import io
import socket
import ssl
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image, ImageCms

SIZE = (64, 48)


def drawn(mode: str = "RGB") -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", SIZE, "blue")
    image.paste("red", (0, 0, SIZE[0] // 2, SIZE[1]))
    return image.convert(mode)


def make_noise() -> Image.Image:
    """The same every time, with something in every coefficient."""
    values = np.random.default_rng(0).normal(128, 40, (12, 16, 3)).clip(0, 255).astype(np.uint8)
    return Image.fromarray(values).resize(SIZE)


def encoded(image: Image.Image, format: str = "JPEG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def png(width: int, height: int, data: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of 8-bit RGB, with compressed pixels and further chunks as they are given."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    more = b"".join(chunk(*part) for part in chunks)
    return b"\x89PNG\r\n\x1a\n" + header + more + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def nested(size: int) -> bytes:
    """`size` MiB of zeros, compressed."""
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(size)) + packer.flush()


def huge_jpeg() -> bytes:
    """A real JPEG whose header says 50,000 x 50,000."""
    data = bytearray(encoded(drawn()))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", 50_000, 50_000)
    return bytes(data)


def swapped_profile() -> bytes:
    """sRGB with its red and blue exchanged: a profile that nobody can overlook."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    tags = {}
    for n in range(struct.unpack(">I", profile[128:132])[0]):
        name, at, size = struct.unpack(">4sII", profile[132 + 12 * n : 144 + 12 * n])
        tags[name] = (at, size)
    red, blue = tags[b"rXYZ"], tags[b"bXYZ"]
    part, other = bytes(profile[red[0] : sum(red)]), bytes(profile[blue[0] : sum(blue)])
    profile[red[0] : sum(red)], profile[blue[0] : sum(blue)] = other, part
    return bytes(profile)


def make_photos() -> dict[str, bytes]:
    turned = Image.Exif()
    turned[0x0112] = 6
    clear = drawn("RGBA")
    clear.putpixel((0, 0), (0, 0, 0, 0))
    noise = Image.effect_noise(SIZE, 80).convert("RGB")
    jpeg = encoded(Image.blend(drawn(), noise, 0.3), quality=90)
    frames = [Image.new("RGB", SIZE, (0, n % 256, n // 256)) for n in range(1200)]
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return {
        "plain.jpg": jpeg,
        "progressive.jpg": encoded(Image.blend(drawn(), noise, 0.3), progressive=True),
        "grey.jpg": encoded(drawn("L")),
        "srgb.jpg": encoded(drawn(), icc_profile=srgb),
        "bad-profile.jpg": encoded(drawn(), icc_profile=b"no profile"),
        "profile.jpg": encoded(
            Image.merge("RGB", drawn().split()[::-1]), icc_profile=swapped_profile(), quality=95, subsampling=0
        ),
        "rotated.jpg": encoded(drawn().transpose(Image.Transpose.ROTATE_90), exif=turned),
        "bad-exif.jpg": encoded(drawn(), exif=b"Exif\0\0II*\0\xff\xff\xff\xff broken"),
        "clear.png": encoded(clear, "PNG"),
        "palette.gif": encoded(drawn("P"), "GIF"),
        "palette.png": encoded(drawn().quantize(4), "PNG", transparency=0),
        "animated.gif": encoded(drawn(), "GIF", save_all=True, append_images=frames[:900:600]),
        "animated.webp": encoded(drawn(), "WEBP", save_all=True, append_images=frames[:900:600]),
        "frames.gif": encoded(drawn(), "GIF", save_all=True, append_images=frames),
        "cmyk.jpg": encoded(drawn("CMYK")),
        "deep.png": encoded(Image.fromarray(np.full((48, 64), 0x8000, np.uint16)), "PNG"),
        "cut.jpg": jpeg[: len(jpeg) * 2 // 3],
        "cut-and-closed.jpg": jpeg[: len(jpeg) * 2 // 3] + b"\xff\xd9",
        "cut.png": encoded(Image.effect_noise(SIZE, 50), "PNG")[:400],
        "bomb.png": png(50_000, 50_000, zlib.compress(bytes(100))),
        "bomb.jpg": huge_jpeg(),
        "zip-bomb.png": png(20_000, 20_000, nested(200)),
        "text-bomb.png": png(64, 48, zlib.compress(bytes(48 * 193)), (b"zTXt", b"Comment\0\0" + nested(100))),
        "page.jpg": b"<!DOCTYPE html><html>Robot check</html>",
        "empty.jpg": b"",
        "drawing.jpg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "apple.jpg": b"\x00\x00\x00\x18ftypheic" + bytes(40),
        "big.jpg": jpeg + bytes(3_000_000),
        "tall.png": encoded(Image.new("L", (40, 65_600)), "PNG"),
        "dot.gif": encoded(Image.new("P", (1, 1)), "GIF"),
        "stand-in.jpg": encoded(Image.new("RGB", (40, 40), "grey")),
    }


PHOTOS = make_photos()


class FaultServer:
    """Serves `PHOTOS`, any number of `/n/<number>.jpg`, and faults by name; counts requests by path.

    Args:
        tls: Speak https with this context.
        port: By default any that is free.
    """

    def __init__(self, tls: ssl.SSLContext | None = None, port: int = 0) -> None:
        self.requests: Counter[str] = Counter()
        """But for robots.txt."""
        self.times: list[float] = []
        self.agents: set[str] = set()
        self.connections: set[object] = set()
        self.robots: tuple[int, bytes] = (404, b"")
        self.robots_first: list[tuple[int, bytes]] = []
        """Answers before those."""
        self.robots_headers: dict[str, str] = {}
        self.robots_asked = 0
        self.broken = False
        self.fails: Callable[[int], int] = lambda number: 0
        """The status of `/n/<number>.jpg`; 0 is a photo, 1 no answer."""
        self.delay = 0.0
        self.elsewhere = ""
        """Where `/away` redirects to."""
        self.rest_until = 0.0
        """By `time.monotonic`: until then every request is answered 429 with a Retry-After."""
        self.busy = self.most_busy = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True
            wbufsize = -1

            def do_GET(self) -> None:
                with outer._lock:
                    outer.times.append(time.monotonic())
                    outer.busy += 1
                    outer.most_busy = max(outer.busy, outer.most_busy)
                outer.connections.add(self.client_address)
                outer.agents.add(self.headers["User-Agent"])
                if self.path != "/robots.txt":
                    outer.requests[self.path] += 1
                    time.sleep(outer.delay)
                # Before the answer: who has it may send the next request before this thread goes on.
                with outer._lock:
                    outer.busy -= 1
                if self.path == "/robots.txt":
                    outer.robots_asked += 1
                    if self.headers["Accept"].startswith("image/"):
                        return send(self, 406)
                    robots = outer.robots_first.pop(0) if outer.robots_first else outer.robots
                    return send(self, *robots, outer.robots_headers)
                return outer.answer(self, self.path.removeprefix("/"))

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = _Server(("127.0.0.1", port), Handler, tls)
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, to: BaseHTTPRequestHandler, path: str) -> None:
        first, _, rest = path.partition("/")
        photo = PHOTOS["plain.jpg"]
        if (left := self.rest_until - time.monotonic()) > 0:
            send(to, 429, headers={"Retry-After": str(int(left) + 1)})
        elif self.broken and first == "n" and int(rest.partition(".")[0]) % 3 == 0:
            send(to, 500)
        elif first == "n" and (status := self.fails(int(rest.partition(".")[0]))):
            hang_up(to) if status == 1 else send(to, status)
        elif first == "n":
            number = int(rest.partition(".")[0])
            send(to, 200, encoded(Image.new("RGB", (32, 32), (number % 256, number // 256 % 256, 99))))
        elif path in PHOTOS:
            send(to, 200, PHOTOS[path])
        elif first == "status":
            send(to, int(rest), b"an error's page")
        elif first == "flaky":
            send(to, int(rest) if self.requests[to.path] < 3 else 200, photo, {"Retry-After": "0"})
        elif first == "patience":
            send(to, 429 if self.requests[to.path] < 2 else 200, photo, {"Retry-After": rest or "1"})
        elif first == "tagged":
            send(to, 200, photo, {"X-Robots-Tag": rest.replace("+", " ")})
        elif first == "reserved":
            send(to, 200, photo, {"TDM-Reservation": "1"})
        elif first == "moved":
            send(to, 302, headers={"Location": "/plain.jpg"})
        elif first == "away":
            send(to, 302, headers={"Location": self.elsewhere})
        elif first == "loop":
            send(to, 302, headers={"Location": "/loop"})
        elif first == "to-file":
            send(to, 302, headers={"Location": "file:///etc/passwd"})
        elif first == "to-secrets":
            send(to, 302, headers={"Location": "http://169.254.169.254/latest/meta-data"})
        elif first == "to-private":
            send(to, 302, headers={"Location": "http://10.20.30.40/x.jpg"})
        elif first == "short":
            send(to, 200, photo, {"Content-Length": "99999"})
            to.close_connection = True
        elif first == "long":
            send(to, 200, photo, {"Content-Length": str(len(photo) // 2)})
        elif first == "packed":
            send(to, 200, gzip.compress(photo), {"Content-Encoding": "gzip"})
        elif first == "packed-bomb":
            send(to, 200, gzip.compress(bytes(30_000_000)), {"Content-Encoding": "gzip"})
        elif first == "slow":
            time.sleep(3)
            send(to, 200, photo)
        elif first in ("drip", "endless"):
            pour(to, b"x" * (1 if first == "drip" else 100_000), 0.1 if first == "drip" else 0.0)
        elif first == "hang-up":
            hang_up(to)
        else:
            send(to, 404)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, address: tuple[str, int], handler: type, tls: ssl.SSLContext | None) -> None:
        super().__init__(address, handler)
        self._tls = tls

    def finish_request(self, request: socket.socket, client_address: object) -> None:
        # In the request's own thread: a handshake that fails must not stop the others.
        if self._tls:
            request = self._tls.wrap_socket(request, server_side=True)
        super().finish_request(request, client_address)

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that are killed or that hang up are what the tests are about."""


def send(to: BaseHTTPRequestHandler, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
    to.send_response(status)
    for name, value in {"Content-Type": "image/jpeg", "Content-Length": str(len(body)), **(headers or {})}.items():
        to.send_header(name, value)
    to.end_headers()
    to.wfile.write(body)
    to.wfile.flush()


def hang_up(to: BaseHTTPRequestHandler) -> None:
    to.connection.shutdown(socket.SHUT_RDWR)
    to.close_connection = True


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
