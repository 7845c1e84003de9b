"""Photos for the crawl's benchmarks, and an nginx on loopback that serves them and notes when.

The photos are crops of one synthetic canvas of waves and noise, 500 x 500 pixels and about 48 KB, every one different.
Photo n is the same wherever it is made, and is made once: a folder that holds them already is taken as it is.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 500
_CANVAS = 2048
_FOLDER = 1000
"""Photos in one folder."""
_BLOCK = 500
"""Photos drawn by one task."""

_CONF = """
{user}
worker_processes 1;
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log warn;
events {{ worker_connections 4096; }}
http {{
  log_format when '$msec $status $body_bytes_sent';
  access_log {folder}/access.log when buffer=256k flush=200ms;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  types {{ image/jpeg jpg; }}
  sendfile on;
  tcp_nopush on;
  keepalive_requests 1000000;
  server {{
    listen 127.0.0.1:{port} backlog=1024 reuseport;
    root {root};
    location = /robots.txt {{ access_log off; return 404; }}
  }}
}}
"""


@dataclass(frozen=True)
class Span:
    """What a server noted of one crawl."""

    photos: int
    """Whole photos sent."""
    failed: int
    """Answers with another status."""
    first: float
    """When the first photo was sent, in seconds since the epoch."""
    last: float

    @property
    def rate(self) -> float:
        """Photos a second from the first to the last."""
        return (self.photos - 1) / max(1e-9, self.last - self.first)


class PhotoServer:
    """A running nginx; see `serving`."""

    def __init__(self, url: str, log: Path, process: subprocess.Popen[bytes]) -> None:
        self.url, self.pid = url, process.pid
        self._log, self._process = log, process
        self._read = 0

    def links(self, photos: int) -> list[str]:
        """The address of every photo."""
        return [f"{self.url}/{name(n)}" for n in range(photos)]

    def span(self) -> Span:
        """What was sent since this was last asked."""
        time.sleep(0.5)
        with self._log.open() as lines:
            lines.seek(self._read)
            rows = [line.split() for line in lines]
            self._read = lines.tell()
        sent = [float(when) for when, status, _ in rows if status == "200"]
        if not sent:
            raise SystemExit(f"the server sent no photo: {len(rows)} requests; see {self._log.parent / 'error.log'}")
        return Span(len(sent), len(rows) - len(sent), min(sent), max(sent))


def name(number: int) -> str:
    """Where photo `number` stands under the folder and under the server's address."""
    return f"{number // _FOLDER:03d}/{number:06d}.jpg"


def make_photos(folder: Path, photos: int) -> None:
    """Draw the photos that the folder does not hold yet, and read all of them once, to have them in memory."""
    made = folder / "photos.json"
    have = json.loads(made.read_text())["photos"] if made.exists() else 0
    if have < photos:
        print(f"drawing {photos - have:,} photos into {folder} ...", flush=True)
        for number in (*range(have, photos, _FOLDER), photos - 1):
            (folder / name(number)).parent.mkdir(parents=True, exist_ok=True)
        blocks = [range(at, min(at + _BLOCK, photos)) for at in range(have, photos, _BLOCK)]
        with ProcessPoolExecutor() as pool:
            list(pool.map(_draw, [folder] * len(blocks), blocks))
        made.write_text(json.dumps({"photos": photos}))
        os.sync()
    for number in range(photos):
        (folder / name(number)).read_bytes()


def catalogue(path: Path, links: Sequence[str]) -> Path:
    """Write a catalogue in the form of Amazon Reviews 2023 with one photo an item."""
    with path.open("w") as file:
        for n, link in enumerate(links):
            images = [{"hi_res": None, "large": link, "thumb": None, "variant": "MAIN"}]
            file.write(json.dumps({"parent_asin": f"B{n:09d}", "title": f"Item {n}", "images": images}) + "\n")
    return path


@contextmanager
def serving(root: Path) -> Iterator[PhotoServer]:
    """Serve a folder by an nginx of our own, as the user that runs this and with its files in a temporary folder.

    Raises:
        SystemExit: nginx is not installed or does not start.
    """
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if program is None:
        raise SystemExit("nginx is missing: this measures against a real web server; apt-get install nginx-light")
    with tempfile.TemporaryDirectory(prefix="lavic-nginx-") as temporary:
        folder = Path(temporary)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        conf = folder / "nginx.conf"
        # Started by root, nginx hands its work to a user who may not get at the photos, unless it is told who.
        user = "user root root;" if os.geteuid() == 0 else ""
        conf.write_text(_CONF.format(user=user, folder=folder, port=port, root=root.resolve()))
        process = subprocess.Popen(
            [program, "-p", str(folder), "-e", str(folder / "error.log"), "-c", str(conf)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            _await(process, port, folder / "error.log")
            yield PhotoServer(f"http://127.0.0.1:{port}", folder / "access.log", process)
        finally:
            process.terminate()
            process.wait(10)


def _await(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    for _ in range(100):
        if process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                return
            except OSError:
                time.sleep(0.1)
    said = log.read_text().strip().splitlines() if log.exists() else []
    raise SystemExit(f"nginx does not start: {said[-1] if said else 'it says nothing'}")


@lru_cache(maxsize=1)
def _canvas() -> Image.Image:
    random = np.random.default_rng(0)
    y, x = np.mgrid[0:_CANVAS, 0:_CANVAS].astype(np.float32) / _CANVAS
    waves = np.zeros((_CANVAS, _CANVAS, 3), np.float32)
    for band in range(3):
        for _ in range(12):
            across, down, phase = random.uniform(-20, 20), random.uniform(-20, 20), random.uniform(0, 6.28)
            waves[..., band] += np.sin(6.28 * (across * x + down * y) + phase)
    waves = (waves - waves.min()) / np.ptp(waves) * 200 + 25
    return Image.fromarray((waves + random.normal(0, 10, waves.shape)).clip(0, 255).astype(np.uint8))


def _draw(folder: Path, numbers: range) -> None:
    for number in numbers:
        left, top = np.random.default_rng(number).integers(0, _CANVAS - SIDE, 2).tolist()
        out = io.BytesIO()
        _canvas().crop((left, top, left + SIDE, top + SIDE)).save(out, "JPEG", quality=80)
        (folder / name(number)).write_bytes(out.getvalue())
