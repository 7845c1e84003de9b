"""Validation: the loss per target token over a whole set, the same for any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from lavic.distributed.context import DistributedContext
from lavic.distributed.signals import StopRequest
from lavic.errors import ConfigError
from lavic.train.input.data_loader import Minibatch, Samples, prepare
from lavic.train.input.length_bucketing import cut

WINDOW = 8
"""Batches of like lengths that are made together; a loader worker makes one window at a time."""


@dataclass(frozen=True)
class Score:
    """How well a task does on a set."""

    loss: float
    """Mean negative log-likelihood of a target token, nats."""
    tokens: int
    """Target tokens it is the mean of."""

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    def as_dict(self) -> dict[str, float]:
        return {"loss": self.loss, "perplexity": self.perplexity, "tokens": self.tokens}


class NoTargets(ConfigError):
    """A set in which nothing can be scored."""


@torch.no_grad()
def score(
    task: nn.Module,
    samples: Samples[Any],
    world: DistributedContext,
    *,
    batch: int,
    device: torch.device,
    tokens: int | None = None,
    workers: int = 0,
    stop: StopRequest | None = None,
    at: Callable[[str], None] = lambda place: None,
) -> Score:
    """Runs every sample once, without dropout. Collective.

    Args:
        task: Gives the loss of each target token of a batch.
        samples: One epoch of it is read: positions 0 to n - 1.
        world: The ranks; each takes every size-th sample.
        batch: Most samples of one forward pass.
        device: Where the task is.
        tokens: Most tokens of one forward pass, padding and photos' worth included; None: any number.
        workers: Processes that prepare samples ahead; 0 prepares them between the passes.
        stop: Heeded every few batches: a large set takes longer than a scheduler waits.
        at: Told where in the set this rank is.

    Raises:
        NoTargets: The set has no target token.
        Stopped: On request.
    """
    stop = stop or StopRequest()
    was_training = task.training
    task.eval()
    total = torch.zeros(2, dtype=torch.float64, device=device)
    share = range(world.rank, len(samples), world.size)
    longest = math.ceil(len(samples) / world.size)  # a rank with one sample less must still agree as often
    windows = [share[first : first + WINDOW * batch] for first in range(0, longest, WINDOW * batch)]
    make = partial(_window, samples, windows, batch, tokens)
    for number, minibatches in enumerate(prepare(make, range(len(windows)), workers)):
        at(f"window {number + 1}")
        stop.raise_if_requested(world)
        for minibatch in minibatches:
            losses = task(minibatch.to(device))
            total += torch.stack([losses.sum(dtype=torch.float64), total.new_tensor(losses.numel())])
    task.train(was_training)
    at("the end")
    loss, tokens = world.all_reduce(total).tolist()
    if not tokens:
        raise NoTargets("the validation set has no target token: it is empty, or no sample of it fits --max-length")
    return Score(loss / tokens, int(tokens))


def _window(
    samples: Samples[Any], windows: Sequence[range], batch: int, tokens: int | None, number: int
) -> list[Minibatch]:
    window = [samples[position] for position in windows[number]]
    groups = cut([s.length for s in window], tokens=tokens, most=batch, overhead=samples.overhead)
    return [samples.collate([window[i] for i in group]) for group in groups]
