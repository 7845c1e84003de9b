"""The common part of `lavic distill` and `lavic tune`, from the command line to the complete run folder.

A stage defines its data, its task and its results; ranks, run folder, tracker and stop requests are handled here.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from lavic.config import flatten
from lavic.distributed.context import DistributedContext
from lavic.distributed.failure import show_error_first
from lavic.distributed.flight_recorder import enable_flight_recorder
from lavic.distributed.hang_watchdog import HangWatchdog
from lavic.distributed.signals import StopRequest
from lavic.errors import ConfigError, DataError
from lavic.launch.training.stage import TrainingRun, TrainingStage
from lavic.tracking.tracker import Tracker
from lavic.train.run_folder import RESULT, RunFolder, write_on_rank_0

log = logging.getLogger(__name__)


def is_complete(settings: Any) -> bool:
    """Whether the run of some settings is complete: result.json is written last."""
    return bool((settings.out / RESULT).is_file())


def run(stage: type[TrainingStage], settings: Any, argv: Sequence[str] | None) -> int:
    """Runs a stage's command; returns its exit code."""
    world = DistributedContext.from_env()
    if settings.dry_run:
        from lavic.launch.training import resource_estimate
        from lavic.train.deepspeed.config import read_deepspeed_config

        read_deepspeed_config(settings.deepspeed)
        ranks = world.size if world.size > 1 else settings.nproc
        print(resource_estimate.estimate(stage.command, settings, ranks))
        return 0
    if world.must_start(settings.nproc):
        from lavic.launch.ranks import local

        return local.run(stage.command, list(argv or ()), settings.nproc)
    with StopRequest() as stop:
        return _run_rank(stage, settings, world, stop)


def _run_rank(stage_class: type[TrainingStage], settings: Any, world: DistributedContext, stop: StopRequest) -> int:
    """Trains in this process; starts or resumes the run."""
    from lavic.train.deepspeed.config import read_deepspeed_config
    from lavic.train.input.sample_denylist import read_denylist

    settings.loop.split_batch(world.size)
    deepspeed_config = read_deepspeed_config(settings.deepspeed)
    read_denylist(settings.loop.skip_samples)  # before a model is loaded
    stage = stage_class(settings, world)
    with RunFolder(settings, command=stage.command, world=world, free=stage.input_keys) as folder:
        if folder.done and not folder.extended:
            if world.is_main:
                folder.check_inputs({data.name: data.digest for data in stage.inputs()})
                unused = f"; not used: {', '.join(folder.changed)}; to continue, raise --loop.steps"
                print(f"{settings.out}: already complete, {settings.out / RESULT}{unused if folder.changed else ''}")
            return 0
        node = world.node_rank if world.local_rank == 0 else None
        records = folder.folder / "flight-recorder" if settings.loop.flight_recorder else None
        if records:
            enable_flight_recorder(records)
        with (
            world.process_group(),
            HangWatchdog(world, warn_after_s=60 * settings.loop.hang_warn_minutes, flight_recorder=records) as watchdog,
            Tracker.open(settings.out, settings.tracking, main=world.is_main, node=node) as tracker,
            show_error_first(stage.command),  # the tracker may wait for MLflow when it closes
            watchdog.reported_errors(),
        ):
            tracker.start(stage.command, flatten(settings))
            training_run = TrainingRun(world=world, folder=folder, tracker=tracker, stop=stop, watchdog=watchdog)
            _train(stage, training_run, deepspeed_config)
    return 0


def _train(stage: TrainingStage, run: TrainingRun, deepspeed_config: Mapping[str, Any]) -> None:
    from lavic.launch.training.bundle_saver import BundleSaver
    from lavic.model.lora import untouched
    from lavic.train.activation_checkpointing import configure_layers
    from lavic.train.callbacks.best_model import BestModel
    from lavic.train.callbacks.checkpointer import Checkpointer
    from lavic.train.callbacks.console import ConsoleLogger
    from lavic.train.callbacks.hang_watchdog import HangWatchdogCallback
    from lavic.train.callbacks.journal import JournalLogger
    from lavic.train.callbacks.stop_on_signal import StopOnSignal
    from lavic.train.callbacks.throughput import ThroughputMonitor
    from lavic.train.checkpoint import CheckpointManager
    from lavic.train.deepspeed.engine import Engine
    from lavic.train.input.sample_denylist import apply_denylist
    from lavic.train.trainer import Trainer

    settings, world, folder, tracker = stage.settings, run.world, run.folder, run.tracker
    run.stop.raise_if_requested(world)
    run.watchdog.mark("the model and the data")
    run.components = components = stage.load(run)
    run.watchdog.mark("the engine")
    run.stop.raise_if_requested(world)
    configure_layers(components.model, settings.loop)
    engine = Engine(components.task, world, settings.loop, extra=deepspeed_config)

    identity = {
        "base model": components.backbone.fingerprint,
        "prompt version": components.backbone.encoder.version,
        "tokenizer": components.backbone.tokenizer_digest,
    }
    inputs: dict[str, str] = {}
    if world.is_main:
        for data in stage.inputs():
            inputs[data.name] = identity[data.name] = data.digest
            tracker.dataset(data.name, data.digest, data.path, context=data.context, manifest=data.manifest)
        tracker.tag({f"digest.{name}": digest for name, digest in identity.items()})
    identity = world.broadcast_object(identity)
    checkpoints = CheckpointManager(folder.checkpoints, world, keep=settings.loop.save_total_limit, identity=identity)
    if folder.changed:
        total = settings.loop.total_steps(len(components.train))
        _accept_changes(run, settings, steps=checkpoints.latest_step(), total=total)

    trainer = Trainer(
        engine,
        apply_denylist(components.train, settings.loop.skip_samples, tracker, world),
        components.valid,
        settings.loop,
        world,
        [
            HangWatchdogCallback(run.watchdog),
            StopOnSignal(run.stop),
            Checkpointer(checkpoints),
            BestModel(stage.selecting_score),
            JournalLogger(tracker),
            ConsoleLogger(),
            BundleSaver(stage, run),
            ThroughputMonitor(),
        ],
        components.scorer,
    )
    state = trainer.fit()
    run.watchdog.mark("the end")
    if untouched(components.model):
        raise DataError("nothing was trained: every LoRA B is still zero; is --loop.lr too small?")
    best = {"best_step": state.best_step, "best_loss": state.best_loss}
    if stage.selecting_score is not None:
        best[f"best_{stage.selecting_score}"] = state.best_score
    _finish(stage, run, inputs, steps=state.step, **best)


def _accept_changes(run: TrainingRun, settings: Any, *, steps: int, total: int) -> None:
    """Resumes after so many steps with settings that were changed since the last start.

    Raises:
        ConfigError: The run has more steps already than their total, or is complete and its checkpoints are gone.
    """
    if not steps and run.folder.done:
        raise ConfigError(
            f"{settings.out}: its run is complete and has no checkpoint to continue from: restore "
            f"{run.folder.checkpoints}, or use another --out"
        )
    if steps > total:
        raise ConfigError(
            f"{settings.out}: {steps} steps are done, more than the {total} of --loop.steps or --loop.epochs: raise it"
        )
    run.tracker.event("settings", step=steps, changed=run.folder.changed)
    changes = run.folder.accept_changes(settings)
    if run.world.is_main:
        log.info("from step %d on: %s", steps + 1, changes)


def _finish(stage: TrainingStage, run: TrainingRun, inputs: Mapping[str, str], **result: Any) -> None:
    """Rank 0 writes the result; a failure ends every rank. `inputs`: digests of the data that it was trained on."""
    from lavic.model.bundle import BundleInfo

    folder, tracker = run.folder, run.tracker

    def write() -> None:
        info = BundleInfo.read(folder.bundle)
        adapters = {"vision": info.vision_adapter, "language": info.language_adapter}
        tracker.tag({f"adapter.{kind}": digest for kind, digest in adapters.items() if digest})
        for name in ("config.yaml", "bundle", *stage.artifacts()):
            tracker.artifact(folder.folder / name)
        folder.finish({"command": stage.command, **result, **stage.result()}, inputs)
        print(stage.completion_message(folder))

    write_on_rank_0(folder.folder / RESULT, write, run.world)
