"""Memory and open files at catalogue size: bytes of an item on a node, whatever the number of processes.

    python benchmarks/memory.py                 measure at 1 and 10 million items, write memory.json and the document
    python benchmarks/memory.py --document      rewrite the tables of docs/benchmarks.md from memory.json
    python benchmarks/memory.py --check         fail where they are not what memory.json says

The catalogue is synthetic: one photo an item, real ledgers, offsets, descriptions and lists of items, in shards of
5,000. The tokens of the store and the photos of all shards but the first are holes in their files, which nothing reads
here. Some processes open the set and the store at the same time, as ranks and their data workers do, and read every
column of the indexes from end to end, every shard's offsets and descriptions, and items by their ids. Their memory is
the increase in total PSS, as Linux counts it: a page that several share counts once.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import document
import numpy as np
from memory_catalogue import FEW, READABLE, SHARD, item_id, make_catalogue

HERE = Path(__file__).parent
DOCUMENT = HERE.parent / "docs" / "benchmarks.md"
RESULT = HERE / "memory.json"
ITEMS = (1_000_000, 10_000_000)
PROCESSES = (1, 4)
LOOKUPS = 20_000
MANY_SHARDS = 10_000
GOAL = 64
"""Bytes of an item on a node."""
TARGET = 48_000_000
RANKS, WORKERS = 8, 8
"""Of the node that is computed: ranks, and data workers of each."""
PARTS = {"photos": "set and plan", "store": "item store"}
"""What is opened: for `distill` and `embed`, and for `tune` and `evaluate`."""


# -- A process that holds a set and a store ---------------------------------------------------------------------------


def hold(folder: Path, warm: Path) -> None:
    """Opens and reads a set, then a store, each when a line comes, and holds both until the next line."""
    for root in (warm, folder):  # first a small one: for what is imported late and does not depend on the size
        parts = []
        for open_part, read in ((open_photos, read_photos), (open_store, read_store)):
            if root is folder:
                sys.stdin.readline()
            start = time.monotonic()
            part = open_part(root)
            open_s = time.monotonic() - start
            parts.append(part)
            lookup_s = read(*part)
            if root is folder:
                pickled_bytes = len(ForkingPickler.dumps(part[0]))
                send({"open_s": open_s, "lookup_s": lookup_s, "sent": pickled_bytes, "shm": mapped_shm()})
        if root is warm:
            send({"ready": True})
    sys.stdin.readline()


def open_photos(folder: Path) -> tuple[Any, ...]:
    """Opens what `distill` and `embed` do: a set without what is held out, and the photos that a store takes."""
    from lavic.data.index.held_out import FilteredDataset, held_out
    from lavic.data.shard_dataset import ShardDataset
    from lavic.shards.store_photos import StorePhotos

    data = ShardDataset(folder / "set")
    train = FilteredDataset(data, held_out(data, ShardDataset(folder / "valid")))
    return train, StorePhotos.of([data], {}, folder / "store")


def open_store(folder: Path) -> tuple[Any, ...]:
    """Opens what `tune` and `evaluate` do."""
    from lavic.model.item_store import ItemStore

    return (ItemStore.open(folder / "store"),)


def read_photos(train: Any, photos: Any) -> float:
    """Reads every column from end to end, every shard, and some samples; seconds of one."""
    data, index = train.data, train.data.index
    total = sum(int(photos.items(number).sum(dtype=np.uint64)) for number in range(len(photos)))
    total += sum(int(column.sum(dtype=np.uint64)) for column in (index.items, index.numbers, index.digests))
    total += sum(map(len, index.keys))
    shards = len(data.manifest.shards)
    readable = int(data.bounds[shards if len(data) <= FEW * shards else min(READABLE, shards)])
    for number, row in enumerate(data.bounds[:-1].tolist()):
        if row < readable:
            assert data[row].text == data.meta_and_text(row)[1] != ""
        else:  # its samples are holes
            data._index(number)
            assert data._text(number, 0, {"key": index.keys[row], "title": "", "source_sha256": ""}, "")
    positions = range(0, min(len(train), readable - 100), 97)
    start = time.perf_counter()
    for position in positions:
        train.meta_and_text(position)
    assert total > 0
    return (time.perf_counter() - start) / max(1, len(positions))


def read_store(store: Any) -> float:
    """Looks up the titles of some items, then reads what a lookup of all would; seconds of one."""
    rng = random.Random(0)
    ids = [item_id(rng.randrange(len(store))) for _ in range(min(LOOKUPS, 10 * len(store)))]
    start = time.perf_counter()
    total = sum(len(store.title(id)) for id in ids)
    lookup_s = (time.perf_counter() - start) / len(ids)
    total += sum(int(store.items._file[name].sum(dtype=np.uint64)) for name in ("hashes", "rows", "starts"))
    assert total > 0
    return lookup_s


def send(message: dict[str, Any]) -> None:
    """A line for whoever started this process."""
    print(json.dumps(message), flush=True)


# -- Measuring --------------------------------------------------------------------------------------------------------


def measure(folder: Path, warm: Path, processes: int) -> dict[str, Any]:
    """What some processes hold that read a set, and then a store, at the same time."""
    import psutil

    command = [sys.executable, __file__, "--hold", str(folder), str(warm)]
    holders = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(processes)
    ]
    try:
        for process in holders:
            read_answer(process)
        monitored = [psutil.Process(process.pid) for process in holders]
        row: dict[str, Any] = {"processes": processes}
        previous = sum(process.memory_full_info().pss for process in monitored)
        for part in PARTS:
            for process in holders:
                let_continue(process)
            answers = [read_answer(process) for process in holders]
            current = sum(process.memory_full_info().pss for process in monitored)
            largest = {name: max(answer[name] for answer in answers) for name in answers[0]}
            row[part], previous = {"node": current - previous, **largest}, current
        row["files"] = max(process.num_fds() for process in monitored)
        return row
    finally:
        for process in holders:
            let_continue(process)
            process.wait(60)


def mapped_shm() -> int:
    """Files in /dev/shm that this process maps."""
    return sum("/dev/shm/" in line for line in Path("/proc/self/maps").read_text().splitlines())


def read_answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The next line of a process.

    Raises:
        SystemExit: It has ended.
    """
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"a process that should hold the catalogue ended with {process.wait()}")
    return json.loads(line)


def let_continue(process: subprocess.Popen[str]) -> None:
    """Lets a process go on."""
    if process.poll() is None:
        process.stdin.write("\n")
        process.stdin.flush()


def run(work: Path, sizes: Sequence[int], processes: Sequence[int], shards: int, shard: int) -> dict[str, Any]:
    """All measurements; the catalogue is removed after each."""
    warm, folder = work / "warm", work / "shards"
    make_catalogue(warm, 100)
    make_catalogue(folder, 2 * shards, 2)
    result: dict[str, Any] = {"shards": {"shards": shards, **measure(folder, warm, 1)}, "sizes": {}}
    shutil.rmtree(folder)
    for items in sizes:
        folder = work / str(items)
        make_catalogue(folder, items, shard)
        start = time.monotonic()
        opened = open_photos(folder), open_store(folder)  # makes the indexes
        del opened
        build_s = time.monotonic() - start
        rows = [measure(folder, warm, number) for number in processes]
        result["sizes"][str(items)] = {"index_s": build_s, "measured": rows}
        shutil.rmtree(folder)
        print(f"{items:,}: {rows}", flush=True)
    return result


# -- Tables -----------------------------------------------------------------------------------------------------------


def per_item(result: dict[str, Any], part: str) -> dict[int, float]:
    """Bytes of an item on a node for each number of processes, between the smallest and the largest size."""
    sizes = sorted(result["sizes"], key=int)
    small, large = (result["sizes"][size]["measured"] for size in (sizes[0], sizes[-1]))
    growth = int(sizes[-1]) - int(sizes[0])
    return {b["processes"]: (b[part]["node"] - a[part]["node"]) / growth for a, b in zip(small, large, strict=True)}


def shared_and_each(result: dict[str, Any], part: str) -> tuple[float, float]:
    """Bytes of an item that all processes share, and those in each process."""
    slopes = per_item(result, part)
    few, many = min(slopes), max(slopes)
    each = max(0.0, (slopes[many] - slopes[few]) / (many - few))
    return slopes[few] - few * each, each


def on_node(result: dict[str, Any], part: str) -> float:
    """Bytes of an item on the node that is computed."""
    shared, each = shared_and_each(result, part)
    return shared + RANKS * (1 + WORKERS) * each


def index_s(result: dict[str, Any]) -> float:
    """Seconds to put an item into the indexes, at the largest size."""
    largest = max(result["sizes"], key=int)
    return result["sizes"][largest]["index_s"] / int(largest)


def measured_table(result: dict[str, Any]) -> Iterator[Sequence[str]]:
    yield "items", "processes", *(f"{name}, on the node" for name in PARTS.values()), "opened in", "indexes made in"
    for items, size in sorted(result["sizes"].items(), key=lambda entry: int(entry[0])):
        for row in size["measured"]:
            node = [f"{row[part]['node'] / 1e6:.0f} MB" for part in PARTS]
            opened = " and ".join(f"{row[part]['open_s']:.1f} s" for part in PARTS)
            yield f"{int(items):,}", str(row["processes"]), *node, opened, f"{size['index_s']:.0f} s"


def target_table(result: dict[str, Any]) -> Iterator[Sequence[str]]:
    processes = RANKS * (1 + WORKERS)
    yield f"bytes of an item, {processes} processes", *PARTS.values()
    split_up = {part: shared_and_each(result, part) for part in PARTS}
    yield "shared by all", *(f"{shared:.1f}" for shared, _ in split_up.values())
    yield f"in each, shards of {SHARD:,}", *(f"{each:.3f}" for _, each in split_up.values())
    yield "on the node", *(f"{s:.1f} + {processes} x {e:.3f} = {s + processes * e:.1f}" for s, e in split_up.values())
    yield "goal", *(str(GOAL) for _ in PARTS)
    yield f"{TARGET / 1e6:.0f} million items", *(f"{TARGET * on_node(result, part) / 1e9:.1f} GB" for part in PARTS)


def files_table(result: dict[str, Any]) -> Iterator[Sequence[str]]:
    rows = [row for size in result["sizes"].values() for row in size["measured"]]
    yield "", ""
    yield f"open files of a process, {result['shards']['shards']:,} shards", str(result["shards"]["files"])
    for part, name in PARTS.items():
        yield f"bytes sent to a data worker that is not forked: {name}", str(max(row[part]["sent"] for row in rows))
    yield "a title by its item's id, fastest row", f"{1e6 * min(row['store']['lookup_s'] for row in rows):.0f} us"


TABLES = {"memory, measured": measured_table, "memory, 48 million": target_table, "memory, files": files_table}


def main(argv: Sequence[str]) -> int:
    """Measures, or writes or checks the document; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, nargs="+", default=ITEMS, help="sizes, at least two")
    parser.add_argument("--processes", type=int, nargs="+", default=PROCESSES, help="processes at the same time")
    parser.add_argument("--shards", type=int, default=MANY_SHARDS, help="shards with which open files are counted")
    parser.add_argument("--shard", type=int, default=SHARD, help="photos of a shard")
    parser.add_argument("--work", type=Path, help="an empty folder with room for 1.2 kB an item")
    parser.add_argument("--json", type=Path, help="write what was measured here, and leave the document alone")
    parser.add_argument("--document", action="store_true", help="measure nothing; rewrite the tables of the document")
    parser.add_argument("--check", action="store_true", help="measure nothing; fail where the document differs")
    parser.add_argument("--hold", type=Path, nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args(argv)
    if chosen.hold:
        hold(*chosen.hold)
        return 0
    if not chosen.document and not chosen.check:
        with tempfile.TemporaryDirectory(dir=chosen.work, prefix="memory-") as work:
            os.environ["LAVIC_CACHE"] = str(Path(work) / "cache")
            os.fsync = lambda _: None  # nothing that is written here is to outlive a crash
            result = run(Path(work), chosen.items, chosen.processes, chosen.shards, chosen.shard)
        (chosen.json or RESULT).write_text(json.dumps(result, indent=1) + "\n", "utf-8")
        if chosen.json:
            return 0
    result = json.loads(RESULT.read_text("utf-8"))
    tables = {name: table(result) for name, table in TABLES.items()}
    hint = f"what {RESULT.name} says; run {Path(__file__).name} --document"
    return document.update(DOCUMENT, tables, check=chosen.check, hint=hint)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
