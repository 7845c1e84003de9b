"""One optimizer step over all ranks: forward and backward passes of its micro-batches, reduction, update."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lavic.distributed.context import DistributedContext
from lavic.errors import DataError, first_names
from lavic.train.deepspeed.engine import Engine
from lavic.train.input.collate import MicroBatch
from lavic.train.nonfinite import NAMED_SAMPLES, NonFiniteError, find_nonfinite_samples


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, over all ranks."""

    loss: float
    """Mean over the step's target tokens, nats."""
    grad_norm: float
    """Before clipping."""
    targets: int
    """Target tokens."""
    tokens: int
    """Without padding."""
    skipped: int
    """Samples without a target token."""
    stop: bool
    """Whether any rank has a stop request."""


class NoTargetsError(DataError):
    """None of a step's samples has a target token. Raised on all ranks.

    Args:
        keys: This rank's samples.
        stop: Whether any rank has a stop request.
    """

    def __init__(self, keys: Sequence[str], *, stop: bool) -> None:
        super().__init__(
            f"none of the samples {first_names(keys, NAMED_SAMPLES)} has a target: are the photos described "
            "(`lavic describe`), and is max_length long enough?"
        )
        self.stop = stop


def train_step(
    engine: Engine,
    micro_batches: Sequence[MicroBatch],
    lr: float,
    world: DistributedContext,
    *,
    seed: tuple[int, ...] = (0,),
    stop_requested: Callable[[], bool] = lambda: False,
    enter_phase: Callable[[str], None] = lambda phase: None,
) -> StepResult:
    """Takes one optimizer step on this rank's micro-batches. Collective.

    The loss is the mean over the target tokens of all ranks and micro-batches.

    Args:
        engine: With the task.
        micro_batches: The same number on every rank.
        lr: Learning rate.
        world: The ranks.
        seed: Of dropout, with the rank and the number of the micro-batch, so that there is no generator state to save.
        stop_requested: Whether this rank has a stop request; called once, after the last backward pass.
        enter_phase: Called with the name of each part of the step when this rank begins it.

    Raises:
        NonFiniteError: A loss or the gradient is not finite; the weights are unchanged, and the next step may follow.
        NoTargetsError: The step has no target token; the weights are unchanged, and the next step may follow.
    """
    counts = torch.tensor(
        [
            sum(sum(batch.targets) for batch in micro_batches),
            sum(batch.tokens for batch in micro_batches),
            sum(batch.targets.count(0) for batch in micro_batches),
        ]
    )
    enter_phase("the token count")
    targets, tokens, skipped = world.all_reduce(counts).tolist()
    if not targets:
        keys = [key for batch in micro_batches for key in batch.keys]
        raise NoTargetsError(keys, stop=world.any_rank(stop_requested()))
    if not engine.task.training:  # train() takes milliseconds on a large model
        engine.task.train()
    losses = []
    for number, batch in enumerate(micro_batches):
        torch.manual_seed(_hash_seed(*seed, world.rank, number))
        enter_phase(f"forward {number + 1}")
        loss = engine.forward(batch.to(engine.device))
        losses.append(loss.detach())
        enter_phase(f"backward {number + 1}")
        # The engine averages over ranks; the loss is the mean over the tokens of all ranks.
        engine.backward(loss.sum() * (world.size / targets), last=number == len(micro_batches) - 1)
    nll = torch.cat(losses).sum(dtype=torch.float64)
    enter_phase("the update")
    stop = nll.new_tensor(stop_requested())
    total, nonfinite, stopping = world.all_reduce(torch.stack([nll, ~nll.isfinite(), stop])).tolist()
    grad_norm = math.nan if nonfinite else engine.step(lr)
    if not math.isfinite(grad_norm):
        if nonfinite:
            engine.discard_gradients()
        enter_phase("the search for non-finite samples")
        samples = find_nonfinite_samples(engine.task, micro_batches, losses, world)
        raise NonFiniteError("loss" if nonfinite else "gradient", samples, lr, stop=bool(stopping))
    return StepResult(total / targets, grad_norm, targets, tokens, skipped, bool(stopping))


def _hash_seed(*numbers: int) -> int:
    """A seed from several numbers; similar numbers give unrelated seeds."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
