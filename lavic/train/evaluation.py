"""Validation: the loss per target token over a set, the same for any number of ranks, and optional scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import nn

from lavic.distributed.context import DistributedContext
from lavic.errors import ConfigError, LavicError
from lavic.train.input.collate import MicroBatch
from lavic.train.input.data_loader import TaskDataset, prefetch
from lavic.train.input.length_bucketing import bucket_by_length
from lavic.train.nonfinite import name_by_rank

WINDOW_BATCHES = 8
"""Batches of a window, whose samples are sorted by length; a data loader worker prepares one window at a time."""


@dataclass(frozen=True)
class EvalResult:
    """The loss of a task on a set."""

    loss: float
    """Mean negative log-likelihood of a target token, nats."""
    tokens: int
    """Number of target tokens."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Scores by name; higher is better."""

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    def as_dict(self) -> dict[str, float]:
        return {"loss": self.loss, "perplexity": self.perplexity, "tokens": self.tokens}


class Scorer(Protocol):
    """Computes metrics of the task, besides the loss, at each validation; the command passes it to the trainer."""

    def __call__(self, check_stop: Callable[[], None]) -> Mapping[str, float]:
        """Computes the scores. Collective: every rank gets the same values.

        Args:
            check_stop: Call it every few seconds, the same number of times on every rank; may raise Stopped on all.

        Returns:
            Name -> value; higher is better. The names never change in a run.
        """
        ...


class NoTargetTokensError(ConfigError):
    """A set without a target token."""


def evaluate(
    task: nn.Module,
    samples: TaskDataset,
    world: DistributedContext,
    *,
    batch_size: int,
    device: torch.device,
    max_tokens: int | None = None,
    num_workers: int = 0,
    check_stop: Callable[[], None] = lambda: None,
    enter_phase: Callable[[str], None] = lambda phase: None,
) -> EvalResult:
    """Runs every sample once, without dropout. Collective.

    Args:
        task: Returns the loss of each target token of a batch.
        samples: The set; one epoch is read.
        world: The ranks; each takes every size-th sample.
        batch_size: Maximum samples of a forward pass.
        device: Of the task.
        max_tokens: Maximum tokens of a forward pass, with padding and photos; None: any number.
        num_workers: Data loader processes; 0 prepares samples between the passes.
        check_stop: Called every few batches; may raise Stopped on all ranks.
        enter_phase: Called with the name of each window when this rank begins it.

    Raises:
        NoTargetTokensError: The set has no target token.
        LavicError: The loss is not finite; names the samples.
    """
    total = torch.zeros(2, dtype=torch.float64, device=device)
    share = range(world.rank, len(samples), world.size)
    longest = math.ceil(len(samples) / world.size)  # every rank calls check_stop equally often
    size = WINDOW_BATCHES * batch_size
    windows = [share[first : first + size] for first in range(0, longest, size)]
    finite: list[tuple[str, torch.Tensor]] = []
    make = partial(_make_window, samples, windows, batch_size, max_tokens)
    with inference(task):
        for number, batches in enumerate(prefetch(make, range(len(windows)), num_workers)):
            enter_phase(f"window {number + 1}")
            check_stop()
            for batch in batches:
                losses = task(batch.to(device))
                finite += zip(batch.keys, losses.isfinite().split(list(batch.targets)), strict=True)
                total += torch.stack([losses.sum(dtype=torch.float64), total.new_tensor(losses.numel())])
    enter_phase("the end")
    loss, tokens = world.all_reduce(total).tolist()
    if not tokens:
        raise NoTargetTokensError(
            "the validation set has no target token: it is empty, or no sample fits into --max-length"
        )
    if not math.isfinite(loss):
        keys = name_by_rank([key for key, tokens_finite in finite if not tokens_finite.all()], world)
        raise LavicError(
            f"the validation loss of {keys} is not finite: check these samples, then run the same command again with a "
            "lower --loop.lr or with --model.dtype float32"
        )
    return EvalResult(loss / tokens, int(tokens))


@contextmanager
def inference(task: nn.Module) -> Iterator[None]:
    """A block without dropout and without gradients; restores the mode of the task."""
    was_training = task.training
    task.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        task.train(was_training)


def _make_window(
    samples: TaskDataset, windows: Sequence[range], batch_size: int, max_tokens: int | None, number: int
) -> list[MicroBatch]:
    window = [samples[position] for position in windows[number]]
    groups = bucket_by_length(
        [s.length for s in window], max_tokens=max_tokens, max_samples=batch_size, overhead=samples.overhead
    )
    return [samples.collate([window[i] for i in group]) for group in groups]
