"""What the two training stages have in common as commands: from the words typed to the finished run folder.

A stage (`distill`, `tune`) says what it reads, what it trains and what it keeps; the rest is here once: the ranks, the
run's folder, the tracker, stop requests from the first moment on, the loop, and how a run ends.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lavic.config import flatten, parse
from lavic.distributed.context import DistributedContext
from lavic.distributed.failure import show_error_first
from lavic.distributed.flight_recorder import enable_flight_recorder
from lavic.distributed.hang_watchdog import HangWatchdog
from lavic.distributed.signals import StopRequest
from lavic.errors import ConfigError, DataError
from lavic.tracking.tracker import Tracker
from lavic.train.run_folder import RunFolder, write_together

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from torch import nn

    from lavic.model.bundle import BundleInfo
    from lavic.model.loading import Backbone
    from lavic.train.evaluation import Score
    from lavic.train.input.data_loader import Samples


log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Input:
    """A file or set that a stage reads, for the record and to tell whether a run goes on with the same."""

    name: str
    """For messages: "training set"."""
    path: Path
    digest: str
    """Of its content, whatever it is called."""
    manifest: Path | None = None
    """A small file that describes it and is kept with the record."""
    context: str = ""
    """What it is for, in MLflow's words: training, validation."""


@dataclass(kw_only=True)
class Parts:
    """What a stage trains, loaded."""

    backbone: Backbone
    model: PeftModel
    """The base model with the adapter in training."""
    task: nn.Module
    train: Samples[Any]
    valid: Samples[Any]
    vision: Path | None = None
    """Of stage 2: the vision adapter that it stands on."""
    weights: Mapping[str, torch.Tensor] | None = None
    """What is trained in full precision, on rank 0, when a bundle is saved; see `Engine.weights`."""


@dataclass(kw_only=True)
class Run:
    """A run that is going on; every rank has one."""

    world: DistributedContext
    folder: RunFolder
    tracker: Tracker
    stop: StopRequest
    watchdog: HangWatchdog
    parts: Parts = field(init=False)


class Stage(ABC):
    """One training stage. Made on every rank from its settings: reads and checks the inputs, loads no model yet."""

    command: ClassVar[str]
    free: ClassVar[tuple[str, ...]]
    """Settings that name inputs: their content is compared, not where they stand."""

    def __init__(self, chosen: Any, world: DistributedContext) -> None:
        self.chosen = chosen

    @abstractmethod
    def inputs(self) -> Iterator[Input]:
        """What it reads; asked on rank 0 alone."""

    @abstractmethod
    def load(self, run: Run) -> Parts:
        """Loads model and data. Collective."""

    @abstractmethod
    def save(self, folder: Path, parts: Parts) -> BundleInfo:
        """Writes the bundle; called on rank 0."""

    @abstractmethod
    def validated(self, run: Run, step: int, score: Score, kept: bool) -> None:
        """Called on every rank after a validation; `kept`: this adapter is the bundle's for now."""

    def result(self) -> Mapping[str, Any]:
        """What else belongs into result.json."""
        return {}

    @abstractmethod
    def artifacts(self) -> Sequence[str]:
        """Files of the run's folder that are kept with the record."""

    @abstractmethod
    def farewell(self, folder: RunFolder) -> str:
        """What to tell the user at the end."""


def main(stage: type[Stage], settings: type, argv: Sequence[str] | None, *, description: str) -> int:
    """Runs a stage's command; returns its exit code."""
    chosen: Any = parse(settings, argv, command=stage.command, description=description)
    world = DistributedContext.from_env()
    if chosen.dry_run:
        from lavic.launch.training import resource_estimate
        from lavic.train.deepspeed.config import read_json

        read_json(chosen.deepspeed)
        return resource_estimate.show(stage.command, chosen, world)
    if chosen.nproc > 1 and world.size == 1:
        from lavic.launch.ranks import local

        return local.run(stage.command, list(argv or ()), chosen.nproc)
    with StopRequest() as stop:
        return run_stage(stage, chosen, world, stop)


def run_stage(stage: type[Stage], chosen: Any, world: DistributedContext, stop: StopRequest) -> int:
    """Trains, from wherever the run stands."""
    from lavic.train.deepspeed.config import read_json
    from lavic.train.input.sample_denylist import read_keys

    chosen.loop.split(world.size)
    extra = read_json(chosen.deepspeed)
    read_keys(chosen.loop.skip_samples)  # before a model is loaded
    work = stage(chosen, world)
    with RunFolder(chosen, command=stage.command, world=world, free=stage.free) as folder:
        if folder.done and not folder.prolonged:
            if world.is_main:
                unused = f"; to go on, raise --loop.steps: {', '.join(folder.changed)}" if folder.changed else ""
                print(f"{chosen.out}: done before, {chosen.out / 'result.json'}{unused}")
            return 0
        node = world.node_rank if world.local_rank == 0 else None
        records = folder.folder / "flight-recorder" if chosen.loop.flight_recorder else None
        if records:
            enable_flight_recorder(records)
        with (
            world.process_group(),
            HangWatchdog(world, warn_after_s=60 * chosen.loop.hang_warn_minutes, flight_recorder=records) as watchdog,
            Tracker.open(chosen.out, chosen.tracking, main=world.is_main, node=node) as tracker,
            show_error_first(stage.command),  # the tracker may wait for MLflow when it closes
            watchdog.reported_errors(),
        ):
            tracker.start(stage.command, flatten(chosen))
            _train(work, Run(world=world, folder=folder, tracker=tracker, stop=stop, watchdog=watchdog), extra)
    return 0


def _train(stage: Stage, run: Run, extra: Mapping[str, Any]) -> None:
    from lavic.model.lora import untouched
    from lavic.train.activation_checkpointing import arrange
    from lavic.train.checkpoint import Checkpoints
    from lavic.train.deepspeed.engine import Engine
    from lavic.train.sanity_checks import check_bundle
    from lavic.train.trainer import fit

    chosen, world, folder, tracker = stage.chosen, run.world, run.folder, run.tracker
    run.stop.raise_if_requested(world)
    run.watchdog.mark("the model and the data")
    run.parts = parts = stage.load(run)
    run.watchdog.mark("the engine")
    run.stop.raise_if_requested(world)
    arrange(parts.model, chosen.loop)
    engine = Engine(parts.task, world, chosen.loop, extra=extra)
    total = chosen.loop.total(len(parts.train))

    identity = {
        "base model": parts.backbone.fingerprint,
        "prompt version": parts.backbone.encoder.version,
    }
    if world.is_main:
        for one in stage.inputs():
            identity[one.name] = one.digest
            tracker.dataset(one.name, one.digest, one.path, context=one.context, manifest=one.manifest)
        tracker.tag({f"digest.{name}": digest for name, digest in identity.items()})
    identity = world.broadcast_object(identity)
    checkpoints = Checkpoints(folder.checkpoints, world, keep=chosen.loop.save_total_limit, identity=identity)
    if folder.changed:
        _adopt(run, chosen, steps=checkpoints.steps(), total=total)

    def validated(step: int, score: Score, best: bool) -> None:
        kept = step > 0 and (best if chosen.select == "best" else step == total)
        if kept:
            run.watchdog.mark(f"the bundle after step {step}")
            parts.weights = engine.weights()
            write_together(folder.bundle, lambda: stage.save(folder.bundle, parts), world)
            check_bundle(folder.bundle, parts.model, parts.task, parts.valid, world, vision=parts.vision)
        stage.validated(run, step, score, kept)

    progress = fit(
        engine,
        parts.train,
        parts.valid,
        checkpoints,
        tracker,
        chosen.loop,
        world,
        on_validation=validated,
        stop=run.stop,
        watchdog=run.watchdog,
    )
    run.watchdog.mark("the end")
    if untouched(parts.model):
        raise DataError("nothing was learnt: every LoRA B is still zero; is --loop.lr far too small?")
    _finish(stage, run, steps=progress.step, best_step=progress.best_step, best_loss=progress.best_loss)


def _adopt(run: Run, chosen: Any, *, steps: int, total: int) -> None:
    """Goes on with settings that were changed after the last start.

    Args:
        run: The run.
        chosen: Its settings now.
        steps: Steps done, as the newest whole checkpoint has it.
        total: Steps of the whole run by the new settings.

    Raises:
        ConfigError: More steps are done than there shall be.
    """
    if steps > total:
        raise ConfigError(
            f"{chosen.out}: {steps} steps are done, and --loop.steps or --loop.epochs now makes {total} in all: give "
            "as many or more"
        )
    run.tracker.event("settings", step=steps, changed=run.folder.changed)
    said = run.folder.adopt(chosen)
    if run.world.is_main:
        log.info("from step %d on: %s", steps + 1, said)


def _finish(stage: Stage, run: Run, **result: Any) -> None:
    """Rank 0 closes the books; the others wait, so that a run that failed here failed on every rank."""
    from lavic.model.bundle import BundleInfo

    folder, tracker = run.folder, run.tracker

    def write() -> None:
        info = BundleInfo.read(folder.bundle)
        adapters = {"vision": info.vision_adapter, "language": info.language_adapter}
        tracker.tag({f"adapter.{kind}": digest for kind, digest in adapters.items() if digest})
        for name in ("config.yaml", "bundle", *stage.artifacts()):
            tracker.artifact(folder.folder / name)
        folder.finish({"command": stage.command, **result, **stage.result()})
        print(stage.farewell(folder))

    write_together(folder.folder / "result.json", write, run.world)
