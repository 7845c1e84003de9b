"""The synthetic catalogue of `memory.py`: a set with one photo an item, and an item store.

Ledgers, offsets, descriptions and lists of items are real. What nothing reads is a hole in its file: the photos of all
shards but the first, and the tokens of the store.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

SHARD = 5000
"""Photos of a shard, as in configs/crawl-amazon-2023.yaml."""
READABLE = 80
"""Shards with samples that can be read; of the others the first header is there."""
FEW = 10
"""Photos of a shard up to which all shards can be read."""
WIDTH, VIEWS = 1024, 5
JPG = bytes(400)
_TEXT = "A red mug of glazed stoneware with a wide handle, photographed from the side against a plain grey background."


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


def make_catalogue(folder: Path, items: int, per_shard: int = SHARD) -> None:
    """A set, a small one to validate with, and a store."""
    make_set(folder / "set", items, per_shard)
    make_set(folder / "valid", 10)
    make_store(folder / "store", items, per_shard)
