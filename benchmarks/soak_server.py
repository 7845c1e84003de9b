"""The server of `soak.py`: small photos, and twelve faults that wander from photo to photo. A process of its own.

    python benchmarks/soak_server.py HOSTS EPOCH_SECONDS

Listens on 127.0.0.1 ... 127.0.0.HOSTS, prints its port, and ends when its stdin does. At any moment each fault has 2 %
of the photos; every EPOCH_SECONDS the faults move to other photos. `/last` returns the last answer to each photo,
`/mend` ends all faults.
"""

from __future__ import annotations

import asyncio
import io
import json
import socket
import sys
import time
from collections import Counter

from PIL import Image

FAULTS: dict[str, str] = {
    "404": "gone",
    "500": "http_error",
    "500 once": "ok",
    "503 with Retry-After once": "ok",
    "body cut short": "truncated",
    "web page": "not_image",
    "slow drip": "too_slow",
    "connection closed": "connect",
    "redirect loop": "http_error",
    "30 MB": "too_big",
    "damaged photo": "truncated",
    "9 KB of headers": "ok",
}
"""The faults, and the outcome of a photo that is answered so to the last."""
ORDER = tuple(FAULTS)
SLOTS = 50
"""A fault has one of so many photos: 2 %."""
_SHIFT = 13
_ODD = "".join(f"Set-Cookie: a{n}={'x' * 80}; Path=/\r\n" for n in range(90))
_RETRY_S = 1


def fault_of(number: int, epoch: int) -> str:
    """The fault of a photo at a time; empty where it has none."""
    slot = (number + epoch * _SHIFT) % SLOTS
    return ORDER[slot] if slot < len(ORDER) else ""


class Server:
    """Answers, and remembers the last answer to each photo."""

    def __init__(self, epoch_s: float) -> None:
        self._began, self._epoch_s = time.monotonic(), epoch_s
        self._mended = False
        self.last: dict[int, str] = {}
        self.answers: Counter[str] = Counter()
        self._once: set[tuple[str, int]] = set()
        out = io.BytesIO()
        Image.effect_noise((64, 64), 60).convert("RGB").save(out, "JPEG", quality=70)
        self._photo = out.getvalue()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while (line := await reader.readline()).startswith(b"GET "):
                while (await reader.readline()).strip():
                    pass
                if not await self._answer(line.split()[1].decode(), writer):
                    break
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _answer(self, path: str, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; returns whether the connection goes on."""
        if path == "/mend":
            self._mended = True
            return _send(writer, b"")
        if path == "/last":
            body = json.dumps({"last": self.last, "answers": self.answers}).encode()
            return _send(writer, body, kind="application/json")
        if not path.startswith("/p/"):
            return _send(writer, b"", status="404 Not Found")
        number = int(path[3:].partition(".")[0])
        fault = "" if self._mended else fault_of(number, int((time.monotonic() - self._began) / self._epoch_s))
        if fault.endswith("once"):
            if (fault, number) in self._once:
                fault = ""
            self._once.add((fault, number))
        self.last[number] = fault
        self.answers[fault] += 1
        return await self._fault(fault, path, self._jpeg(number), writer)

    async def _fault(self, fault: str, path: str, photo: bytes, writer: asyncio.StreamWriter) -> bool:
        if fault == "404":
            return _send(writer, b"no such photo", status="404 Not Found")
        if fault.startswith("500"):
            return _send(writer, b"an error", status="500 Internal Server Error")
        if fault.startswith("503"):
            return _send(writer, b"", status="503 Service Unavailable", more=f"Retry-After: {_RETRY_S}\r\n")
        if fault == "body cut short":
            _send(writer, photo[: len(photo) // 2], length=len(photo))
            return False
        if fault == "web page":
            return _send(writer, b"<!DOCTYPE html><html>Are you a robot?</html>", kind="text/html")
        if fault == "slow drip":
            _send(writer, b"", length=len(photo))
            for byte in photo:
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(0.1)
            return True
        if fault == "connection closed":
            return False
        if fault == "redirect loop":
            return _send(writer, b"", status="302 Found", more=f"Location: {path}\r\n")
        if fault == "30 MB":
            _send(writer, photo, length=30_000_000)
            return False
        if fault == "damaged photo":
            return _send(writer, photo[: len(photo) // 2] + b"\xff\xd9")
        return _send(writer, photo, more=_ODD if fault == "9 KB of headers" else "")

    def _jpeg(self, number: int) -> bytes:
        """Every photo has bytes of its own: its number as a comment."""
        return self._photo[:2] + b"\xff\xfe\x00\x0a" + b"%08d" % number + self._photo[2:]


def _send(
    writer: asyncio.StreamWriter,
    body: bytes,
    *,
    status: str = "200 OK",
    kind: str = "image/jpeg",
    length: int | None = None,
    more: str = "",
) -> bool:
    size = len(body) if length is None else length
    writer.write(f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {size}\r\n{more}\r\n".encode() + body)
    return True


async def main(hosts: int, epoch_s: float) -> None:
    """Serve until stdin ends."""
    server, loop = Server(epoch_s), asyncio.get_running_loop()
    port = 0
    for number in range(1, hosts + 1):
        listener = socket.create_server((f"127.0.0.{number}", port), backlog=512)
        port = listener.getsockname()[1]
        await asyncio.start_server(server.serve, sock=listener, limit=1 << 16)
    print(port, flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), float(sys.argv[2])))
