"""Small real crawls of a server whose delays are known, beside the simulation of the same: behind `--check`.

The server answers photo n after `seconds_of(crawl, n)`, at most `serves` a second, and notes when. Start-up is left
out on both sides: time counts from the first request to the last answer. What a shard costs this machine beside its
answers is not for the model to know: it is taken from the first crawl, and the others are told by it.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from aiohttp import web
from crawl_simulation import Crawl, seconds_of, simulate
from PIL import Image

SMALL = Crawl(photos=600, shard=100, workers=2, concurrency=4, latency=0.15, back_s=0.0, check_s=0.003)

CHECKS: dict[str, Crawl] = {
    "every answer alike": SMALL,
    "answers that differ": replace(SMALL, spread=0.6, latency=0.12),
    "stragglers": replace(SMALL, stragglers=0.02, straggler_s=2.5, latency=0.1),
    "a budget of 30 requests a second": replace(SMALL, rate=30.0, latency=0.05, concurrency=16),
    "a host that gives 30 answers a second": replace(SMALL, serves=30.0, latency=0.05, concurrency=16),
    "a worker killed after 6 s": replace(SMALL, nodes=2, losses=((6.0, 1),)),
}


@dataclass
class Seen:
    """What the server saw."""

    requests: int = 0
    first: float = 0.0
    last: float = 0.0


def check() -> list[dict[str, Any]]:
    """Prints simulated and real seconds of each case; returns them."""
    rows: list[dict[str, Any]] = []
    beside = 0.0
    print(f"{'case':<42}{'simulated':>10}{'real':>10}{'off':>8}{'requests':>14}")
    for name, crawl in CHECKS.items():
        seen = real(crawl)
        seconds = seen.last - seen.first
        if not rows:
            shards = crawl.photos / crawl.shard / crawl.workers
            beside = max(0.0, seconds - simulate(crawl).seconds) / (shards - 1)
            print(f"a shard costs {beside:.2f} s beside its answers")
        wanted = simulate(replace(crawl, start_s=beside))
        off = wanted.seconds / seconds - 1
        requests = f"{wanted.requests} / {seen.requests}"
        print(f"{name:<42}{wanted.seconds:>8.1f} s{seconds:>8.1f} s{off:>+8.1%}{requests:>14}", flush=True)
        rows.append(
            {
                "case": name,
                "simulated_s": wanted.seconds,
                "real_s": seconds,
                "simulated_requests": wanted.requests,
                "real_requests": seen.requests,
            }
        )
    return rows


def real(crawl: Crawl) -> Seen:
    """Runs `lavic crawl` as the case says."""
    with tempfile.TemporaryDirectory(prefix="crawl-check-") as name, _serving(crawl) as (url, seen):
        folder = Path(name)
        items = folder / "meta.jsonl"
        with items.open("w") as lines:
            for number in range(crawl.photos):
                link = [{"large": f"{url}/{number}.jpg", "variant": "MAIN"}]
                lines.write(json.dumps({"parent_asin": f"B{number:09d}", "title": "x", "images": link}) + "\n")
        words = ["crawl", "--items", str(items), "--out", str(folder / "out"), "--image-size", "large"]
        words += ["--photos-per-shard", str(crawl.shard), "--ray.workers", str(crawl.workers)]
        words += ["--executor", "ray", "--ray.cpus", str(crawl.workers), "--fetch.concurrency", str(crawl.concurrency)]
        words += ["--fetch.allow-private", "--fetch.host-rate", str(crawl.rate if crawl.rate < 1e9 else 0)]
        words += ["--fetch.host-connections", str(crawl.connections if crawl.connections < 1 << 30 else 0)]
        with (folder / "log").open("w+") as log:
            started = subprocess.Popen([sys.executable, "-m", "lavic", *words], stdout=log, stderr=log)
            for second, _ in crawl.losses:
                _kill_one_worker(started, seen, second)
            if started.wait(300):
                log.seek(0)
                raise SystemExit(f"lavic {' '.join(words)}:\n{log.read()[-2000:]}")
        return seen


def _kill_one_worker(crawling: subprocess.Popen[bytes], seen: Seen, second: float) -> None:
    """Kills one of the crawl's Ray workers, so many seconds after the first request."""
    while not seen.first and crawling.poll() is None:
        time.sleep(0.02)
    time.sleep(max(0.0, seen.first + second - time.monotonic()))
    workers = sorted(number for number, title in _below(crawling.pid) if title.startswith("ray::Map"))
    if not workers:
        raise SystemExit(f"no Ray worker at work below process {crawling.pid}")
    os.kill(workers[-1], signal.SIGKILL)


def _below(root: int) -> list[tuple[int, str]]:
    """Processes started by one, at any depth: number and title."""
    parents: dict[int, int] = {}
    titles: dict[int, str] = {}
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                stat = (place / "stat").read_text()
                parents[int(place.name)] = int(stat.rpartition(")")[2].split()[1])
                titles[int(place.name)] = (place / "cmdline").read_bytes().decode(errors="replace").strip("\0")
    found, look = [], [root]
    while look:
        above = look.pop()
        below = [number for number, parent in parents.items() if parent == above]
        found += [(number, titles.get(number, "")) for number in below]
        look += below
    return found


@contextlib.contextmanager
def _serving(crawl: Crawl) -> Iterator[tuple[str, Seen]]:
    """The web of a case, in a thread of this process."""
    seen, ready, loop = Seen(), threading.Event(), asyncio.new_event_loop()
    photo = io.BytesIO()
    Image.effect_noise((64, 64), 80).convert("RGB").save(photo, "JPEG")
    door = 0.0
    port: list[int] = []

    async def answer(request: web.Request) -> web.Response:
        nonlocal door
        name = request.match_info["name"]
        if not name.endswith(".jpg"):
            raise web.HTTPNotFound  # robots.txt
        now = time.monotonic()
        seen.requests += 1
        seen.first = seen.first or now
        at = max(now, door)
        door = at + 1 / crawl.serves
        await asyncio.sleep(at - now + seconds_of(crawl, int(name.removesuffix(".jpg"))))
        seen.last = time.monotonic()
        return web.Response(body=photo.getvalue(), content_type="image/jpeg")

    async def serve() -> None:
        app = web.Application()
        app.router.add_get("/{name}", answer)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port.append(runner.addresses[0][1])
        ready.set()

    def work() -> None:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(serve())
        loop.run_forever()

    threading.Thread(target=work, daemon=True).start()
    ready.wait(10)
    try:
        yield f"http://127.0.0.1:{port[0]}", seen
    finally:
        loop.call_soon_threadsafe(loop.stop)
