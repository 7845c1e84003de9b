"""What one host sees of all workers together: the rate it was promised, and silence when it asks for it.

    python benchmarks/politeness.py --workers 4 --rate 100 --seconds 20 --json politeness.json

Ray workers, each with connections of its own and one budget for all, fetch from a server on loopback that notes when
every request arrives. First at the budget's rate; then the server answers 429 with Retry-After for a while, each
worker finds out or is told; then the rate comes back, slowly.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

REST_S = 4.0
NOTICE_S = 0.1
"""Requests that were on their way when the server first said 429 are not early; this long."""


def serve(pipe: Connection, rest_at: float) -> None:
    """Answer until told to stop; then tell when requests came, and when the first 429 was sent."""
    from aiohttp import web

    times: list[float] = []
    rest: list[float] = []
    body = bytes(2000)

    async def answer(request: web.Request) -> web.Response:
        if request.path == "/robots.txt":
            return web.Response(status=404)
        now = time.monotonic()
        times.append(now)
        if rest_at and now - times[0] > rest_at and (not rest or now < rest[0] + REST_S):
            rest.append(now)
            # Rounded up: the header knows whole seconds only.
            return web.Response(status=429, headers={"Retry-After": str(int(rest[0] + REST_S - now) + 1)})
        return web.Response(body=body, content_type="image/jpeg")

    async def run() -> None:
        app = web.Application()
        app.router.add_get("/{path:.*}", answer)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        pipe.send(runner.addresses[0][1])
        while not pipe.poll():
            await asyncio.sleep(0.05)
        await runner.cleanup()

    asyncio.run(run())
    pipe.send((times, rest))


def work(url: str, coordinator: Any, rate: float, seconds: float) -> int:
    """One worker: fetch as fast as it is let, for so long."""
    from lavic.shards.http.fetch_settings import FetchSettings
    from lavic.shards.http.fetcher import Fetcher

    settings = FetchSettings(allow_private=True, host_rate=rate, host_connections=32)

    async def run() -> int:
        until = time.monotonic() + seconds
        fetched = 0
        async with Fetcher(settings, coordinator) as fetcher:

            async def one(lane: int) -> None:
                nonlocal fetched
                while time.monotonic() < until:
                    await fetcher.fetch(f"{url}/{lane}/{fetched}.jpg")
                    fetched += 1

            await asyncio.gather(*(one(lane) for lane in range(16)))
        return fetched

    return asyncio.run(run())


def measure(workers: int, rate: float, seconds: float, rest_at: float) -> tuple[list[float], list[float]]:
    """Seconds since the first request of every request, and of every 429."""
    import ray

    from lavic.shards.http.fetch_settings import FetchSettings
    from lavic.shards.ratelimit.coordinator import RayCoordinator

    here, there = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(there, rest_at), daemon=True)
    server.start()
    url = f"http://127.0.0.1:{here.recv()}"
    coordinator = RayCoordinator(FetchSettings(host_rate=rate, host_connections=32).limits)
    ray.get([ray.remote(num_cpus=0)(work).remote(url, coordinator, rate, seconds) for _ in range(workers)])
    here.send("stop")
    times, rest = here.recv()
    server.join()
    times.sort()
    return [at - times[0] for at in times], [at - times[0] for at in rest]


def main() -> None:
    """Run both parts and print what the server counted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--rate", type=float, default=100.0)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--json", type=str)
    chosen = parser.parse_args()

    from lavic.distributed.ray_session import RaySettings, ray_session

    with ray_session(RaySettings(cpus=2)):
        times, _ = measure(chosen.workers, chosen.rate, chosen.seconds, 0.0)
        # Steady: all workers are there, and none has left.
        first, last = 2.0, chosen.seconds - 3.0
        counted = sum(first <= at < last for at in times) / (last - first)
        print(f"{chosen.workers} workers, budget {chosen.rate:g}/s: {counted:.2f}/s, {counted / chosen.rate - 1:+.1%}")

        rest_at = 5.0
        seconds = rest_at + REST_S + 25.0
        times, rest = measure(chosen.workers, chosen.rate, seconds, rest_at)
    early = [at for at in times if rest[0] + NOTICE_S < at < rest[0] + REST_S]
    back = next(at for at in times if at > rest[0] + NOTICE_S)
    print(f"429 at {rest[0]:.2f} s, Retry-After {REST_S:g} s: {len(rest)} requests were under way, {len(early)} early")
    print(f"the next request came {back - rest[0]:.2f} s after it")
    after = [sum(back + n <= at < back + n + 5 for at in times) / 5 for n in range(0, 20, 5)]
    print(f"requests a second from then on, by five seconds: {', '.join(f'{one:.0f}' for one in after)}")
    if chosen.json:
        figures = {"rate": counted, "budget": chosen.rate, "under_way": len(rest), "early": len(early), "after": after}
        figures |= {"next": back - rest[0], "workers": chosen.workers}
        Path(chosen.json).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
