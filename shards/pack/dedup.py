"""The last step of a set that stores equal photos once: which photo keeps its bytes, and which refer to it.

The bytes are known when every shard is complete. Of photos with equal bytes, the first one of the plan keeps them,
whichever was fetched first, and the tars that hold the others are rewritten without them. The same command continues
an interrupted step.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from lavic.data.duplicates import Reference, read_references, write_references
from lavic.data.tar_writer import ShardWriter
from lavic.errors import LavicError
from lavic.shards.pack.existing_shard import ExistingShard
from lavic.shards.pack.outcomes import Outcome, read_ledger
from lavic.shards.pack.seal import Seal, seal_path, write_seal
from lavic.shards.plan.crawl_plan import Plan
from lavic.shards.plan.external_dedup import ExternalDedup, hash64

Owner = tuple[str, str]
"""Key of the photo that keeps the bytes, and the name of its tar."""


def deduplicate(plan: Plan, seals: Sequence[Seal]) -> list[Seal]:
    """Rewrite the shards so that equal bytes are stored once; returns all seals.

    Raises:
        LavicError: A photo's bytes are lost with the shard that held them; the next run fetches them again.
    """
    return [
        _without_duplicates(plan.shard(number), seal, owners)
        for (number, seal), owners in zip(enumerate(seals), _owners(plan, len(seals)), strict=True)
    ]


def _owners(plan: Plan, shards: int) -> Iterator[dict[str, Owner]]:
    """For each shard the owners of photos that refer to others. Takes 8 bytes of memory per photo, and the owners."""
    with tempfile.TemporaryDirectory(prefix="lavic-") as scratch:
        dedup = ExternalDedup(Path(scratch) / "hashes")
        for _, row in _stored_rows(plan, range(shards)):
            dedup.add(hash64(row.sha256))
        first_numbers = dedup.first_equal()
        owner_numbers = {int(first) for number, first in enumerate(first_numbers) if first != number}
        owners: dict[int, tuple[str, str, str]] = {}
        count = 0
        for number in range(shards):
            shard_owners: dict[str, Owner] = {}
            for shard, row in _stored_rows(plan, [number]):
                if count in owner_numbers:
                    owners[count] = (row.key, shard.name, row.sha256)
                elif (first := int(first_numbers[count])) != count:
                    key, name, sha256 = owners[first]
                    # Different pictures may have the same hash of eight bytes.
                    if sha256 == row.sha256:
                        shard_owners[row.key] = (key, name)
                count += 1
            yield shard_owners


def _stored_rows(plan: Plan, numbers: Sequence[int]) -> Iterator[tuple[Path, Outcome]]:
    for number in numbers:
        shard = plan.shard(number)
        yield from ((shard, row) for row in read_ledger(shard) if row.kind == "ok")


def _without_duplicates(shard: Path, seal: Seal, owners: dict[str, Owner]) -> Seal:
    """Write a shard without the photos that refer to others, unless that is done."""
    digest = hashlib.sha256(json.dumps(owners).encode()).hexdigest() if owners else ""
    if seal.references == digest:
        return seal
    seal_path(shard).unlink(missing_ok=True)
    previous = {reference.key: reference for reference in read_references(shard)}
    references: list[Reference] = []
    with ExistingShard(shard) as stored, ShardWriter(shard) as writer:
        for row in read_ledger(shard):
            if row.kind != "ok":
                continue
            owner = owners.get(row.key)
            if owner and row.key in previous:
                # The tar that had its bytes may be without them by now.
                references.append(replace(previous[row.key], same_as=owner[0], shard=owner[1]))
                continue
            if (sample := stored.sample(row.key)) is None:
                raise LavicError(f"{shard}: photo {row.key} is lost; run the same command again to fetch it")
            if owner:
                meta, text = sample.meta, sample.text
                references.append(Reference(key=row.key, same_as=owner[0], shard=owner[1], meta=meta, text=text))
            else:
                writer.add(sample)
        # Before the tar, which drops these photos.
        references_sha256 = write_references(shard, references)
    new_seal = replace(seal, entry=writer.entry, references=digest, references_sha256=references_sha256)
    return write_seal(shard, new_seal)
