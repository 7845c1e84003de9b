"""`lavic tune`: stage 2. LoRA on the language model learns to answer with the ID of the right candidate."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveInt

from lavic.config import parse, settings
from lavic.distributed.context import DistributedContext
from lavic.errors import DataError
from lavic.launch.training import command as training_command
from lavic.launch.training.command import Input, Parts, Run, Stage
from lavic.model.config import LoraSettings, ModelSettings
from lavic.tracking.settings import TrackingSettings
from lavic.train.config import LoopSettings
from lavic.train.run_folder import RunFolder, digest_files

if TYPE_CHECKING:
    from lavic.data.schema import Conversation
    from lavic.model.bundle import BundleInfo
    from lavic.model.item_store import ItemStore
    from lavic.train.evaluation import Score
    from lavic.train.recommendation.task import TuneData

DESCRIPTION = """Stage 2, recommendation tuning: train the language model to answer a conversation and its candidates
with the ID of the right one.

The vision side is frozen, and not even loaded: the candidates' photos are the ready item tokens of the store. The same
command goes on after any stop, with any number of processes.

  lavic tune --store store --train train.jsonl --valid valid.jsonl --out runs/tune --nproc 2

Writes OUT/bundle (both adapters, for `lavic evaluate` and `lavic recommend`), OUT/metrics.jsonl and OUT/checkpoints."""


@settings
class TuneSettings:
    """Train the language adapter (stage 2)."""

    store: Path
    """Item store, made by `lavic embed`: of every candidate and target."""
    train: Path
    """Conversations to train on, jsonl."""
    valid: Path
    """Conversations to validate with, jsonl."""
    out: Path
    """The run's folder."""
    candidates: str = "candidates_st"
    """Which list of a conversation, a key of the jsonl."""
    tokens: Literal["items", "none"] = "items"
    """What stands behind a candidate's title: its item tokens, or nothing (the titles-only control)."""
    tokens_per_item: tuple[PositiveInt, ...] = ()
    """Show the first so many tokens of each item, by default all. Of several numbers (1 2 5) each list gets one, and
    the bundle works with any; for fewer than all, distil with --nested."""
    none_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the lists that are shown without their target and answered with "none of these"; above 0 that answer
    stands under every list."""
    missing: Literal["refuse", "drop"] = "refuse"
    """What happens to an item that is not in the store (its photo is gone, say): an error, or candidates leave their
    lists and rows without a target are left out, counted."""
    shuffle: bool = True
    """Show a list in another order each time it is trained on."""
    max_length: PositiveInt = 2048
    """Longest prompt with its target, tokens; a longer conversation loses its oldest comments."""
    model: ModelSettings = ModelSettings()
    """The base model, the one that made the store."""
    lora: LoraSettings = LoraSettings()
    """The adapter."""
    loop: LoopSettings = LoopSettings(epochs=1.0, global_batch_size=32, lr=5e-5, weight_decay=1e-5)
    """The training loop."""
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


SETTINGS = TuneSettings
"""The command's settings, for `lavic.cli.command_module`."""


def resolve(argv: Sequence[str] | None) -> TuneSettings:
    """The settings of a command line."""
    return parse(TuneSettings, argv, command="tune", description=DESCRIPTION)


def is_complete(settings: TuneSettings) -> bool:
    """Whether the run has reached its end: result.json is written last."""
    return (settings.out / "result.json").is_file()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return training_command.main(Tune, TuneSettings, argv, description=DESCRIPTION)


class Tune(Stage):
    """Stage 2."""

    command = "tune"
    free = ("store", "train", "valid")
    chosen: TuneSettings

    def __init__(self, chosen: TuneSettings, world: DistributedContext) -> None:
        """Opens the store and reads the conversations.

        Raises:
            DataError: The store is of another base model, or lacks an item.
        """
        from lavic.data.conversations import read_conversations
        from lavic.model.hub import fingerprint, resolve
        from lavic.model.item_store import ItemStore

        super().__init__(chosen, world)
        self.store = ItemStore.open(chosen.store)
        self.store.check_base(fingerprint(resolve(chosen.model)))  # before 15 GB of the wrong model are read
        if chosen.tokens == "items":
            self.store.check_adapter()
        rows = [read_conversations(file, candidates=chosen.candidates) for file in (chosen.train, chosen.valid)]
        if chosen.missing == "drop":
            rows = [stored(each, self.store, chosen.candidates, speak=world.is_main) for each in rows]
        self.train, self.valid = rows

    def inputs(self) -> Iterator[Input]:
        """The item store and the conversations."""
        manifest = self.store.folder / "manifest.json"
        yield Input(name="item store", path=self.chosen.store, digest=digest_files([manifest]), manifest=manifest)
        for context, path in (("training", self.chosen.train), ("validation", self.chosen.valid)):
            yield Input(name=f"{context} set", path=path, digest=digest_files([path]), context=context)

    def load(self, run: Run) -> Parts:
        """The base model without its vision tower, the store's vision adapter merged in, and a language adapter."""
        import torch

        from lavic.data.shard_dataset import Order
        from lavic.model.loading import Backbone
        from lavic.model.lora import add_adapter, apply_adapter
        from lavic.train.recommendation.task import TuneData, TuneTask

        chosen = self.chosen
        backbone = Backbone.load(chosen.model, run.world.device(), vision=False)
        vision = self._vision()
        if chosen.tokens == "items":
            self.store.check_geometry(backbone.geometry)
        if vision:
            apply_adapter(backbone, vision, "vision")

        def data(rows: Sequence[Conversation], shuffle: bool) -> TuneData:
            return TuneData(
                rows,
                self.store,
                backbone.encoder,
                candidates=chosen.candidates,
                max_length=chosen.max_length,
                tokens=chosen.tokens,
                tokens_per_item=chosen.tokens_per_item,
                none_share=chosen.none_share,
                shuffle=shuffle,
                seed=chosen.loop.seed,
            )

        train, valid = data(self.train, chosen.shuffle), data(self.valid, False)
        if not len(train):
            raise DataError(f"{chosen.train}: no conversation has a target")
        train.order = Order(len(train), chosen.loop.seed)
        torch.manual_seed(chosen.loop.seed)
        model = add_adapter(backbone, "language", chosen.lora)
        task = TuneTask(model)
        return Parts(backbone=backbone, model=model, task=task, train=train, valid=valid, vision=vision)

    def save(self, folder: Path, parts: Parts) -> BundleInfo:
        """The bundle of both adapters."""
        from lavic.model.bundle import save_bundle

        chosen = self.chosen
        return save_bundle(
            folder,
            parts.backbone,
            vision=self._vision(),
            language=parts.model,
            tokens=chosen.tokens,
            max_length=chosen.max_length,
            tokens_per_item=max(chosen.tokens_per_item, default=None),
            none=chosen.none_share > 0,
            revision=chosen.model.revision,
            weights=parts.weights,
        )

    def validated(self, run: Run, step: int, score: Score, kept: bool) -> None:
        """Nothing to note besides what the loop notes."""

    def artifacts(self) -> Sequence[str]:
        """Nothing besides what every stage keeps."""
        return ()

    def farewell(self, folder: RunFolder) -> str:
        """What comes next."""
        words = shlex.join(["lavic", "evaluate", "--bundle", str(folder.bundle), "--store", str(self.chosen.store)])
        return f"{folder.bundle}: done; next: {words} --test ..."

    def _vision(self) -> Path | None:
        """The adapter that made the store; nothing for a run that does not look."""
        return self.store.vision_adapter if self.chosen.tokens == "items" else None


def stored(rows: Sequence[Conversation], store: ItemStore, key: str, *, speak: bool) -> list[Conversation]:
    """The conversations that have a target in the store, less the candidates and targets that it does not hold.

    Raises:
        DataError: None is left.
    """
    kept, gone = [], 0
    for row in rows:
        targets = tuple(id for id in row.targets if id in store)
        listed = tuple(id for id in row.candidates[key] if id in store)
        gone += len(row.candidates[key]) - len(listed)
        if targets and len({*listed, *targets}) > 1:
            kept.append(replace(row, targets=targets, candidates={**row.candidates, key: listed}))
    file = rows[0].file
    if not kept:
        raise DataError(f"{file}: no conversation has a target and another candidate in {store.folder}")
    if speak and (gone or len(kept) < len(rows)):
        print(f"{file}: {len(rows) - len(kept)} of {len(rows)} rows and {gone} candidates left out: not in the store")
    return kept
