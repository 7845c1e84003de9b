"""The one training loop. What differs between the stages sits in the task and its data."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from lavic.distributed.context import DistributedContext
from lavic.distributed.hang_watchdog import HangWatchdog
from lavic.distributed.signals import StopRequest
from lavic.errors import DataError, LavicError, Stopped
from lavic.tracking.tracker import Tracker
from lavic.train.checkpoint import Checkpoints, Progress
from lavic.train.config import LoopSettings
from lavic.train.deepspeed.engine import Engine
from lavic.train.evaluation import Score, score
from lavic.train.input.data_loader import Feed, Minibatch, Samples
from lavic.train.input.sample_denylist import Skipping, read_keys
from lavic.train.measure.flops import counter
from lavic.train.measure.peak_flops import peak
from lavic.train.measure.throughput import Meter
from lavic.train.progress_display import Console
from lavic.train.sanity_checks import blame

log = logging.getLogger(__name__)
_NOTED = 1000
"""Keys of skipped samples that the journal names."""


class Diverged(LavicError):
    """A loss or a gradient that is not finite; no weight was changed by it. All ranks raise the same."""

    def __init__(self, what: str, samples: str, lr: float, *, stop: bool) -> None:
        """Describes it.

        Args:
            what: What is not finite.
            samples: Whose it is.
            lr: The step's learning rate.
            stop: Whether any rank was asked to stop.
        """
        super().__init__(
            f"the {what} of {samples} is not finite: look at these samples, then run the same command again with "
            "--loop.skip-samples FILE (their keys, one a line), with --loop.max-skipped 1 to leave out this step, or "
            f"with a lower --loop.lr (now {lr:g})"
        )
        self.what, self.samples, self.stop = what, samples, stop


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, over all ranks."""

    loss: float
    """Mean over the step's target tokens, nats."""
    norm: float
    """Of the gradient, before clipping."""
    targets: int
    tokens: int
    """Without padding."""
    skipped: int
    """Samples without a target token."""
    stop: bool
    """Whether any rank was asked to stop."""


def fit(
    engine: Engine,
    train: Samples[Any],
    valid: Samples[Any],
    checkpoints: Checkpoints,
    tracker: Tracker,
    loop: LoopSettings,
    world: DistributedContext,
    *,
    on_validation: Callable[[int, Score, bool], None] | None = None,
    stop: StopRequest | None = None,
    watchdog: HangWatchdog | None = None,
) -> Progress:
    """Trains to the end, from the newest whole checkpoint or from the start. Collective.

    The loss of a step is the mean over its target tokens, on all ranks and in all micro steps: it does not depend on
    how the step's samples are split. At the same world size a resumed run gives the same losses to every digit.

    Args:
        engine: Holds the task.
        train: Read endlessly, by position.
        valid: One epoch of it is scored at each validation.
        checkpoints: Where to go on from and save to.
        tracker: Told every step and validation.
        loop: How.
        world: The ranks.
        on_validation: Called on every rank after a validation: with the steps done, the score, and whether it is the
            best of a trained model so far.
        stop: Heeded in every step and while validating; one of its own where none is open yet.
        watchdog: Names the rank that the others wait for; by default one for the length of this call.

    Returns:
        Where the run stands: at the end.

    Raises:
        Stopped: On request, after saving.
        Diverged: Before a step that would have spoilt the weights, more often than `loop.max_skipped`; names the
            samples.
        ConfigError: A batch that the ranks cannot share, or a checkpoint of another model or other data.
        DataError: A step without any target token.
    """
    if keys := world.broadcast_object(read_keys(loop.skip_samples)):
        train = _without(train, keys, tracker, world)
    feed = Feed(train, world, loop)
    total = loop.total(len(train))
    loaded = checkpoints.load(engine)
    progress = loaded or Progress()
    console = Console(total, start=progress.step, shown=world.is_main)
    if loaded:
        console.say(f"going on after step {progress.step} of {total}")
    tracker.event("resume", step=progress.step, total=total)  # whatever an earlier start wrote beyond it is taken back
    saved = progress.step
    most = peak(engine.device, next(engine.task.parameters()).dtype)
    with (
        nullcontext(stop) if stop else StopRequest() as stop,
        nullcontext(watchdog)
        if watchdog
        else HangWatchdog(world, warn_after_s=60 * loop.hang_warn_minutes) as watchdog,
        Meter(engine.task, world, flops=counter(engine.task), peak=most) as meter,
    ):
        batches = feed.steps(progress.step, total)
        while True:
            due = progress.step in (0, total) or (loop.eval_every and progress.step % loop.eval_every == 0)
            if due and progress.validated < progress.step:
                try:
                    result = score(
                        engine.task,
                        valid,
                        world,
                        batch=feed.micro_batch,
                        device=engine.device,
                        tokens=loop.micro_tokens,
                        workers=loop.num_workers,
                        stop=stop,
                        at=watchdog.marker(f"the validation after step {progress.step}"),
                    )
                except Stopped:
                    if progress.step > saved:
                        checkpoints.save(engine, progress)
                    raise
                better = progress.step > 0 and (progress.best_loss is None or result.loss < progress.best_loss)
                progress = replace(progress, validated=progress.step)
                if better:
                    progress = replace(progress, best_step=progress.step, best_loss=result.loss)
                epoch = progress.samples / len(train)
                tracker.log(progress.step, epoch=epoch, valid_loss=result.loss, valid_perplexity=result.perplexity)
                console.say(f"step {progress.step}: validation perplexity {result.perplexity:.4f}")
                if on_validation:
                    on_validation(progress.step, result, better)
                meter.restart()
            if progress.step >= total:
                console.close()
                return progress

            watchdog.mark(f"the samples of step {progress.step + 1}")
            micros = meter.wait(batches)
            lr = loop.rate(progress.step + 1, total)
            values = {"lr": lr}
            try:
                done = take_step(
                    engine,
                    micros,
                    lr,
                    world,
                    stream=(loop.seed, progress.step),
                    stop=stop,
                    at=watchdog.marker(f"step {progress.step + 1}"),
                )
            except Diverged as problem:
                if progress.skipped_steps >= loop.max_skipped:
                    raise
                progress = replace(progress, skipped_steps=progress.skipped_steps + 1)
                tracker.event("skipped_step", step=progress.step + 1, reason=problem.what, samples=problem.samples)
                console.say(
                    f"step {progress.step + 1} is left out ({progress.skipped_steps} of --loop.max-skipped "
                    f"{loop.max_skipped}): the {problem.what} of {problem.samples} is not finite"
                )
                values["skipped_steps"] = progress.skipped_steps
                stopping = problem.stop
                meter.restart()  # the search for the samples was no training
            else:
                values |= {"loss": done.loss, "grad_norm": done.norm}
                values |= {"skipped": done.skipped} if done.skipped else {}
                stopping = done.stop
            progress = replace(progress, step=progress.step + 1, samples=progress.samples + loop.global_batch_size)
            if progress.step % loop.log_every == 0 or progress.step == total:
                values |= meter.read()
                tracker.log(progress.step, **values)
                console.step(progress.step, values)
            if progress.step % loop.save_every == 0 or progress.step == total or stopping:
                watchdog.mark(f"the checkpoint after step {progress.step}")
                checkpoints.save(engine, progress)
                saved = progress.step
                meter.restart()
            if stopping:
                console.close()
                raise Stopped


def take_step(
    engine: Engine,
    micros: Sequence[Minibatch],
    lr: float,
    world: DistributedContext,
    *,
    stream: tuple[int, ...] = (0,),
    stop: StopRequest | None = None,
    at: Callable[[str], None] = lambda place: None,
) -> StepResult:
    """One optimizer step on this rank's micro-batches. Collective.

    Args:
        engine: Holds the task.
        micros: As many on every rank.
        lr: Learning rate.
        world: The ranks.
        stream: Names the random numbers of dropout, with the rank and the micro step: nothing to save, nothing to lose.
        stop: Looked at when the step is nearly done: the result says whether any rank was asked to stop.
        at: Told where in the step this rank is.

    Raises:
        Diverged: A loss or the gradient is not finite; the weights are as before, and the next step may be taken.
        DataError: There is no target token in the step.
    """
    here = torch.tensor(
        [
            sum(sum(micro.targets) for micro in micros),
            sum(micro.tokens for micro in micros),
            sum(micro.targets.count(0) for micro in micros),
        ]
    )
    at("the count")
    targets, tokens, skipped = world.all_reduce(here).tolist()
    if not targets:
        raise DataError(
            f"none of the samples {_some([key for micro in micros for key in micro.keys])} has a target: "
            "are the photos described (`lavic describe`), and is max_length long enough?"
        )
    if not engine.task.training:  # walking through a large model takes milliseconds
        engine.task.train()
    losses = []
    for number, micro in enumerate(micros):
        torch.manual_seed(_seed(*stream, world.rank, number))
        at(f"forward {number + 1}")
        loss = engine.forward(micro.to(engine.device))
        losses.append(loss.detach())
        at(f"backward {number + 1}")
        # the engine averages over ranks, the loss is a mean over the tokens of all of them
        engine.backward(loss.sum() * (world.size / targets), last=number == len(micros) - 1)
    nll = torch.cat(losses).sum(dtype=torch.float64)
    at("the update")
    asked = nll.new_tensor(stop is not None and stop.requested)
    total, diverged, stopping = world.all_reduce(torch.stack([nll, ~nll.isfinite(), asked])).tolist()
    norm = math.nan if diverged else engine.step(lr)
    if not math.isfinite(norm):
        if diverged:
            engine.discard()
        at("the search for what is not finite")
        samples = blame(engine.task, micros, losses, world)
        raise Diverged("loss" if diverged else "gradient", samples, lr, stop=bool(stopping))
    return StepResult(total / targets, norm, targets, tokens, skipped, bool(stopping))


def _without(train: Samples[Any], keys: Sequence[str], tracker: Tracker, world: DistributedContext) -> Skipping:
    """The training set without some samples; rank 0 says which of them it does not have."""
    kept = Skipping(train, keys)
    unknown = kept.unknown() if world.is_main else []
    if unknown:
        log.warning(
            "--loop.skip-samples: %d of %d keys are not in the training set: %s",
            len(unknown),
            len(keys),
            _some(unknown),
        )
    tracker.event("skip_samples", keys=keys[:_NOTED], samples=len(keys) - len(unknown))
    return kept


def _some(keys: Sequence[str]) -> str:
    return ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")


def _seed(*stream: int) -> int:
    """A seed from a few numbers, unlike the seeds of neighbouring ones."""
    digest = hashlib.blake2b(repr(stream).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
