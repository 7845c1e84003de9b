"""`lavic describe`: the teacher's description of every photo of a set, from all its tokens, in a sidecar per shard.

Rank r of n takes every n-th shard. A shard with a sidecar is skipped, so the same command continues after any stop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import PositiveInt

from lavic.config import parse, settings
from lavic.data.descriptions import FIELDS, described_by, descriptions_path, read_descriptions, write_descriptions
from lavic.data.manifest import Manifest
from lavic.data.remote_shards import CacheSettings
from lavic.data.shard_dataset import ShardDataset
from lavic.distributed.context import DistributedContext
from lavic.distributed.ray_session import RaySettings
from lavic.distributed.signals import StopRequest
from lavic.errors import DataError, Stopped
from lavic.model import hub
from lavic.model.chat_template.template import prompt_version
from lavic.model.config import ModelSettings
from lavic.model.dims import weights_estimate
from lavic.storage.output_folder import lock_output_folder

if TYPE_CHECKING:
    from lavic.data.tar_shards import Sample
    from lavic.model.loading import Backbone

CATALOGUE = "catalogue"
"""Takes the place of the model if the text is the catalogue's."""
_NAMES = {
    "weights": "the weights",
    "prompt": "prompt version",
    "views": "--model.views",
    "dtype": "--model.dtype",
    "max_new_tokens": "--max-new-tokens",
}
"""What a description depends on, as messages name it."""


@settings
class DescribeSettings:
    """Describe every photo of a set of shards with the uncompressed base model (stage 1's teacher)."""

    model: ModelSettings = ModelSettings()
    """The teacher."""
    shards: Path
    """Folder of a set, made by `lavic crawl`."""
    batch_size: PositiveInt = 8
    """Photos described at once."""
    max_new_tokens: PositiveInt = 128
    """Longest description. One that is cut ends with its last complete sentence."""
    keep: Literal["none", "catalogue"] = "none"
    """`catalogue`: photos that the catalogue describes keep that text; only the others are described."""
    nproc: PositiveInt = 1
    """Processes on this machine; ignored inside torchrun or srun."""
    cache: CacheSettings = CacheSettings()
    """Copies of shards, where `shards` is in an object store."""
    ray: RaySettings = RaySettings()
    """With --ray.workers N: N processes on a Ray cluster, one per GPU, instead of `nproc`."""


SETTINGS = DescribeSettings
"""The command's settings, for `lavic.cli.command_module`."""


Cached = Callable[[Path, str, Callable[[], bool]], bool]
"""(file, question, how to answer it) -> the answer, which may be remembered while the file does not change."""


def resolve(argv: Sequence[str] | None) -> DescribeSettings:
    """The settings of a command line."""
    return parse(DescribeSettings, argv, command="describe")


def is_complete(settings: DescribeSettings, *, cached: Cached = lambda file, question, answer: answer()) -> bool:
    """Whether every shard has descriptions of exactly the photos that it holds.

    Args:
        settings: Of the command.
        cached: Spares a caller who asks often from reading every file each time.
    """
    try:
        if not Manifest.load(settings.shards).shards:
            return True
        data = ShardDataset(settings.shards, descriptions=None, cache=settings.cache)
        for number, shard in enumerate(data.manifest.shards):
            sidecar = descriptions_path(data.manifest.path(shard))
            question = f"describes {shard.sha256}"
            if not sidecar.is_file() or not cached(sidecar, question, partial(_describes_all, data, number)):
                return False
    except (DataError, OSError):
        return False
    return True


def _describes_all(data: ShardDataset, number: int) -> bool:
    """Whether a shard's sidecar holds its photos and no others: a crawl that repacked it may have added some."""
    return read_descriptions(data.manifest.path(data.manifest.shards[number])).keys() == set(data.keys_of(number))


def estimate(settings: DescribeSettings) -> str:
    """What a rank loads, as text."""
    return weights_estimate(settings.model, lambda shape: shape.parameters)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    chosen = resolve(argv)
    world = DistributedContext.from_env()
    if chosen.nproc > 1 and world.size == 1:
        from lavic.cli import start_ranks

        return start_ranks("describe", argv, chosen.nproc)
    if chosen.ray.workers and not world.launcher:
        from lavic.shards.cluster.rank_actors import run_on_ray

        return run_on_ray("describe", argv or (), chosen.ray)
    return run(chosen, world)


def run(chosen: DescribeSettings, world: DistributedContext) -> int:
    """Describes this rank's shards."""
    data = ShardDataset(chosen.shards, descriptions="shard", cache=chosen.cache)
    # One rank holds the lock for all: ranks do not wait for each other here. An object store has no lock: there two
    # commands may describe the same shard, and the last one's sidecar stays.
    locks = world.is_main and not data.is_remote
    with lock_output_folder(chosen.shards, exclusive=world.size == 1) if locks else nullcontext():
        return _describe_set(data, chosen, world)


def _describe_set(data: ShardDataset, chosen: DescribeSettings, world: DistributedContext) -> int:
    shards = data.manifest.shards
    mine = range(world.rank, len(shards), world.size)
    folder = hub.resolve(chosen.model)
    wanted = {
        "weights": hub.fingerprint(folder),
        "prompt": prompt_version(chosen.model, folder),
        "views": chosen.model.views,
        "dtype": "" if chosen.model.dtype == "auto" else chosen.model.dtype,  # as each shard was begun
        "max_new_tokens": str(chosen.max_new_tokens),
    }
    todo = [n for n in mine if not _described(data, n, chosen, wanted)]
    if world.is_main:
        print(
            f"{data.manifest.samples} photos in {len(shards)} shards; {len(todo)} of rank 0's {len(mine)} to describe"
        )
    if todo:
        from lavic.model.loading import Backbone

        with StopRequest() as stop:
            backbone = Backbone.load(chosen.model, world.device())
            for at, n in enumerate(todo):
                data.read_ahead(data.bounds[todo[at : at + 3]])
                _describe_shard(data, n, backbone, chosen, stop)
    return 0


def _bounds(data: ShardDataset, number: int) -> range:
    start = sum(s.samples for s in data.manifest.shards[:number])
    return range(start, start + data.manifest.shards[number].samples)


def _described(data: ShardDataset, number: int, chosen: DescribeSettings, wanted: Mapping[str, str]) -> bool:
    """Whether a shard has a sidecar that was made with these settings.

    Raises:
        DataError: It was made with others.
    """
    shard = data.manifest.path(data.manifest.shards[number])
    if not descriptions_path(shard).exists():
        return False
    if not _describes_all(data, number):
        return False
    for origin in described_by(shard):
        if origin["model"] == CATALOGUE and not origin["weights"]:
            if chosen.keep == "catalogue":
                continue
            raise DataError(
                f"{descriptions_path(shard)}: has texts of the catalogue; use --keep catalogue, or remove it to "
                "describe again"
            )
        # A model that was moved or renamed has the same fingerprint.
        differ = [
            f"{_NAMES[name]} {origin[name]}, not {value}"
            for name, value in wanted.items()
            if value and origin[name] and origin[name] != value
        ]
        if differ:
            raise DataError(
                f"{descriptions_path(shard)}: by {origin['model']} with {'; '.join(differ)}: use the same settings, or "
                "remove it to describe again"
            )
    return True


def _describe_shard(
    data: ShardDataset, number: int, backbone: Backbone, chosen: DescribeSettings, stop: StopRequest
) -> None:
    started = time.monotonic()
    shard = data.manifest.path(data.manifest.shards[number])
    indices = list(_bounds(data, number))
    rows = []
    dtype = str(backbone.model.dtype).removeprefix("torch.")
    how = (backbone.encoder.version, chosen.model.views, dtype, str(chosen.max_new_tokens))
    for at in range(0, len(indices), chosen.batch_size):
        if stop.requested:  # no rank waits for another: each leaves as it is
            raise Stopped("stopped on request; complete shards are kept; run the same command again to continue")
        samples = [data[i] for i in indices[at : at + chosen.batch_size]]
        missing = [s for s in samples if not (chosen.keep == "catalogue" and s.text)]
        texts = dict(zip((s.key for s in missing), describe(backbone, missing, chosen.max_new_tokens), strict=True))
        for s in samples:
            who = (backbone.name, backbone.fingerprint) if s.key in texts else (CATALOGUE, "")
            values = (s.key, texts.get(s.key, s.text), *who, *how)
            rows.append(dict(zip(FIELDS, values, strict=True)))
    write_descriptions(shard, rows)
    seconds = time.monotonic() - started
    print(f"{shard.name}: {len(rows)} descriptions, {len(rows) / seconds:.1f} photos/s", flush=True)


def describe(backbone: Backbone, samples: Sequence[Sample], max_new_tokens: int) -> list[str]:
    """A description of each sample, from all its photo tokens."""
    import numpy as np
    import torch

    from lavic.model.generation import generate
    from lavic.model.visual_tokens import all_tokens

    if not samples:
        return []
    images = [s.image for s in samples]
    geometry, encoder, sizes = backbone.geometry, backbone.encoder, [image.size for image in images]
    views = torch.from_numpy(np.concatenate([geometry.cut(image) for image in images])).to(backbone.device)
    with torch.no_grad():
        tokens = all_tokens(backbone.model, views, sizes, [geometry.grid(size) for size in sizes])
    questions = [
        encoder.prompt(encoder.describe(sample.title, len(photo)))
        for sample, photo in zip(samples, tokens, strict=True)
    ]
    written = generate(backbone.model, encoder, questions, torch.cat(tokens), max_new_tokens=max_new_tokens)
    return [complete_sentences(continuation.text) for continuation in written]


def complete_sentences(text: str) -> str:
    """The text up to the end of its last complete sentence; all of it if there is none."""
    text = " ".join(text.split())
    end = max(text.rfind(mark) for mark in ".!?")
    return text[: end + 1] if end > 0 else text
