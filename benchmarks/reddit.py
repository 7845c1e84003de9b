"""The scan of `lavic reddit` against other ways to read a dump, its memory as the dump grows, and two workers.

    python benchmarks/reddit.py --folder /tmp/bench-reddit          # writes its dumps there and prints a table
    python benchmarks/reddit.py --folder /tmp/bench-reddit --only speed memory workers

Speed is of processor time in one process, the best of `--repeats` runs, the ways in turn, so that another load of the
machine hits all of them. `reddit_dump.py` says what the comments are like.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import meter
from reddit_dump import ITEMS, comment_lines, submission_lines, write_dump


def catalogue(folder: Path) -> Path:
    """Tables of the catalogue."""
    from lavic.data.reddit.item_table import ItemTable, merge_catalogue, read_catalogue

    table = folder / "table"
    if not ItemTable.is_complete(table):
        table.mkdir(parents=True, exist_ok=True)
        meta = folder / "meta.jsonl"
        rows = ({"parent_asin": f"B0{n:08d}", "title": f"Item {n}", "images": []} for n in range(ITEMS))
        meta.write_text("".join(json.dumps(row) + "\n" for row in rows))
        read_catalogue(str(meta), table / "a")
        merge_catalogue(table, [table / "a"], [])
    return table


def every_line(path: Path, loads: Callable[[bytes], dict]) -> int:
    """zstandard, and a parser on every line."""
    import zstandard

    from lavic.data.links import asins

    hits = 0
    with path.open("rb") as file:
        reader = zstandard.ZstdDecompressor(max_window_size=2**31).stream_reader(file)
        rest = b""
        while piece := reader.read(1 << 20):
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                body = loads(line)["body"]
                if "amazon" in body and asins(body):
                    hits += 1
    return hits


def with_orjson(path: Path, folder: Path) -> int:
    """(a)"""
    import orjson

    return every_line(path, orjson.loads)


def with_json(path: Path, folder: Path) -> int:
    """(b)"""
    return every_line(path, json.loads)


def decompression(path: Path, folder: Path) -> int:
    """(c) The limit."""
    import zstandard

    with path.open("rb") as file:
        reader = zstandard.ZstdDecompressor(max_window_size=2**31).stream_reader(file)
        while reader.read(1 << 20):
            pass
    return -1


def scan(path: Path, folder: Path) -> int:
    """The scan of `lavic reddit`."""
    from lavic.data.reddit.dumps.scan import scan_dump
    from lavic.data.reddit.item_table import ItemTable

    counts, _ = scan_dump(str(path), folder / "hits", ItemTable(catalogue(folder)))
    return counts["comment_with_an_item"]


WAYS = {
    "lavic reddit, scan": scan,
    "(a) zstandard + orjson, every line": with_orjson,
    "(b) zstandard + json, every line": with_json,
    "(c) zstandard, decompression alone": decompression,
}


def speed(folder: Path, comments: int, repeats: int) -> dict[str, float]:
    """Comments per second of processor time of each way."""
    path = folder / f"speed-{comments}.zst"
    write_dump(path, comment_lines(comments))
    catalogue(folder)
    best = dict.fromkeys(WAYS, 0.0)
    hits = {}
    for _ in range(repeats):
        for name, way in WAYS.items():
            began = time.process_time()
            hits[name] = way(path, folder)
            best[name] = max(best[name], comments / (time.process_time() - began))
    counts = {count for count in hits.values() if count >= 0}
    assert len(counts) == 1, f"the ways find different comments: {hits}"
    scanned = best["lavic reddit, scan"]
    print(f"\nSpeed, {comments:,} comments, {counts.pop():,} with an item, processor time, best of {repeats}")
    for name, rate in best.items():
        print(f"{name:38} {rate:12,.0f} comments/s   scan is {scanned / rate:5.2f} x")
    return best


def memory(folder: Path, sizes: list[int]) -> dict[int, float]:
    """Peak memory of the whole command, all its processes together, as the dump grows."""
    catalogue(folder)
    peaks = {}
    print("\nMemory of `lavic reddit`, one worker, all its processes together (PSS)")
    for size in sizes:
        comments, threads, out = folder / f"memory-{size}.zst", folder / f"threads-{size}.zst", folder / f"out-{size}"
        write_dump(comments, comment_lines(size))
        write_dump(threads, submission_lines(size))
        command = [sys.executable, "-m", "lavic", "reddit", "--dumps", comments, threads, "--out", out]
        command += ["--items", folder / "meta.jsonl", "--executor", "local", "--ray.workers", "1"]
        used = meter.run([str(word) for word in command], folder / "memory.log")
        peaks[size] = used.peak / (1 << 20)
        rows = json.loads((out / "funnel.json").read_text())["comments"]["kept"]
        print(f"{size:12,} comments  {peaks[size]:8.0f} MiB  {rows:8,} conversations  {used.wall:6.0f} s", flush=True)
        shutil.rmtree(out)
        comments.unlink()
        threads.unlink()
    return peaks


@dataclass(frozen=True)
class Ready:
    """Keeps a worker until all of them have started."""

    folder: Path
    name: str
    count: int


def work(task: Any) -> None:
    """What a worker does: waits for the others, decompresses a file, or scans one."""
    from lavic.shards.reddit_build.steps import scan_step

    if isinstance(task, Ready):
        (task.folder / task.name).touch()
        while len(list(task.folder.iterdir())) < task.count:
            time.sleep(0.005)
    elif isinstance(task, Path):
        decompression(task, task.parent)
    else:
        scan_step(task)


def workers(folder: Path, comments: int, repeats: int) -> dict[tuple[str, int], float]:
    """Seconds that four files take one worker and two, after these have started."""
    from lavic.distributed.ray_session import RaySettings
    from lavic.shards.cluster.tasks import run_tasks
    from lavic.shards.reddit_build.steps import FileTask

    table = catalogue(folder)
    paths = [folder / f"part-{n}-{comments}.zst" for n in range(4)]
    for n, path in enumerate(paths):
        write_dump(path, comment_lines(comments, seed=n, first=n * comments))
    scans = [FileTask(path=str(path), out=folder / f"hits-{path.stem}", kind="dump", table=table) for path in paths]
    ways: dict[str, Sequence[Any]] = {"scan": scans, "decompression alone": paths}
    best: dict[tuple[str, int], float] = {}
    for _ in range(repeats):
        for name, tasks in ways.items():
            for count in (1, 2):
                ready = Path(tempfile.mkdtemp(dir=folder))
                waits = [Ready(ready, str(n), count) for n in range(count)]
                results = run_tasks(work, [*waits, *tasks], RaySettings(workers=count), on_ray=False)
                for _ in waits:
                    next(results)
                began = time.monotonic()
                for _ in results:
                    pass
                best[name, count] = min(best.get((name, count), 1e9), time.monotonic() - began)
                shutil.rmtree(ready)
    print(f"\nFour files of {comments:,} comments, wall clock without start-up, best of {repeats}")
    for name in ways:
        alone, both = best[name, 1], best[name, 2]
        print(f"{name:38} 1 worker {alone:6.2f} s   2 workers {both:6.2f} s   {alone / both:5.2f} x")
    return best


def main() -> None:
    """Runs the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument(
        "--only", nargs="+", choices=("speed", "memory", "workers"), default=("speed", "memory", "workers")
    )
    parser.add_argument("--comments", type=int, default=300_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    chosen = parser.parse_args()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    print(f"python {sys.version.split()[0]}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    if "speed" in chosen.only:
        speed(chosen.folder, chosen.comments, chosen.repeats)
    if "workers" in chosen.only:
        workers(chosen.folder, chosen.comments, chosen.repeats)
    if "memory" in chosen.only:
        memory(chosen.folder, chosen.sizes)


if __name__ == "__main__":
    main()
