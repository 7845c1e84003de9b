"""`lavic tune`: stage 2. LoRA on the language model learns to answer with the ID of the right candidate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import PositiveInt

from lavic.config import flatten, parse, settings
from lavic.errors import DataError
from lavic.model.settings import LoraSettings, ModelSettings
from lavic.tracking import Tracker, TrackingSettings
from lavic.train.run import RunFolder, digest_files
from lavic.train.settings import LoopSettings
from lavic.world import World

if TYPE_CHECKING:
    from lavic.data.records import Conversation
    from lavic.model.itemstore import ItemStore
    from lavic.train.score import Score

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
    loop: LoopSettings = LoopSettings(epochs=1.0, batch=32, lr=5e-5, weight_decay=1e-5)
    """The training loop."""
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
    chosen = parse(TuneSettings, argv, command="tune", description=DESCRIPTION)
    world = World.from_env()
    if chosen.nproc > 1 and world.size == 1:
        from lavic.launch import local

        return local.run("tune", list(argv or ()), chosen.nproc)
    return run(chosen, world)


def run(chosen: TuneSettings, world: World) -> int:
    """Trains, from wherever the run stands."""
    from lavic.data.conversations import read_conversations
    from lavic.model.backbone import fingerprint, resolve
    from lavic.model.itemstore import ItemStore
    from lavic.train.engine import read_json

    chosen.loop.split(world.size)
    extra = read_json(chosen.deepspeed)
    store = ItemStore.open(chosen.store)
    store.check_base(fingerprint(resolve(chosen.model)))  # before 15 GB of the wrong model are read
    train = read_conversations(chosen.train, candidates=chosen.candidates)
    valid = read_conversations(chosen.valid, candidates=chosen.candidates)
    if chosen.missing == "drop":
        train, valid = (stored(rows, store, chosen.candidates, speak=world.is_main) for rows in (train, valid))
    folder = RunFolder(chosen, command="tune", world=world, free=("store", "train", "valid"))
    if folder.done:
        if world.is_main:
            print(f"{chosen.out}: done before, {chosen.out / 'result.json'}")
        return 0
    with world.together(), Tracker.open(chosen.out, chosen.tracking, main=world.is_main) as tracker:
        tracker.start("tune", flatten(chosen))
        _train(chosen, world, folder, tracker, store, train, valid, extra)
    return 0


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


def _train(
    chosen: TuneSettings,
    world: World,
    folder: RunFolder,
    tracker: Tracker,
    store: ItemStore,
    train_rows: Sequence[Conversation],
    valid_rows: Sequence[Conversation],
    extra: dict[str, Any],
) -> None:
    import torch

    from lavic.data.dataset import Order
    from lavic.model.adapters import add_adapter, merge_adapter, untouched
    from lavic.model.backbone import Backbone
    from lavic.model.bundle import save_bundle
    from lavic.train.checkpoint import Checkpoints
    from lavic.train.engine import Engine
    from lavic.train.loop import fit
    from lavic.train.tasks import TuneData, TuneTask

    backbone = Backbone.load(chosen.model, world.device(), vision=False)
    looks = chosen.tokens == "items"
    if looks and store.vision_adapter:
        merge_adapter(backbone, store.vision_adapter, "vision")

    def data(rows: Sequence[Conversation], shuffle: bool) -> TuneData:
        return TuneData(
            rows,
            store,
            backbone.encoder,
            candidates=chosen.candidates,
            max_length=chosen.max_length,
            tokens=chosen.tokens,
            shuffle=shuffle,
            seed=chosen.loop.seed,
        )

    train, valid = data(train_rows, chosen.shuffle), data(valid_rows, False)
    if not len(train):
        raise DataError(f"{chosen.train}: no conversation has a target")
    train.order = Order(len(train), chosen.loop.seed)
    torch.manual_seed(chosen.loop.seed)
    model = add_adapter(backbone, "language", chosen.lora)
    engine = Engine(TuneTask(model), world, chosen.loop, extra=extra)
    total = chosen.loop.total(len(train))

    def validated(step: int, result: Score, best: bool) -> None:
        if world.is_main and (best if chosen.select == "best" else step == total):
            save_bundle(
                folder.bundle,
                backbone,
                vision=store.vision_adapter if looks else None,
                language=model,
                tokens=chosen.tokens,
                max_length=chosen.max_length,
                revision=chosen.model.revision,
            )

    identity = {
        "base model": backbone.fingerprint,
        "item store": digest_files([store.folder / "manifest.json"]),
        "training set": digest_files([chosen.train]),
        "validation set": digest_files([chosen.valid]),
    }
    checkpoints = Checkpoints(folder.checkpoints, world, keep=chosen.loop.keep, identity=identity)
    progress = fit(engine, train, valid, checkpoints, tracker, chosen.loop, world, on_validation=validated)
    if untouched(model):
        raise DataError("nothing was learnt: every LoRA B is still zero; is --loop.lr far too small?")
    for name in ("config.yaml", "bundle"):
        tracker.artifact(folder.folder / name)
    best = {"best_step": progress.best_step, "best_loss": progress.best_loss}
    folder.finish({"command": "tune", "steps": progress.step, **best})
    if world.is_main:
        print(f"{folder.bundle}: done; next: lavic evaluate --bundle {folder.bundle} --store {chosen.store} --test ...")
