"""`lavic distill`: stage 1. LoRA on vision tower and projector learns to say in five tokens what all of them say."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from lavic.config import parse, settings
from lavic.data.remote_shards import CacheSettings
from lavic.distributed.context import DistributedContext
from lavic.errors import DataError
from lavic.launch.training import command as training_command
from lavic.launch.training.command import Input, Parts, Run, Stage
from lavic.model.config import LoraSettings, ModelSettings
from lavic.storage.atomic import atomic_write
from lavic.tracking.settings import TrackingSettings
from lavic.train.config import LoopSettings
from lavic.train.run_folder import RunFolder, digest_files

if TYPE_CHECKING:
    from torch import nn

    from lavic.data.index.held_out import Without
    from lavic.data.shard_dataset import Order, ShardDataset
    from lavic.model.bundle import BundleInfo
    from lavic.model.loading import Backbone
    from lavic.train.distillation.task import DistillData
    from lavic.train.evaluation import Score

DESCRIPTION = """Stage 1, distillation: train the vision side until five tokens of a photo say what all of them say.

The language model is frozen. The photos' descriptions are those that `lavic describe` wrote beside the shards, else the
catalogue's. The same command goes on after any stop, with any number of processes.

  lavic distill --shards photos/train --valid photos/valid --out runs/distill --nproc 2

Writes OUT/bundle (the vision adapter, for `lavic embed --adapter OUT`), OUT/captions.json (loss and perplexity of the
validation descriptions: from all tokens, from five before, from five after), OUT/metrics.jsonl and OUT/checkpoints."""

CAPTIONS = "captions.json"


@settings
class DistillSettings:
    """Train the vision adapter (stage 1)."""

    shards: Path
    """Set of shards to train on, with descriptions. Left out of it: photos of items that `valid` holds too, and photos
    whose bytes are those of one of `valid`'s."""
    valid: Path
    """Set of shards to validate with, with descriptions."""
    out: Path
    """The run's folder."""
    model: ModelSettings = ModelSettings()
    """The base model."""
    lora: LoraSettings = LoraSettings()
    """The adapter."""
    loop: LoopSettings = LoopSettings(epochs=5.0, global_batch_size=32, lr=5e-5, weight_decay=1e-5)
    """The training loop."""
    max_length: PositiveInt = 512
    """Longest title and description with the words around them, tokens; longer photos are skipped and counted."""
    teacher_top_k: NonNegativeInt = 0
    """Also match the probabilities that the model, seeing all tokens, gives to so many likeliest words; 0: the
    description's words alone. Costs a pass over all tokens in every step."""
    teacher_weight: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of that in the loss."""
    teacher_patches: NonNegativeFloat = 0.0
    """Weight of one more loss: how far each view's token is from the mean of those that the untrained model makes of
    the view's patches; 0: none. Costs a pass through the vision tower in every step."""
    nested: tuple[PositiveInt, ...] = ()
    """Train on the first so many views, one of these numbers for each photo (1 2 5), so that fewer tokens per item
    serve too; by default always on all."""
    shuffle: Literal["blocks", "shards"] = "blocks"
    """What is mixed in an epoch: 16 blocks of 256 neighbouring photos at a time, from anywhere in the set; or 8 whole
    shards at a time, each of which is then used up before the next: for a set that does not fit into --cache.bytes."""
    cache: CacheSettings = CacheSettings()
    """Copies of shards, where `shards` or `valid` is in an object store."""
    select: Literal["best", "last"] = "best"
    """Which adapter goes into the bundle: that of the lowest validation loss, or the last."""
    deepspeed: Path | None = None
    """A JSON file with more DeepSpeed settings."""
    tracking: TrackingSettings = TrackingSettings()
    """Where the run is recorded."""
    nproc: PositiveInt = 1
    """Processes on this machine; inside torchrun or srun their number counts."""
    dry_run: bool = False
    """Print what the run would take (memory of each GPU, checkpoint, steps, time) and start nothing. No weights are
    read, and the data need not be there. For several nodes let `--nproc` say all processes."""


SETTINGS = DistillSettings
"""The command's settings, for `lavic.cli.command_module`."""


def resolve(argv: Sequence[str] | None) -> DistillSettings:
    """The settings of a command line."""
    return parse(DistillSettings, argv, command="distill", description=DESCRIPTION)


def is_complete(settings: DistillSettings) -> bool:
    """Whether the run has reached its end: result.json is written last."""
    return (settings.out / "result.json").is_file()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return training_command.main(Distill, DistillSettings, argv, description=DESCRIPTION)


class Distill(Stage):
    """Stage 1."""

    command = "distill"
    free = ("shards", "valid")
    chosen: DistillSettings

    def __init__(self, chosen: DistillSettings, world: DistributedContext) -> None:
        """Opens both sets.

        Raises:
            DataError: One is not whole, or nothing is left to train on.
        """
        from lavic.data.index.held_out import Without, held_out
        from lavic.data.shard_dataset import ShardDataset
        from lavic.model.hub import resolve

        super().__init__(chosen, world)
        resolve(chosen.model)
        self.valid = ShardDataset(chosen.valid, cache=chosen.cache)
        every = ShardDataset(chosen.shards, cache=chosen.cache)
        self.photos = Without(every, held_out(every, self.valid))
        if not len(self.photos):
            raise DataError(
                f"{chosen.shards}: every photo is in {chosen.valid} too, or of an item that it holds: nothing is left "
                "to train on"
            )
        if world.is_main and len(self.photos) < len(every):
            print(
                f"{chosen.shards}: {len(every) - len(self.photos):,} of {len(every):,} photos left out: in "
                f"{chosen.valid} too, or of an item that it holds"
            )
        self._captions: dict[str, dict[str, Any]] = {}

    def inputs(self) -> Iterator[Input]:
        """The shards, and the descriptions beside them."""
        sets = (("training", self.chosen.shards, self.photos), ("validation", self.chosen.valid, self.valid))
        for context, path, photos in sets:
            yield Input(
                name=f"{context} set",
                path=path,
                digest=_digest(photos),
                manifest=photos.manifest.folder / "manifest.json",
                context=context,
            )

    def load(self, run: Run) -> Parts:
        """The base model with a vision adapter; before that, the teacher's score of the validation set."""
        import torch

        from lavic.model.dims import Shape
        from lavic.model.loading import Backbone
        from lavic.model.lora import add_adapter
        from lavic.train.distillation.task import DistillData, DistillTask
        from lavic.train.measure.flops import Work

        chosen = self.chosen
        backbone = Backbone.load(chosen.model, run.world.device())

        def data(shards: ShardDataset | Without, **how: Any) -> DistillData:
            return DistillData(shards, backbone.geometry, backbone.encoder, max_length=chosen.max_length, **how)

        train = data(
            self.photos,
            order=self._order(),
            teach=chosen.teacher_top_k > 0,
            nested=chosen.nested,
            seed=chosen.loop.seed,
            table=self._length_table(run, backbone) if chosen.loop.micro_tokens else None,
        )
        self._first = {count: data(self.valid, nested=(count,)) for count in chosen.nested}
        self._score_teacher(run, backbone, data(self.valid, tokens="all"))
        torch.manual_seed(chosen.loop.seed)
        model = add_adapter(backbone, "vision", chosen.lora)
        task = DistillTask(
            model, top_k=chosen.teacher_top_k, weight=chosen.teacher_weight, patches=chosen.teacher_patches
        )
        valid = data(self.valid)
        shape = Shape.of(backbone.model.config.to_dict())
        train.overhead = valid.overhead = round(Work.of(shape, "vision", chosen.lora.r).photo)
        return Parts(backbone=backbone, model=model, task=task, train=train, valid=valid)

    def _length_table(self, run: Run, backbone: Backbone) -> Path:
        """Where the ranks of this machine keep the lengths of the training set's samples."""
        from lavic.storage.checksummed_json import digest_json
        from lavic.storage.shard_cache import shard_folder

        about: dict[str, Any] = {}
        if run.world.is_main:
            about = {
                "sets": [_digest(self.photos), _digest(self.valid)],  # photos of the second are left out of the first
                "base": backbone.fingerprint,
                "prompt": backbone.encoder.version,
                "max_length": self.chosen.max_length,
            }
        folder = self.chosen.cache.folder or shard_folder().parent
        return folder / "lengths" / f"{digest_json(run.world.broadcast_object(about))[:32]}.lengths"

    def _order(self) -> Order:
        from lavic.data.shard_dataset import Order

        size, seed = len(self.photos), self.chosen.loop.seed
        if self.chosen.shuffle == "shards":
            return Order(size, seed, mix=8, bounds=self.photos.bounds)
        return Order(size, seed)

    def save(self, folder: Path, parts: Parts) -> BundleInfo:
        """The vision adapter's bundle."""
        from lavic.model.bundle import save_bundle

        chosen = self.chosen
        return save_bundle(
            folder,
            parts.backbone,
            vision=parts.model,
            max_length=chosen.max_length,
            revision=chosen.model.revision,
            weights=parts.weights,
        )

    def validated(self, run: Run, step: int, score: Score, kept: bool) -> None:
        """Notes how well one token per view does, before training and for the adapter that is kept."""
        arm = "cls_before" if step == 0 else "cls_after" if kept else ""
        if arm:
            self._note(run, arm, score.as_dict())
        for count, samples in self._first.items() if kept else ():
            self._note(run, f"cls_after_{count}", self._score(run, run.parts.task, samples).as_dict())

    def result(self) -> Mapping[str, Any]:
        """The captions' scores."""
        return {"captions": self._captions}

    def artifacts(self) -> Sequence[str]:
        """The captions' scores."""
        return ("captions.json",)

    def farewell(self, folder: RunFolder) -> str:
        """What stage 1 did, and what comes next."""
        full, before, after = (self._captions[arm]["perplexity"] for arm in ("full", "cls_before", "cls_after"))
        return (
            f"perplexity of the validation descriptions: {full:.3f} from all tokens, {before:.3f} from one per view "
            f"before, {after:.3f} after\n"
            f"{folder.bundle}: done; next: lavic embed --adapter {shlex.quote(str(self.chosen.out))} --shards ... "
            "--out STORE"
        )

    def _score_teacher(self, run: Run, backbone: Backbone, every: DistillData) -> None:
        """Scores all tokens, which is dear for a large model: once for a set, however often the run is stopped."""
        from lavic.train.distillation.task import TeacherTask

        chosen, world = self.chosen, run.world
        if world.is_main:
            how = f"{chosen.max_length}/{backbone.encoder.version}/{chosen.model.views}"
            of = f"{backbone.fingerprint}/{_digest(self.valid)}/{how}"
            file = run.folder.folder / CAPTIONS
            found = json.loads(file.read_text("utf-8")) if file.is_file() else {}
            self._captions = found if found.get("full", {}).get("of") == of else found | {"full": {"of": of}}
        self._captions = world.broadcast_object(self._captions)
        if "loss" not in self._captions["full"]:
            teacher = self._score(run, TeacherTask(backbone.model), every)
            self._note(run, "full", self._captions["full"] | teacher.as_dict())

    def _score(self, run: Run, task: nn.Module, samples: DistillData) -> Score:
        from lavic.train.evaluation import NoTargets, score

        micro_batch, _ = self.chosen.loop.split(run.world.size)
        try:
            return score(
                task,
                samples,
                run.world,
                batch=micro_batch,
                device=run.world.device(),
                tokens=self.chosen.loop.micro_tokens,
                workers=self.chosen.loop.num_workers,
                stop=run.stop,
            )
        except NoTargets:
            raise DataError(f"{self.chosen.valid}: {samples.no_targets()}") from None

    def _note(self, run: Run, arm: str, values: dict[str, Any]) -> None:
        self._captions[arm] = values
        run.tracker.event("captions", arm=arm, **values)
        if run.world.is_main:
            atomic_write(run.folder.folder / CAPTIONS, json.dumps(self._captions, indent=2) + "\n")


@cache
def _digest(photos: ShardDataset | Without) -> str:
    """Of what is learnt: the shards, and the descriptions beside them."""
    from lavic.data.descriptions import descriptions_path
    from lavic.storage.checksummed_json import digest_json

    manifest = photos.manifest
    sidecars = [descriptions_path(manifest.path(shard)) for shard in manifest.shards]
    described = digest_files(file for file in sidecars if file.is_file())
    return digest_json({"manifest": manifest.digest, "descriptions": described})[:16]
