"""The end of a crawl: the manifest, which marks the set as complete, and a summary of its photos."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from lavic.data.manifest import CARD, CARD_MARK, EMPTY_TAR, NAME, Manifest, card
from lavic.errors import DataError, LavicError
from lavic.shards.pack.host_failures import failures_table
from lavic.shards.pack.outcomes import UNAVAILABLE, advice, outcome_table, read_ledger, success_rate
from lavic.shards.pack.refresh import refresh_line
from lavic.shards.pack.seal import Seal
from lavic.shards.plan.crawl_plan import Plan
from lavic.storage.atomic import atomic_write
from lavic.storage.paths import file_sizes
from lavic.tracking.run_metadata import versions

_MAX_REASONS = 3
"""Number of reasons, the most frequent ones, that are named for photos that were not requested."""


class TooFewStored(LavicError):
    """Too small a share of the photos was stored for the set to count as complete."""


def finalize_set(
    plan: Plan, seals: Sequence[Seal], min_success: float = 0.0, *, allow_private: bool = False
) -> Manifest:
    """Write the manifest, which marks the set as complete.

    Raises:
        TooFewStored: Less than the share `min_success` was stored (see `success_rate`), or not a single photo. The
            shards are kept, and there is no manifest.
    """
    outcomes: Counter[str] = Counter()
    for seal in seals:
        outcomes.update(seal.outcomes)
    manifest = Manifest(
        folder=plan.folder,
        set=plan.settings["set"],
        split=plan.settings["split"],
        shards=tuple(seal.entry for seal in seals if seal.entry.samples),
        empty=tuple(seal.entry.name for seal in seals if not seal.entry.samples),
        plan=plan.digest,
        outcomes=dict(sorted(outcomes.items())),
        references=outcomes["ok"] - sum(seal.entry.samples for seal in seals),
        versions=versions("lavic", "aiohttp", "pillow", "ray"),
    )
    if not manifest.samples or success_rate(outcomes) < min_success:
        (plan.folder / NAME).unlink(missing_ok=True)
        _print_outcomes(manifest, seals)
        if not_requested := _not_requested(manifest, seals):
            print(not_requested)
        raise TooFewStored(_too_few(manifest, min_success, allow_private))
    files = file_sizes(plan.folder)
    for name in manifest.empty:
        if files.get(name) != len(EMPTY_TAR):
            atomic_write(plan.folder / name, EMPTY_TAR)
    if before := _same_set(manifest):
        # The versions that made the set; packages may have been upgraded since.
        manifest = replace(manifest, versions=before.versions)
    manifest.save()
    return manifest


def finalize_splits(folder: Path, names: Iterable[str]) -> None:
    """Write a card over the sets of several splits, by which `datasets.load_dataset(FOLDER)` has them all.

    Splits that are not complete are left out. A README.md that no crawl wrote is kept.
    """
    sets: list[Manifest] = []
    for name in names:
        with suppress(DataError):
            sets.append(Manifest.load(folder / name, check=False))
    path = folder / CARD
    if sets and (not path.exists() or CARD_MARK in path.read_text("utf-8", "replace")):
        atomic_write(path, card(sets[0].set, sets, folder))


def print_report(
    manifest: Manifest,
    seals: Sequence[Seal],
    new_seals: Sequence[Seal],
    requested: int,
    seconds: float,
    *,
    allow_private: bool = False,
) -> None:
    """Print what the set holds, and how fast this run was: the seals that it made, the photos that it requested."""
    size = sum(shard.bytes for shard in manifest.shards) / 1e6
    references = f" and {manifest.references:,} that refer to them" if manifest.references else ""
    print(
        f"{manifest.folder}: {manifest.samples:,} photos{references} in {len(manifest.shards):,} shards, {size:,.1f} MB"
    )
    _print_outcomes(manifest, seals)
    if new_seals:
        rate = requested / max(1e-9, max(seal.ended for seal in new_seals) - min(seal.began for seal in new_seals))
        print(
            f"this run: {requested:,} photos in {seconds:.1f} s with start-up; {rate:,.0f} photos/s from first to last"
        )
    if line := refresh_line(seal.refreshed for seal in new_seals):
        print(line)
    if not_requested := _not_requested(manifest, seals):
        print(not_requested)
    if hint := advice(manifest.outcomes, allow_private=allow_private):
        print(hint)


def _print_outcomes(manifest: Manifest, seals: Sequence[Seal]) -> None:
    print(outcome_table(manifest.outcomes))
    if failures := failures_table(seal.failures for seal in seals):
        print(failures)


def _too_few(manifest: Manifest, min_success: float, allow_private: bool) -> str:
    if not manifest.samples:
        return f"not one photo was stored: {advice(manifest.outcomes, allow_private=allow_private)}"
    outcomes = {kind: count for kind, count in manifest.outcomes.items() if kind not in UNAVAILABLE}
    stored, total = outcomes["ok"], sum(outcomes.values())
    hint = advice(outcomes, 1.0, allow_private=allow_private)
    return (
        f"{manifest.folder}: {stored:,} of {total:,} photos stored ({stored / total:.1%}, without those that are "
        f"{', '.join(sorted(UNAVAILABLE))}), less than --min-success {min_success:g}: the shards are kept, and the set "
        f"is not complete. {hint}. Or accept the set as it is with --min-success "
        f"{int(stored / total * 100) / 100:g}"
    )


def _not_requested(manifest: Manifest, seals: Sequence[Seal]) -> str:
    """How many photos were never requested, and why; empty if there is none."""
    if not (count := manifest.outcomes.get("unasked", 0)):
        return ""
    reasons: Counter[str] = Counter()
    for seal in seals:
        if seal.outcomes.get("unasked"):
            rows = read_ledger(manifest.path(seal.entry))
            reasons.update(row.reason for row in rows if row.kind == "unasked")
    most_common = "; ".join(f"{reason} ({number:,})" for reason, number in reasons.most_common(_MAX_REASONS))
    suffix = f"; {len(reasons) - _MAX_REASONS:,} other reasons" if len(reasons) > _MAX_REASONS else ""
    return f"{count:,} photos were never requested: {most_common}{suffix}. Run the same command again to request them"


def _same_set(manifest: Manifest) -> Manifest | None:
    """The manifest on disk, if it is the same."""
    try:
        before = Manifest.load(manifest.folder, check=False)
    except DataError:
        return None
    return before if before.digest == manifest.digest else None
