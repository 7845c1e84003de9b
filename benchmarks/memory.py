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
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
DOCUMENT = HERE.parent / "docs" / "benchmarks.md"
RESULT = HERE / "memory.json"
SHARD = 5000
"""Photos of a shard, as in configs/crawl-amazon-2023.yaml."""
READABLE = 80
"""Shards with samples that can be read; of the others the first header is there."""
FEW = 10
"""Photos of a shard up to which all shards can be read."""
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
WIDTH, VIEWS = 1024, 5
JPG = bytes(400)
_TEXT = "A red mug of glazed stoneware with a wide handle, photographed from the side against a plain grey background."


# -- The catalogue ----------------------------------------------------------------------------------------------------


def item_id(number: int) -> str:
    """An id like those of Amazon, in no order."""
    return "B" + f"{number * 2_654_435_761 % 36**9:09X}"[-9:]


def make_set(folder: Path, items: int, per_shard: int = SHARD) -> None:
    """A set of one photo for each item."""
    from lavic.data.descriptions import descriptions_path
    from lavic.data.ledger import ledger_path
    from lavic.data.manifest import Manifest, ShardEntry, shard_name
    from lavic.data.tar_shards import Sample, index_path
    from lavic.data.tar_writer import ShardWriter, pack_offsets

    folder.mkdir(parents=True)
    entries = []
    for number, start in enumerate(range(0, items, per_shard)):
        path = folder / shard_name("memory", "train", number)
        count = min(per_shard, items - start)
        ids = [item_id(row) for row in range(start, start + count)]
        digests = [hashlib.sha256(id.encode()).hexdigest() for id in ids]
        if number < READABLE or per_shard <= FEW:
            with ShardWriter(path) as shard:
                for id, digest in zip(ids, digests, strict=True):
                    shard.add(
                        Sample.of(
                            item_id=id, n=0, jpg=JPG, title=f"Item {id}", width=1, height=1,
                            source_sha256=digest, sha256=digest,
                        )
                    )  # fmt: skip
            size = shard.bytes
        else:
            offsets = [2560 * row for row in range(count + 1)]
            size = -(-(offsets[-1] + 1024) // 10240) * 10240
            with path.open("wb") as file:
                file.write(f"{ids[0]}_0.jpg".encode().ljust(512, b"\0"))
                file.truncate(size)
            index_path(path).write_bytes(pack_offsets(offsets))
        rows = (
            f'{{"key": "{id}_0", "item_id": "{id}", "n": 0, "url": "http://127.0.0.1/{id}.jpg", "kind": "ok", '
            f'"http": 200, "attempts": 1, "bytes": 48000, "sha256": "{digest}"}}\n'
            for id, digest in zip(ids, digests, strict=True)
        )
        ledger_path(path).write_text("".join(rows), "utf-8")
        rows = (
            f'{{"key": "{id}_0", "text": "{id}: {_TEXT}", "model": "m", "weights": "w", "prompt": "1", '
            '"views": "five", "dtype": "", "max_new_tokens": "128"}\n'
            for id in ids
        )
        descriptions_path(path).write_text("".join(rows), "utf-8")
        entries.append(ShardEntry(name=path.name, samples=count, bytes=size, sha256=digests[0]))
    Manifest(folder=folder, set="memory", split="train", shards=tuple(entries)).save()


def make_store(folder: Path, items: int, per_part: int = SHARD) -> None:
    """An item store without its index: lists of items, and tokens that are holes."""
    from lavic.model.item_store import Part, StoreManifest

    folder.mkdir(parents=True)
    parts = []
    for start in range(0, items, per_part):
        name, count = hashlib.sha256(str(start).encode()).hexdigest()[:16], min(per_part, items - start)
        rows = (
            f'{{"id": "{id}", "key": "{id}_0", "title": "{f"Item {id}".ljust(70, ".")}"}}\n'
            for id in map(item_id, range(start, start + count))
        )
        lines = "".join(rows).encode()
        (folder / f"items-{name}.jsonl").write_bytes(lines)
        size = count * VIEWS * WIDTH * 2
        tokens = {"dtype": "F16", "shape": [count, VIEWS, WIDTH], "data_offsets": [0, size]}
        header = json.dumps({"tokens": tokens}).encode()
        header += b" " * (-len(header) % 8)
        with (folder / f"tokens-{name}.safetensors").open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + size)
        parts.append(Part(name=name, items=count, sha256="0" * 64, items_sha256=hashlib.sha256(lines).hexdigest()))
    manifest = StoreManifest(
        base="memory", fingerprint="0" * 16, vision_adapter=None, geometry={"views": VIEWS}, width=WIDTH,
        parts=tuple(parts),
    )  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(asdict(manifest)), "utf-8")


# -- A process that holds a set and a store ---------------------------------------------------------------------------


def hold(folder: Path, warm: Path) -> None:
    """Opens and reads a set, then a store, each when a line comes, and holds both until the next line."""
    for place in (warm, folder):  # first a small one: for what is imported late and does not depend on the size
        kept = []
        for open_part, read in ((open_photos, read_photos), (open_store, read_store)):
            if place is folder:
                sys.stdin.readline()
            began = time.monotonic()
            part = open_part(place)
            opened = time.monotonic() - began
            kept.append(part)
            took = read(*part)
            if place is folder:
                sent = len(ForkingPickler.dumps(part[0]))
                say({"open_s": opened, "lookup_s": took, "sent": sent, "shm": mapped_shm()})
        if place is warm:
            say({"ready": True})
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
            assert data._text(number, 0, {"key": index.keys[row], "title": ""}, "")
    places = range(0, min(len(train), readable - 100), 97)
    began = time.perf_counter()
    for place in places:
        train.meta_and_text(place)
    assert total > 0
    return (time.perf_counter() - began) / max(1, len(places))


def read_store(store: Any) -> float:
    """Looks up the titles of some items, then reads what a lookup of all would; seconds of one."""
    choice = random.Random(0)
    wanted = [item_id(choice.randrange(len(store))) for _ in range(min(LOOKUPS, 10 * len(store)))]
    began = time.perf_counter()
    total = sum(len(store.title(id)) for id in wanted)
    took = (time.perf_counter() - began) / len(wanted)
    total += sum(int(store.items._file[name].sum(dtype=np.uint64)) for name in ("hashes", "rows", "starts"))
    assert total > 0
    return took


def say(what: dict[str, Any]) -> None:
    """A line for whoever started this process."""
    print(json.dumps(what), flush=True)


# -- Measuring --------------------------------------------------------------------------------------------------------


def measure(folder: Path, warm: Path, processes: int) -> dict[str, Any]:
    """What some processes hold that read a set, and then a store, at the same time."""
    import psutil

    command = [sys.executable, __file__, "--hold", str(folder), str(warm)]
    started = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(processes)
    ]
    try:
        for process in started:
            hear(process)
        watched = [psutil.Process(process.pid) for process in started]
        row: dict[str, Any] = {"processes": processes}
        before = sum(process.memory_full_info().pss for process in watched)
        for part in PARTS:
            for process in started:
                tell(process)
            answers = [hear(process) for process in started]
            after = sum(process.memory_full_info().pss for process in watched)
            largest = {name: max(answer[name] for answer in answers) for name in answers[0]}
            row[part], before = {"node": after - before, **largest}, after
        row["files"] = max(process.num_fds() for process in watched)
        return row
    finally:
        for process in started:
            tell(process)
            process.wait(60)


def mapped_shm() -> int:
    """Files in /dev/shm that this process maps."""
    return sum("/dev/shm/" in line for line in Path("/proc/self/maps").read_text().splitlines())


def hear(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The next line of a process.

    Raises:
        SystemExit: It has ended.
    """
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"a process that should hold the catalogue ended with {process.wait()}")
    return json.loads(line)


def tell(process: subprocess.Popen[str]) -> None:
    """Lets a process go on."""
    if process.poll() is None:
        process.stdin.write("\n")
        process.stdin.flush()


def catalogue(folder: Path, items: int, per_shard: int = SHARD) -> None:
    """A set, a small one to validate with, and a store."""
    make_set(folder / "set", items, per_shard)
    make_set(folder / "valid", 10)
    make_store(folder / "store", items, per_shard)


def run(work: Path, sizes: Sequence[int], processes: Sequence[int], shards: int, shard: int) -> dict[str, Any]:
    """All measurements; the catalogue is removed after each."""
    warm, folder = work / "warm", work / "shards"
    catalogue(warm, 100)
    catalogue(folder, 2 * shards, 2)
    result: dict[str, Any] = {"shards": {"shards": shards, **measure(folder, warm, 1)}, "sizes": {}}
    shutil.rmtree(folder)
    for items in sizes:
        folder = work / str(items)
        catalogue(folder, items, shard)
        began = time.monotonic()
        kept = open_photos(folder), open_store(folder)  # makes the indexes
        del kept
        made = time.monotonic() - began
        rows = [measure(folder, warm, number) for number in processes]
        result["sizes"][str(items)] = {"index_s": made, "measured": rows}
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


def split(result: dict[str, Any], part: str) -> tuple[float, float]:
    """Bytes of an item that all processes share, and those in each process."""
    slopes = per_item(result, part)
    few, many = min(slopes), max(slopes)
    each = max(0.0, (slopes[many] - slopes[few]) / (many - few))
    return slopes[few] - few * each, each


def on_node(result: dict[str, Any], part: str) -> float:
    """Bytes of an item on the node that is computed."""
    shared, each = split(result, part)
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
    split_up = {part: split(result, part) for part in PARTS}
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


def rendered(text: str, result: dict[str, Any]) -> str:
    """The document with its tables computed."""
    for name, table in TABLES.items():
        head, *body = table(result)
        rows = "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body))
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        text, places = re.subn(pattern, lambda match, rows=rows: match[1] + rows + "\n" + match[2], text, flags=re.S)
        if places != 1:
            raise SystemExit(f"{DOCUMENT}: wants one place for the table '{name}', has {places}")
    return text


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
    before = DOCUMENT.read_text("utf-8")
    after = rendered(before, json.loads(RESULT.read_text("utf-8")))
    if not chosen.check:
        DOCUMENT.write_text(after, "utf-8")
    elif before != after:
        print(f"{DOCUMENT}: its tables are not what {RESULT.name} says; run {Path(__file__).name} --document")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
