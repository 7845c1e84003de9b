"""The end of a crawl: the manifest that says the set is whole, and what came of its photos, in a few lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from lavic.data.manifest import Manifest
from lavic.errors import LavicError
from lavic.provenance import versions
from lavic.shards.outcomes import advice, table
from lavic.shards.pack import Seal
from lavic.shards.plan import Plan


def close_set(plan: Plan, seals: Sequence[Seal]) -> Manifest:
    """Write the manifest: the set is whole.

    Raises:
        LavicError: Not a single photo was stored.
    """
    outcomes: Counter[str] = Counter()
    for seal in seals:
        outcomes.update(seal.outcomes)
    manifest = Manifest(
        folder=plan.folder,
        set=plan.settings["set"],
        split=plan.settings["split"],
        shards=tuple(seal.entry for seal in seals if seal.entry.samples),
        plan=plan.digest,
        outcomes=dict(outcomes),
        references=outcomes["ok"] - sum(seal.entry.samples for seal in seals),
        versions=versions("lavic", "aiohttp", "pillow", "ray"),
    )
    if not manifest.samples:
        print(table(outcomes))
        raise LavicError(f"not one photo was stored: {advice(outcomes)}")
    manifest.save()
    return manifest


def report(manifest: Manifest, made: Sequence[Seal], seconds: float) -> None:
    """Say what the set holds, and how fast this run was.

    Args:
        manifest: Of the set.
        made: Seals of the shards that this run made.
        seconds: That it took.
    """
    size = sum(shard.bytes for shard in manifest.shards) / 1e6
    more = f" and {manifest.references:,} that refer to them" if manifest.references else ""
    print(f"{manifest.folder}: {manifest.samples:,} photos{more} in {len(manifest.shards):,} shards, {size:,.1f} MB")
    print(table(manifest.outcomes))
    if made:
        photos = sum(seal.photos for seal in made)
        steady = photos / max(1e-9, max(seal.ended for seal in made) - min(seal.began for seal in made))
        print(f"{photos:,} photos in {seconds:.1f} s, start-up included; {steady:,.0f} photos/s from first to last")
    if hint := advice(manifest.outcomes):
        print(hint)
