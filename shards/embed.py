"""`lavic embed`: computes the five [CLS] vectors of every item and writes the item store.

An item's tokens are those of its first photo in the sets. The ranks share the shards. A shard whose part exists is
skipped, so the same command resumes after any stop, and adds only new parts when the sets have grown. Rank 0 writes the
manifest when all parts exist.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveInt

from lavic.config import parse, settings
from lavic.data.remote_shards import CacheSettings
from lavic.data.shard_dataset import ShardDataset
from lavic.distributed.context import DistributedContext
from lavic.distributed.ray_session import RaySettings
from lavic.distributed.signals import StopRequest
from lavic.errors import DataError, LavicError
from lavic.model.config import ModelSettings
from lavic.model.dims import known_dims, weights_estimate
from lavic.model.tiling import VIEWS
from lavic.shards.store_photos import Photo, StorePhotos
from lavic.shards.store_plan import StorePlan, read_plan
from lavic.storage import format_bytes
from lavic.storage.output_folder import lock_output_folder, not_writable

if TYPE_CHECKING:
    import torch

    from lavic.model.item_store import Part
    from lavic.model.loading import Backbone

_TIMEOUT_S = 7 * 24 * 3600.0
_PREFETCH = 3
"""Shards that are downloaded or read at a time."""


@settings
class EmbedSettings:
    """Build the item store of a catalogue: five vectors per item, by the vision tower that stage 1 trained."""

    model: ModelSettings = ModelSettings()
    """The base model."""
    shards: list[Path] = Field(min_length=1)
    """Folders of sets by `lavic crawl`; an item in several of them is taken from the first."""
    adapter: Path | None = None
    """Output folder of `lavic distill`, or a bundle; without it, the tokens are those of the plain base model."""
    out: Path
    """The store. The same command resumes after a stop, and extends the store when its sets have grown (`lavic crawl
    --extend`, `--retry`): it computes only new items, and the store stays usable until they are complete."""
    precision: Literal["float16", "bfloat16", "float32"] = "float16"
    """Type of the stored vectors."""
    batch_size: PositiveInt = 32
    """Photos per forward pass."""
    num_workers: NonNegativeInt = 0
    """Data loader processes per rank, which decode and tile photos; 0 uses the rank's process."""
    nproc: PositiveInt = 1
    """Processes on this machine; ignored inside torchrun or srun."""
    cache: CacheSettings = CacheSettings()
    """Cache of shards, if `shards` are in an object store."""
    ray: RaySettings = RaySettings()
    """With --ray.workers N: N processes on a Ray cluster, one for each GPU, instead of `nproc`."""


SETTINGS = EmbedSettings
resolve = partial(parse, EmbedSettings, command="embed")
"""The settings of a command line; see `lavic.cli.command_module`."""


def is_complete(settings: EmbedSettings) -> bool:
    """Whether the store is complete: its manifest is written last."""
    return (settings.out / "manifest.json").is_file()


def estimate(settings: EmbedSettings, *, expected: int | None = None) -> str:
    """Size of the store, of `expected` items, and memory of a rank, as lines of text."""
    shape = known_dims(settings.model)
    if shape is None:
        return ""
    element = 4 if settings.precision == "float32" else 2
    total = f"; {format_bytes(shape.store_bytes(expected, element))} for {expected:,} items" if expected else ""
    item = format_bytes(shape.store_bytes(1, element))
    size = f"bytes: {VIEWS} x {shape.vision_hidden} numbers an item, {item}{total}"
    return f"{size}\n{weights_estimate(settings.model, lambda shape: shape.tower + shape.projector)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    chosen = resolve(argv)
    world = DistributedContext.from_env()
    if world.must_start(chosen.nproc):
        from lavic.cli import start_ranks

        return start_ranks("embed", argv, chosen.nproc)
    if chosen.ray.workers and not world.launcher:
        from lavic.shards.cluster.rank_actors import run_on_ray

        return run_on_ray("embed", argv or (), chosen.ray)
    sets = [ShardDataset(folder, descriptions=None, cache=chosen.cache) for folder in chosen.shards]
    adapter = find_adapter(chosen.adapter)
    # Ranks may finish their shards hours apart, and wait for each other only at the end.
    with world.process_group(timeout_s=_TIMEOUT_S):
        return run(chosen, world, sets, adapter)


def find_adapter(folder: Path | None) -> Path | None:
    """The vision adapter of a run or a bundle, or the folder itself if it is one.

    Raises:
        DataError: It has none.
    """
    if folder is None:
        return None
    from lavic.model.bundle import FILE, BundleInfo

    if (folder / "config.yaml").is_file() and not (folder / "result.json").is_file():
        raise DataError(f"{folder}: this run is not complete: run the same `lavic distill` again first")
    for adapter in (folder / "bundle" / "vision_adapter", folder / "vision_adapter", folder):
        if (adapter / "adapter_config.json").is_file():
            if (adapter.parent / FILE).is_file():
                BundleInfo.read(adapter.parent).check_adapters(adapter.parent, ("vision",))
            return adapter
    raise DataError(f"{folder}: no vision adapter here (no bundle/vision_adapter): run `lavic distill` to its end")


def run(chosen: EmbedSettings, world: DistributedContext, sets: Sequence[ShardDataset], adapter: Path | None) -> int:
    """Embeds this rank's shards; rank 0 completes the store."""
    from lavic.model.item_store import write_manifest
    from lavic.model.loading import Backbone
    from lavic.model.lora import apply_adapter

    started = time.monotonic()
    model, token_settings = _token_settings(chosen, world, adapter)
    plan = StorePlan(
        out=chosen.out,
        settings=token_settings,
        shards=tuple(shard.sha256 for data in sets for shard in data.manifest.shards),
        photos=StorePhotos.of(sets, token_settings, chosen.out),
    )
    with ExitStack() as stack:
        if _begin(plan, world, stack):
            if world.is_main:
                print(f"{chosen.out}: already complete")
            return 0
        backbone = Backbone.load(model, world.device(), language=False)
        if adapter is not None:
            apply_adapter(backbone, adapter, "vision")
        own_parts, skipped = _make_own_parts(chosen, backbone, sets, plan, world)
        numbered = [entry for entries in world.all_gather_object(own_parts) for entry in entries]
        parts = [part for _, part in sorted(numbered, key=lambda entry: entry[0])]
        skipped = sum(world.all_gather_object(skipped))
        if world.is_main:
            write_manifest(chosen.out, backbone, adapter, parts, shards=[data.manifest.digest for data in sets])
            plan.remove_old(parts)
            items, seconds = sum(p.items for p in parts), time.monotonic() - started
            print(
                f"{chosen.out}: {items} items; {len(parts) - skipped} of {len(parts)} parts made in {seconds:.1f} s "
                "with start-up"
            )
    return 0


def _token_settings(
    chosen: EmbedSettings, world: DistributedContext, adapter: Path | None
) -> tuple[ModelSettings, dict[str, Any]]:
    """The model's settings with its dtype resolved, and everything that the tokens depend on besides the photos."""
    from lavic.model.chat_template.template import prompt_version
    from lavic.model.hub import fingerprint, resolve
    from lavic.model.loading import computing_dtype, read_geometry
    from lavic.model.lora import check_adapter, digest

    folder = resolve(chosen.model)
    base = fingerprint(folder)
    if adapter is not None:
        check_adapter(adapter, "vision", base)
    dtype: Any = computing_dtype(chosen.model, world.device())
    if chosen.model.dtype == "auto":  # a store keeps its precision on another machine
        dtype = world.broadcast_object(read_plan(chosen.out).get("dtype", dtype))
    model = replace(chosen.model, dtype=dtype)
    return model, {
        "base": base,
        "geometry": read_geometry(folder, model.views).as_dict(),
        "adapter": digest(adapter) if adapter else None,
        "precision": chosen.precision,
        "dtype": dtype,
        "prompt": prompt_version(model, folder),
    }


def _begin(plan: StorePlan, world: DistributedContext, stack: ExitStack) -> bool:
    """Locks the store's folder on rank 0 and records the plan; returns whether the store is complete. Collective.

    Raises:
        LavicError: On all ranks, so that none waits for another.
    """
    failure: LavicError | None = None
    complete = False
    if world.is_main:
        try:
            stack.enter_context(lock_output_folder(plan.out))
            plan.begin()
            complete = plan.is_complete()
        except LavicError as error:
            failure = error
        except OSError as error:
            failure = not_writable(plan.out, error)
    failure, complete = world.broadcast_object((failure, complete))
    if failure:
        raise failure
    return complete


def _make_own_parts(
    chosen: EmbedSettings,
    backbone: Backbone,
    sets: Sequence[ShardDataset],
    plan: StorePlan,
    world: DistributedContext,
) -> tuple[list[tuple[int, Part]], int]:
    """Makes the parts of this rank's shards; returns them by number, and how many existed already. Collective.

    Raises:
        Stopped: On request; the parts that are made are kept.
    """
    own_parts: list[tuple[int, Part]] = []
    skipped = 0
    with StopRequest() as stop:
        own_shards = list(enumerate(plan.names))[world.rank :: world.size]
        for position, (number, name) in enumerate(own_shards):
            if stop.requested:
                break
            upcoming = [n for n, name in own_shards[position : position + _PREFETCH] if not plan.read_part(name)]
            _read_ahead(sets, [photo for n in upcoming for photo in plan.photos.of_shard(n)])
            if part := plan.read_part(name):
                skipped += 1
            elif part := _make_part(chosen, backbone, sets, plan.photos.of_shard(number), name, stop):
                plan.record_part(part)
            if part:
                own_parts.append((number, part))
        stop.raise_if_requested(world)
    return own_parts, skipped


Entry = tuple["np.ndarray", dict[str, Any]]
"""A photo's views, float32 [views, 3, size, size], and the store's entry of its item."""


def _read_ahead(sets: Sequence[ShardDataset], photos: Sequence[Photo]) -> None:
    """Downloads the shards of photos in the background, if they are in an object store."""
    for number, data in enumerate(sets):
        if data.is_remote:
            data.read_ahead(np.array([index for n, index, _ in photos if n == number], np.int64))


def _make_part(
    chosen: EmbedSettings,
    backbone: Backbone,
    sets: Sequence[ShardDataset],
    photos: Sequence[Photo],
    name: str,
    stop: StopRequest,
) -> Part | None:
    """Computes a shard's part of the store; None if a stop was requested before it was complete."""
    import torch
    from torch.utils.data import DataLoader

    from lavic.model.item_store import write_part
    from lavic.model.visual_tokens import cls_tokens

    max_views = backbone.geometry.most
    items: list[dict[str, Any]] = []
    tokens = torch.zeros(len(photos), max_views, backbone.vision_width, dtype=getattr(torch, chosen.precision))
    loader: DataLoader[Entry] = DataLoader(
        _ViewsDataset(sets, photos, backbone),  # type: ignore[arg-type]
        batch_size=chosen.batch_size,
        num_workers=chosen.num_workers,
        collate_fn=_stack,
    )
    for views, infos in loader:
        if stop.requested:
            return None
        with torch.no_grad():
            computed = cls_tokens(backbone.model, views.to(backbone.device)).to(tokens.dtype).cpu()
        for info, rows in zip(infos, computed.split([info["views"] for info in infos]), strict=True):
            tokens[len(items), : len(rows)] = rows
            items.append({key: value for key, value in info.items() if key != "views" or value < max_views})
    return write_part(chosen.out, name, items, tokens)


class _ViewsDataset:
    """The views of photos, for a DataLoader."""

    def __init__(self, sets: Sequence[ShardDataset], photos: Sequence[Photo], backbone: Backbone) -> None:
        self.sets, self.photos, self.geometry = sets, photos, backbone.geometry

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, row: int) -> Entry:
        photo = self.photos[row]
        data = self.sets[photo.data_set]
        sample = data[photo.sample]
        meta = sample.meta if photo.duplicate < 0 else data.index.duplicate(photo.duplicate).meta
        views = self.geometry.cut(sample.image)
        return views, {"id": meta["item_id"], "key": meta["key"], "title": meta["title"], "views": len(views)}


def _stack(rows: Sequence[Entry]) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """The views of some photos, [views, 3, size, size], and the store's entry of each item."""
    import torch

    return torch.from_numpy(np.concatenate([views for views, _ in rows])), [info for _, info in rows]
