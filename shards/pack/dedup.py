"""The last step of a set whose equal photos are stored once: which photo keeps its bytes, and which refer to it.

The bytes are known when every shard is whole. Then the first photo of the plan with certain bytes keeps them, whatever
came in first; the tars that hold others are written again without them. A step that is cut short is taken up again.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from lavic.data.duplicates import Reference, read_references, write_references
from lavic.data.manifest import ShardEntry
from lavic.data.tar_shards import ShardWriter, index_path
from lavic.errors import LavicError
from lavic.shards.pack.existing_shard import Stored
from lavic.shards.pack.outcomes import Outcome, read_ledger
from lavic.shards.pack.seal import Seal, pack_seal, seal_path
from lavic.shards.plan.crawl_plan import Plan
from lavic.shards.plan.external_dedup import Repeats, mark_of
from lavic.storage.atomic import write_whole

Owner = tuple[str, str]
"""Key of the photo that keeps the bytes, and the name of its tar."""


def refer(plan: Plan, seals: Sequence[Seal]) -> list[Seal]:
    """Bring every shard to the form in which equal bytes are stored once; gives all seals.

    Raises:
        LavicError: A photo's bytes are lost with the shard that held them; the next run fetches them again.
    """
    return [
        _settled(plan.shard(number), seal, owners)
        for (number, seal), owners in zip(enumerate(seals), _owners(plan, len(seals)), strict=True)
    ]


def _owners(plan: Plan, shards: int) -> Iterator[dict[str, Owner]]:
    """For each shard the photos that refer, and to whom. Held are 8 bytes a photo, and the photos referred to."""
    with tempfile.TemporaryDirectory(prefix="lavic-") as scratch:
        marks = Repeats(Path(scratch) / "marks")
        for _, row in _stored_rows(plan, range(shards)):
            marks.add(mark_of(row.sha256))
        firsts = marks.firsts()
        wanted = {int(first) for number, first in enumerate(firsts) if first != number}
        owners: dict[int, tuple[str, str, str]] = {}
        count = 0
        for number in range(shards):
            found: dict[str, Owner] = {}
            for shard, row in _stored_rows(plan, [number]):
                if count in wanted:
                    owners[count] = (row.key, shard.name, row.sha256)
                elif (first := int(firsts[count])) != count:
                    key, name, sha256 = owners[first]
                    # Marks are eight bytes of it: two pictures may share one.
                    if sha256 == row.sha256:
                        found[row.key] = (key, name)
                count += 1
            yield found


def _stored_rows(plan: Plan, numbers: Sequence[int]) -> Iterator[tuple[Path, Outcome]]:
    for number in numbers:
        shard = plan.shard(number)
        yield from ((shard, row) for row in read_ledger(shard) if row.kind == "ok")


def _settled(shard: Path, seal: Seal, owners: dict[str, Owner]) -> Seal:
    """Write a shard without the photos that refer, unless it is so already."""
    digest = hashlib.sha256(json.dumps(owners).encode()).hexdigest() if owners else ""
    if seal.references == digest:
        return seal
    seal_path(shard).unlink(missing_ok=True)
    before = {one.key: one for one in read_references(shard)}
    references: list[Reference] = []
    with Stored(shard) as stored, ShardWriter(shard) as writer:
        for row in read_ledger(shard):
            if row.kind != "ok":
                continue
            owner = owners.get(row.key)
            if owner and row.key in before:
                # The tar that had its bytes may be without them by now.
                references.append(replace(before[row.key], same_as=owner[0], shard=owner[1]))
                continue
            if (sample := stored.sample(row.key)) is None:
                raise LavicError(f"{shard}: photo {row.key} is lost; run the same command again to fetch it")
            if owner:
                meta, text = sample.meta, sample.text
                references.append(Reference(key=row.key, same_as=owner[0], shard=owner[1], meta=meta, text=text))
            else:
                writer.add(sample)
        # Before the tar: what it drops must be known by then.
        references_sha256 = write_references(shard, references)
    if not writer.samples:
        shard.unlink(missing_ok=True)
        index_path(shard).unlink(missing_ok=True)
    entry = ShardEntry(name=shard.name, samples=writer.samples, bytes=writer.bytes, sha256=writer.sha256)
    made = replace(seal, entry=entry, references=digest, references_sha256=references_sha256)
    write_whole(seal_path(shard), pack_seal(made))
    return made
