"""Stage 1 of `lavic distill`: LoRA on vision tower and projector."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavic.distributed.context import DistributedContext
from lavic.errors import DataError
from lavic.launch.training.stage import StageComponents, StageInput, TrainingRun, TrainingStage
from lavic.storage.atomic import atomic_write
from lavic.train.run_folder import RunFolder, digest_files

if TYPE_CHECKING:
    from torch import nn

    from lavic.data.index.held_out import FilteredDataset
    from lavic.data.shard_dataset import ShardDataset
    from lavic.launch.distill import DistillSettings
    from lavic.model.bundle import BundleInfo
    from lavic.model.loading import Backbone
    from lavic.train.distillation.dataset import DistillDataset
    from lavic.train.evaluation import EvalResult
    from lavic.train.input.shuffle_order import ShuffleOrder

CAPTIONS = "captions.json"


class DistillStage(TrainingStage):
    """Stage 1: LoRA on vision tower and projector."""

    command = "distill"
    input_keys = ("shards", "valid")
    settings: DistillSettings

    def __init__(self, settings: DistillSettings, world: DistributedContext) -> None:
        """Opens both sets.

        Raises:
            DataError: One is incomplete, or no photo is left to train on.
        """
        from lavic.data.index.held_out import FilteredDataset, held_out
        from lavic.data.shard_dataset import ShardDataset
        from lavic.model import hub

        super().__init__(settings, world)
        hub.fingerprint(hub.resolve(settings.model))  # before OUT is made, a folder without a whole model is refused
        self.valid = ShardDataset(settings.valid, cache=settings.cache)
        photos = ShardDataset(settings.shards, cache=settings.cache)
        self.train = FilteredDataset(photos, held_out(photos, self.valid))
        if not len(self.train):
            raise DataError(
                f"{settings.shards}: every photo is in {settings.valid} too, or of an item that it holds: nothing is "
                "left to train on"
            )
        if world.is_main and len(self.train) < len(photos):
            print(
                f"{settings.shards}: {len(photos) - len(self.train):,} of {len(photos):,} photos left out: in "
                f"{settings.valid} too, or of an item that it holds"
            )
        self._captions: dict[str, dict[str, Any]] = {}

    def inputs(self) -> Iterator[StageInput]:
        """The shards, and the descriptions beside them."""
        sets = (("training", self.settings.shards, self.train), ("validation", self.settings.valid, self.valid))
        for context, path, data in sets:
            yield StageInput(
                name=f"{context} set",
                path=path,
                digest=_digest(data),
                manifest=data.manifest.folder / "manifest.json",
                context=context,
            )

    def load(self, run: TrainingRun) -> StageComponents:
        """The base model with a vision adapter; before that, the teacher's loss on the validation set."""
        import torch

        from lavic.model.dims import ModelDims
        from lavic.model.loading import Backbone
        from lavic.model.lora import add_adapter
        from lavic.train.distillation.dataset import DistillDataset
        from lavic.train.distillation.task import DistillTask
        from lavic.train.measure.flops import FlopCosts

        settings = self.settings
        backbone = Backbone.load(settings.model, run.world.device())

        def dataset(shards: ShardDataset | FilteredDataset, **options: Any) -> DistillDataset:
            options = {"max_length": settings.max_length, **options}
            return DistillDataset(shards, backbone.geometry, backbone.encoder, **options)

        train = dataset(
            self.train,
            order=self._order(),
            table=self._length_table(run, backbone) if settings.loop.micro_tokens else None,
            teach=settings.teacher_top_k > 0,
            nested=settings.nested,
            seed=settings.loop.seed,
        )
        self._valid_by_views = {count: dataset(self.valid, nested=(count,)) for count in settings.nested}
        self._evaluate_teacher(run, backbone, dataset(self.valid, tokens="all"))
        torch.manual_seed(settings.loop.seed)
        model = add_adapter(backbone, "vision", settings.lora)
        task = DistillTask(
            model, top_k=settings.teacher_top_k, weight=settings.teacher_weight, patches=settings.teacher_patches
        )
        valid = dataset(self.valid)
        shape = ModelDims.from_config(backbone.model.config.to_dict())
        train.overhead = valid.overhead = round(FlopCosts.of(shape, "vision", settings.lora.r).photo)
        return StageComponents(backbone=backbone, model=model, task=task, train=train, valid=valid)

    def _length_table(self, run: TrainingRun, backbone: Backbone) -> Path:
        """Where the ranks of this machine keep the lengths of the training set's samples."""
        from lavic.storage.cache.shard_cache import shard_folder
        from lavic.storage.checksummed_json import digest_json

        identity: dict[str, Any] = {}
        if run.world.is_main:
            identity = {
                "sets": [_digest(self.train), _digest(self.valid)],  # photos of the second are left out of the first
                "base": backbone.fingerprint,
                "tokenizer": backbone.tokenizer_digest,
                "prompt": backbone.encoder.version,
                "max_length": self.settings.max_length,
            }
        folder = self.settings.cache.folder or shard_folder().parent
        return folder / "lengths" / f"{digest_json(run.world.broadcast_object(identity))[:32]}.lengths"

    def _order(self) -> ShuffleOrder:
        from lavic.train.input.shuffle_order import ShuffleOrder

        size, seed = len(self.train), self.settings.loop.seed
        if self.settings.shuffle == "shards":
            return ShuffleOrder(size, seed, mix=8, bounds=self.train.bounds)
        return ShuffleOrder(size, seed)

    def save_bundle(self, folder: Path, components: StageComponents) -> BundleInfo:
        """The bundle of the vision adapter."""
        from lavic.model.bundle import save_bundle

        settings = self.settings
        return save_bundle(
            folder,
            components.backbone,
            vision=components.model,
            max_length=settings.max_length,
            revision=settings.model.revision,
            weights=components.weights,
        )

    def post_eval(self, run: TrainingRun, step: int, result: EvalResult, saved: bool) -> None:
        """Records the loss from one token per view, before training and of the adapter in the bundle."""
        arm = "cls_before" if step == 0 else "cls_after" if saved else ""
        if arm:
            self._record(run, arm, result.as_dict())
        for count, samples in self._valid_by_views.items() if saved else ():
            self._record(run, f"cls_after_{count}", self._evaluate(run, run.components.task, samples).as_dict())

    def result(self) -> Mapping[str, Any]:
        """The losses of the captions."""
        return {"captions": self._captions}

    def artifacts(self) -> Sequence[str]:
        """The losses of the captions."""
        return (CAPTIONS,)

    def completion_message(self, folder: RunFolder) -> str:
        """Perplexities before and after, and the next command."""
        full, before, after = (self._captions[arm]["perplexity"] for arm in ("full", "cls_before", "cls_after"))
        return (
            f"perplexity of the validation descriptions: {full:.3f} from all tokens, {before:.3f} from one per view "
            f"before, {after:.3f} after\n"
            f"{folder.bundle}: done; next: lavic embed --adapter {shlex.quote(str(self.settings.out))} --shards ... "
            "--out STORE"
        )

    def _evaluate_teacher(self, run: TrainingRun, backbone: Backbone, valid: DistillDataset) -> None:
        """Evaluates with all tokens: slow for a large model, so once for a set, however often the run is stopped."""
        from lavic.train.distillation.task import TeacherTask

        settings, world = self.settings, run.world
        if world.is_main:
            version = f"{settings.max_length}/{backbone.encoder.version}/{settings.model.views}"
            identity = f"{backbone.fingerprint}/{_digest(self.valid)}/{version}"
            file = run.folder.folder / CAPTIONS
            self._captions = json.loads(file.read_text("utf-8")) if file.is_file() else {}
            if self._captions.get("full", {}).get("of") != identity:
                self._captions["full"] = {"of": identity}
        self._captions = world.broadcast_object(self._captions)
        if "loss" not in self._captions["full"]:
            teacher = self._evaluate(run, TeacherTask(backbone.model), valid)
            self._record(run, "full", self._captions["full"] | teacher.as_dict())

    def _evaluate(self, run: TrainingRun, task: nn.Module, samples: DistillDataset) -> EvalResult:
        from lavic.train.evaluation import NoTargetTokensError, evaluate

        micro_batch, _ = self.settings.loop.split_batch(run.world.size)
        try:
            return evaluate(
                task,
                samples,
                run.world,
                batch_size=micro_batch,
                device=run.world.device(),
                max_tokens=self.settings.loop.micro_tokens,
                num_workers=self.settings.loop.num_workers,
                check_stop=lambda: run.stop.raise_if_requested(run.world),
            )
        except NoTargetTokensError:
            raise DataError(f"{self.settings.valid}: {samples.no_targets()}") from None

    def _record(self, run: TrainingRun, arm: str, values: dict[str, Any]) -> None:
        self._captions[arm] = values
        run.tracker.event("captions", arm=arm, **values)
        if run.world.is_main:
            atomic_write(run.folder.folder / CAPTIONS, json.dumps(self._captions, indent=2) + "\n")


@cache
def _digest(data: ShardDataset | FilteredDataset) -> str:
    """Digest of the training data: the shards, and the descriptions beside them."""
    from lavic.data.descriptions import descriptions_path
    from lavic.storage.checksummed_json import digest_json

    manifest = data.manifest
    sidecars = [descriptions_path(manifest.path(shard)) for shard in manifest.shards]
    descriptions = digest_files(file for file in sidecars if file.is_file())
    return digest_json({"manifest": manifest.digest, "descriptions": descriptions})[:16]
