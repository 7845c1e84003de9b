"""Whether a step of the pipeline is done: by what stands in its folder, never by what a job said."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from lavic.data.descriptions import descriptions_path, read_descriptions
from lavic.data.manifest import NAME, Manifest, digest_manifest
from lavic.data.shard_dataset import ShardDataset
from lavic.errors import DataError
from lavic.launch.pipeline.dag import Step
from lavic.launch.pipeline.digest_cache import Digests
from lavic.launch.pipeline.settings import Stage


def is_whole(step: Step, digests: Digests) -> bool:
    """Whether the step's own mark of a whole result stands: a manifest, a receipt, a result.

    Args:
        step: The step.
        digests: What is known of files, so that descriptions are not read each time.
    """
    return _is_described(step.place, digests) if step.stage == "describe" else _WHOLE[step.stage](step.place)


def _is_set(folder: Path) -> bool:
    try:
        Manifest.load(folder)
    except DataError:
        return False
    return True


def _is_verified(receipt: Path) -> bool:
    """The set is the one that was verified; a crawl that went on since has written another manifest."""
    try:
        digest: str = json.loads(receipt.read_text("utf-8"))["manifest"]
        return digest == digest_manifest(receipt.with_name(receipt.name.removesuffix(".verified.json")))
    except (OSError, DataError, ValueError, KeyError, TypeError):
        return False


def _is_described(folder: Path, digests: Digests) -> bool:
    """Every shard has descriptions of the photos that it holds, and of no others."""
    try:
        manifest = Manifest.load(folder)
        if not manifest.shards:
            return True
        data = ShardDataset(folder, descriptions=None)

        def complete(number: int) -> bool:
            return read_descriptions(manifest.path(manifest.shards[number])).keys() == set(data.keys_of(number))

        return all(
            digests.about(
                descriptions_path(manifest.path(shard)), f"describes {shard.sha256}", partial(complete, number)
            )
            for number, shard in enumerate(manifest.shards)
        )
    except (DataError, OSError):
        return False


_WHOLE: dict[Stage, Callable[[Path], bool]] = {
    "crawl": _is_set,
    "verify": _is_verified,
    "distill": lambda run: (run / "result.json").is_file(),
    "embed": lambda store: (store / NAME).is_file(),
    "tune": lambda run: (run / "result.json").is_file(),
    "evaluate": lambda folder: (folder / "results.json").is_file(),
}
