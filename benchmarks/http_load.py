"""Load on a recommender's server: clients that wait for each answer, and requests at a fixed rate."""

from __future__ import annotations

import asyncio
import random
import re
import statistics
import time
from collections import Counter
from typing import Any


class Client:
    """A connection that asks one request after the other."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, body: bytes) -> int:
        if self.streams is not None and self.streams[0].at_eof():  # closed by the server while it was idle
            self.close()
        if self.streams is None:
            self.streams = await asyncio.open_connection("127.0.0.1", self.port)
        reader, writer = self.streams
        headers = "POST /v1/recommend HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        writer.write(f"{headers}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        answer = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: (\d+)", answer)
        if length is None:  # Ray's proxy may send chunks
            while (size := int((await reader.readline()).strip() or b"0", 16)) > 0:
                await reader.readexactly(size + 2)
            await reader.readline()
        else:
            await reader.readexactly(int(length[1]))
        if b"connection: close" in answer.lower():
            self.close()
        return int(answer.split(b" ", 2)[1])

    def close(self) -> None:
        if self.streams is not None:
            self.streams[1].close()
            self.streams = None


async def closed_loop(port: int, requests: list[bytes], clients: int, duration: float) -> dict[str, Any]:
    times: list[float] = []
    statuses: Counter[int] = Counter()
    end = time.perf_counter() + duration

    async def run(number: int) -> None:
        client, rng = Client(port), random.Random(number)
        while time.perf_counter() < end:
            asked_at = time.perf_counter()
            statuses[await client.ask(rng.choice(requests))] += 1
            times.append(time.perf_counter() - asked_at)
        client.close()

    start = time.perf_counter()
    await asyncio.gather(*(run(number) for number in range(clients)))
    elapsed = time.perf_counter() - start
    percentiles = statistics.quantiles(times, n=100)
    return {
        "answers_s": statuses[200] / elapsed,
        "p50_ms": 1000 * statistics.median(times),
        "p99_ms": 1000 * percentiles[98],
        "statuses": dict(statuses),
    }


async def open_loop(port: int, requests: list[bytes], rate: float, duration: float) -> dict[str, Any]:
    statuses: Counter[str] = Counter()
    times: list[float] = []
    latest: dict[str, float] = {}
    idle: list[Client] = []
    tasks: set[asyncio.Task[None]] = set()
    rng = random.Random(0)

    async def send() -> None:
        client = idle.pop() if idle else Client(port)
        start = time.perf_counter()
        try:
            status = str(await client.ask(rng.choice(requests)))
        except (OSError, asyncio.IncompleteReadError) as error:
            status = type(error).__name__
            client.close()
        times.append(time.perf_counter() - start)
        latest[status] = max(times[-1], latest.get(status, 0.0))
        statuses[status] += 1
        idle.append(client)

    start = time.perf_counter()
    number = 0
    while (now := time.perf_counter() - start) < duration:
        while number < now * rate:
            task = asyncio.create_task(send())
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            number += 1
        await asyncio.sleep(0.005)
    await asyncio.gather(*tasks)
    for client in idle:
        client.close()
    permilles = statistics.quantiles(times, n=1000)
    return {
        "statuses": dict(statuses),
        "offered_s": number / duration,
        "latest_s": latest,
        "p50_s": statistics.median(times),
        "p999_s": permilles[998],
    }
