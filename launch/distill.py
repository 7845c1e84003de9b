"""`lavic distill`: stage 1. LoRA on vision tower and projector learns to say in five tokens what all of them say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import PositiveInt

from lavic.config import flatten, parse, settings
from lavic.data.atomic import write_whole
from lavic.errors import DataError
from lavic.model.settings import LoraSettings, ModelSettings
from lavic.tracking import Tracker, TrackingSettings
from lavic.train.run import RunFolder, digest_files
from lavic.train.settings import LoopSettings
from lavic.world import World

if TYPE_CHECKING:
    from lavic.data.dataset import ShardDataset, Without
    from lavic.train.score import Score

DESCRIPTION = """Stage 1, distillation: train the vision side until five tokens of a photo say what all of them say.

The language model is frozen. The photos' descriptions are those that `lavic describe` wrote beside the shards, else the
catalogue's. The same command goes on after any stop, with any number of processes.

  lavic distill --shards photos/train --valid photos/valid --out runs/distill --nproc 2

Writes OUT/bundle (the vision adapter, for `lavic embed --adapter OUT`), OUT/captions.json (loss and perplexity of the
validation descriptions: from all tokens, from five before, from five after), OUT/metrics.jsonl and OUT/checkpoints."""


@settings
class DistillSettings:
    """Train the vision adapter (stage 1)."""

    shards: Path
    """Set of shards to train on, with descriptions. A photo that `valid` holds too is left out."""
    valid: Path
    """Set of shards to validate with, with descriptions."""
    out: Path
    """The run's folder."""
    model: ModelSettings = ModelSettings()
    """The base model."""
    lora: LoraSettings = LoraSettings()
    """The adapter."""
    loop: LoopSettings = LoopSettings(epochs=5.0, batch=32, lr=5e-5, weight_decay=1e-5)
    """The training loop."""
    max_length: PositiveInt = 512
    """Longest title and description with the words around them, tokens; longer photos are skipped and counted."""
    select: Literal["best", "last"] = "best"
    """Which adapter goes into the bundle: that of the lowest validation loss, or the last."""
    deepspeed: Path | None = None
    """A JSON file with more DeepSpeed settings."""
    tracking: TrackingSettings = TrackingSettings()
    """Where the run is recorded."""
    nproc: PositiveInt = 1
    """Processes on this machine; inside torchrun or srun their number counts."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    chosen = parse(DistillSettings, argv, command="distill", description=DESCRIPTION)
    world = World.from_env()
    if chosen.nproc > 1 and world.size == 1:
        from lavic.launch import local

        return local.run("distill", list(argv or ()), chosen.nproc)
    return run(chosen, world)


def run(chosen: DistillSettings, world: World) -> int:
    """Trains, from wherever the run stands."""
    from lavic.data.dataset import ShardDataset, Without
    from lavic.model.backbone import resolve
    from lavic.train.engine import read_json

    chosen.loop.split(world.size)
    extra = read_json(chosen.deepspeed)
    resolve(chosen.model)
    valid = ShardDataset(chosen.valid)
    photos = Without(ShardDataset(chosen.shards), valid.keys)
    if not len(photos):
        raise DataError(f"{chosen.shards}: every photo is in {chosen.valid} too: nothing is left to train on")
    folder = RunFolder(chosen, command="distill", world=world, free=("shards", "valid"))
    if folder.done:
        if world.is_main:
            print(f"{chosen.out}: done before, {chosen.out / 'result.json'}")
        return 0
    with world.together(), Tracker.open(chosen.out, chosen.tracking, main=world.is_main) as tracker:
        tracker.start("distill", flatten(chosen))
        _train(chosen, world, folder, tracker, photos, valid, extra)
    return 0


def _train(
    chosen: DistillSettings,
    world: World,
    folder: RunFolder,
    tracker: Tracker,
    photos: Without,
    valid_photos: ShardDataset,
    extra: dict[str, Any],
) -> None:
    import torch

    from lavic.data.dataset import Order
    from lavic.model.adapters import add_adapter, untouched
    from lavic.model.backbone import Backbone
    from lavic.model.bundle import save_bundle
    from lavic.train.checkpoint import Checkpoints
    from lavic.train.engine import Engine
    from lavic.train.loop import fit
    from lavic.train.score import score
    from lavic.train.tasks import DistillData, DistillTask, TeacherTask

    device = world.device()
    backbone = Backbone.load(chosen.model, device)

    def data(shards: ShardDataset | Without, **how: Any) -> DistillData:
        return DistillData(shards, backbone.geometry, backbone.encoder, max_length=chosen.max_length, **how)

    train = data(photos, order=Order(len(photos), chosen.loop.seed))
    valid = data(valid_photos)
    micro_batch, _ = chosen.loop.split(world.size)
    captions = _read_captions(folder.folder) if folder.begun else {}
    if "full" not in captions:
        every = data(valid_photos, tokens="all")
        teacher = score(TeacherTask(backbone.model), every, world, batch=micro_batch, device=device)
        captions["full"] = teacher.as_dict()
        tracker.event("captions", arm="full", **teacher.as_dict())

    torch.manual_seed(chosen.loop.seed)
    model = add_adapter(backbone, "vision", chosen.lora)
    engine = Engine(DistillTask(model), world, chosen.loop, extra=extra)
    total = chosen.loop.total(len(train))

    def validated(step: int, result: Score, best: bool) -> None:
        if step == 0:
            captions["cls_before"] = result.as_dict()
            _write_captions(folder.folder, captions, world)
        elif best if chosen.select == "best" else step == total:
            captions["cls_after"] = result.as_dict()
            if world.is_main:
                save_bundle(
                    folder.bundle,
                    backbone,
                    vision=model,
                    max_length=chosen.max_length,
                    revision=chosen.model.revision,
                )
            _write_captions(folder.folder, captions, world)

    identity = {"base model": backbone.fingerprint}
    if world.is_main:
        identity |= {"training set": _digest(photos), "validation set": _digest(valid_photos)}
    checkpoints = Checkpoints(folder.checkpoints, world, keep=chosen.loop.keep, identity=world.broadcast(identity))
    progress = fit(engine, train, valid, checkpoints, tracker, chosen.loop, world, on_validation=validated)
    if untouched(model):
        raise DataError("nothing was learnt: every LoRA B is still zero; is --loop.lr far too small?")
    for arm in ("cls_before", "cls_after"):
        tracker.event("captions", arm=arm, **captions[arm])
    for name in ("config.yaml", "captions.json", "bundle"):
        tracker.artifact(folder.folder / name)
    best = {"best_step": progress.best_step, "best_loss": progress.best_loss}
    folder.finish({"command": "distill", "steps": progress.step, **best, "captions": captions})
    if world.is_main:
        full, before, after = (captions[arm]["perplexity"] for arm in ("full", "cls_before", "cls_after"))
        print(
            f"perplexity of the validation descriptions: {full:.3f} from all tokens, {before:.3f} from five before, "
            f"{after:.3f} from five after"
        )
        print(f"{folder.bundle}: done; next: lavic embed --adapter {chosen.out} --shards ... --out STORE")


def _read_captions(folder: Path) -> dict[str, dict[str, float]]:
    file = folder / "captions.json"
    return json.loads(file.read_text("utf-8")) if file.is_file() else {}


def _write_captions(folder: Path, captions: dict[str, dict[str, float]], world: World) -> None:
    if world.is_main:
        write_whole(folder / "captions.json", json.dumps(captions, indent=2) + "\n")


def _digest(photos: ShardDataset | Without) -> str:
    """Of what is learnt: the shards, and the descriptions beside them."""
    from lavic.data.descriptions import descriptions_path

    manifest = photos.manifest
    sidecars = [descriptions_path(manifest.path(shard)) for shard in manifest.shards]
    return digest_files([manifest.folder / "manifest.json", *(file for file in sidecars if file.is_file())])
