"""The scan of `lavic reddit` against other ways to read a dump, its memory as the dump grows, and two workers.

    python benchmarks/reddit.py --folder /tmp/bench-reddit          # writes its dumps there and prints a table
    python benchmarks/reddit.py --folder /tmp/bench-reddit --only speed memory workers

Speed is of processor time in one process, the best of `--repeats` runs, the ways in turn, so that another load of the
machine hits all of them. The comments have the fields of Arctic Shift's (about 1,750 bytes a line); one in 300 links to
an item of the catalogue, and one in 100 names Amazon without a link.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from lavic.data.reddit.dumps.post import id_of

LINKING, NAMING = 300, 100
THREAD = 8
"""Comments of a thread."""
TEXT = (
    "the of and a to in is it you that was for on are with as his they at be this from have or by had not but what all "
    "were when we there can an your which their said if do will each about how up out them then she many some so these "
    "would other into has more her two like him see time could no make than first been its who now people my made over "
    "did down only way find use may water long little very after words called just where most know razor blade soap "
    "cream brush shave skin dry oily size prize"
)
WORDS = TEXT.split()


def comment_lines(count: int, seed: int = 0, first: int = 0) -> Iterator[bytes]:
    """Lines of a dump of comments."""
    draw = random.Random(seed)
    bodies = [" ".join(draw.choices(WORDS, k=draw.randint(3, 60))) for _ in range(5000)]
    empty = {f"field_of_reddit_{n}": None for n in range(28)}
    for n in range(first, first + count):
        body = draw.choice(bodies)
        if n % LINKING == 0:
            body += f" https://www.amazon.com/dp/B0{draw.randrange(1000):08d}"
        elif n % NAMING == 0:
            body += " I bought it on Amazon."
        link, id = id_of(1_000_000_000 + n // THREAD), id_of(60_000_000_000 + n)
        row = {
            "all_awardings": [],
            "approved_at_utc": None,
            "associated_award": None,
            "author": f"user{draw.randrange(1_000_000)}",
            "author_flair_richtext": [],
            "author_fullname": f"t2_{id_of(draw.randrange(1 << 36))}",
            "body": body,
            "can_gild": False,
            "collapsed_reason_code": None,
            "controversiality": 0,
            "created_utc": 1_700_000_000 + n,
            "distinguished": None,
            "edited": False,
            "gildings": {},
            "id": id,
            "is_submitter": False,
            "link_id": f"t3_{link}",
            "locked": False,
            "mod_reports": [],
            "name": f"t1_{id}",
            "parent_id": f"t3_{link}",
            "permalink": f"/r/wicked_edge/comments/{link}/a_question_about_shaving/{id}/",
            "retrieved_on": 1_700_200_000 + n,
            "score": draw.randrange(1, 50),
            "send_replies": True,
            "stickied": False,
            "subreddit": "wicked_edge",
            "subreddit_id": "t5_2s46m",
            "subreddit_name_prefixed": "r/wicked_edge",
            "subreddit_type": "public",
            "unrepliable_reason": None,
            "updated_on": 1_700_300_000 + n,
            "_meta": {"retrieved_2nd_on": 1_700_300_000 + n, "is_edited": False},
            **empty,
        }
        yield json.dumps(row, separators=(",", ":")).encode() + b"\n"


def write_dump(path: Path, count: int, seed: int = 0, first: int = 0) -> None:
    """Writes a dump as it is published: one frame, `zstd --long=31`-like window, level 3."""
    import zstandard

    if path.exists():
        return
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=27, enable_ldm=True)
    part = path.with_suffix(".part")
    with part.open("wb") as file, zstandard.ZstdCompressor(compression_params=parameters).stream_writer(file) as packed:
        for line in comment_lines(count, seed, first):
            packed.write(line)
    part.rename(path)


def catalogue(folder: Path) -> Path:
    """Tables of the catalogue."""
    from lavic.data.reddit.item_table import ItemTable, merge_catalogue, read_catalogue

    table = folder / "table"
    if not ItemTable.is_complete(table):
        table.mkdir(parents=True, exist_ok=True)
        meta = folder / "meta.jsonl"
        rows = ({"parent_asin": f"B0{n:08d}", "title": f"Item {n}", "images": []} for n in range(1000))
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
    write_dump(path, comments)
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


def peak_mib(command: list[str]) -> float:
    """Most memory of a command and its children, in MiB."""
    code = (
        "import resource, subprocess, sys; code = subprocess.call(sys.argv[1:]); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024, file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(done.stderr.splitlines()[-1])


def memory(folder: Path, sizes: list[int]) -> dict[int, float]:
    """Peak memory of the whole command's largest process as the dump grows."""
    catalogue(folder)
    peaks = {}
    print("\nMemory of the largest process of `lavic reddit`, one worker")
    for size in sizes:
        comments, threads = folder / f"memory-{size}.zst", folder / f"threads-{size}.zst"
        write_dump(comments, size)
        write_submissions(threads, size)
        out = folder / f"out-{size}"
        began = time.monotonic()
        command = [sys.executable, "-m", "lavic", "reddit", "--dumps", str(comments), str(threads)]
        command += [
            "--items",
            str(folder / "meta.jsonl"),
            "--out",
            str(out),
            "--executor",
            "local",
            "--ray.workers",
            "1",
        ]
        peaks[size] = peak_mib(command)
        rows = json.loads((out / "funnel.json").read_text())["comments"]["kept"]
        print(
            f"{size:12,} comments  {peaks[size]:8.0f} MiB  {rows:8,} conversations  {time.monotonic() - began:6.0f} s"
        )
        subprocess.run(["rm", "-rf", str(out), str(comments), str(threads)], check=True)
    return peaks


def write_submissions(path: Path, comments: int) -> None:
    """Writes the submissions of so many comments."""
    import zstandard

    draw = random.Random(1)
    with path.open("wb") as file, zstandard.ZstdCompressor(level=3).stream_writer(file) as packed:
        for n in range(comments // THREAD + 1):
            row = {
                "id": id_of(1_000_000_000 + n),
                "title": " ".join(draw.choices(WORDS, k=8)),
                "selftext": " ".join(draw.choices(WORDS, k=30)),
                "author": f"asker{n}",
                "created_utc": 1_700_000_000 + n * THREAD,
                "score": 3,
                "subreddit": "wicked_edge",
            }
            packed.write(json.dumps(row, separators=(",", ":")).encode() + b"\n")


def workers(folder: Path, comments: int, repeats: int) -> dict[int, float]:
    """Seconds of the scan of four files with one worker and with two, after they have started."""
    from lavic.distributed.ray_session import RaySettings
    from lavic.shards.cluster.tasks import run_tasks
    from lavic.shards.reddit_build.steps import FileTask, scan_step

    table = catalogue(folder)
    paths = []
    for n in range(4):
        paths.append(folder / f"part-{n}-{comments}.zst")
        write_dump(paths[-1], comments, seed=n, first=n * comments)
    best: dict[int, float] = {}
    for repeat in range(repeats):
        for count in (1, 2):
            # The first task of each worker is a tiny file, after which the clock starts.
            (folder / "scan").mkdir(exist_ok=True)
            tiny = folder / "tiny.zst"
            write_dump(tiny, 10)
            tasks = [
                FileTask(path=str(path), out=folder / "scan" / f"{repeat}-{count}-{n}", kind="dump", table=table)
                for n, path in enumerate([tiny] * count + paths)
            ]
            ended = [0.0]
            for n, _ in enumerate(run_tasks(scan_step, tasks, RaySettings(workers=count), on_ray=False), 1):
                if n == count:
                    began = time.monotonic()
                ended[0] = time.monotonic()
            best[count] = min(best.get(count, 1e9), ended[0] - began)
    print(f"\nFour files of {comments:,} comments, wall clock without start-up, best of {repeats}")
    print(f"1 worker {best[1]:.2f} s   2 workers {best[2]:.2f} s   {best[1] / best[2]:.2f} x")
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
    print(f"\npeak of this process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
