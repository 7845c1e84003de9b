"""Finds the samples of a step whose loss or gradient is not finite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from lavic.distributed.context import DistributedContext
from lavic.errors import LavicError, first_names

if TYPE_CHECKING:
    from lavic.train.input.collate import MicroBatch

NAMED_SAMPLES = 5
"""Samples that a message names; the others are counted."""


class NonFiniteError(LavicError):
    """A loss or a gradient is not finite; no weight was changed. Raised on all ranks.

    Args:
        quantity: `loss` or `gradient`.
        stop: Whether any rank has a stop request.
    """

    def __init__(self, quantity: str, samples: str, lr: float, *, stop: bool) -> None:
        super().__init__(
            f"the {quantity} of {samples} is not finite: check these samples, then run the same command again with "
            "--loop.skip-samples FILE (their keys, one per line), with --loop.max-skipped 1 to skip this step, or with "
            f"a lower --loop.lr (now {lr:g})"
        )
        self.quantity, self.samples, self.stop = quantity, samples, stop


def find_nonfinite_samples(
    task: nn.Module, micro_batches: Sequence[MicroBatch], losses: Sequence[torch.Tensor], world: DistributedContext
) -> str:
    """The samples whose loss is not finite, or else those whose gradient is not, with their ranks. Collective.

    Args:
        task: With the weights before the step.
        losses: The losses of the target tokens of each micro-batch.
    """
    keys = [key for batch, loss in zip(micro_batches, losses, strict=True) for key in _nonfinite_keys(batch, loss)]
    if named := name_by_rank(keys, world):
        return named
    # All losses are finite, so a gradient is not: run the micro-batches separately.
    trained = [p for p in task.parameters() if p.requires_grad]
    device = trained[0].device
    for batch in micro_batches:
        gradients = torch.autograd.grad(task(batch.to(device)).sum(), trained, allow_unused=True)
        if not all(g.isfinite().all() for g in gradients if g is not None):
            keys += batch.keys
    # or only the sum of the gradients is not finite
    return name_by_rank(keys, world) or name_by_rank([key for batch in micro_batches for key in batch.keys], world)


def name_by_rank(keys: Sequence[str], world: DistributedContext) -> str:
    """The keys that each rank passes, with their ranks; "" if there are none. Collective."""
    by_rank = world.all_gather_object(list(keys))
    parts = [f"{first_names(keys, NAMED_SAMPLES)} on rank {rank}" for rank, keys in enumerate(by_rank) if keys]
    return "; ".join(parts[:4]) + (f"; and {len(parts) - 4} more ranks" if len(parts) > 4 else "")


def _nonfinite_keys(batch: MicroBatch, losses: torch.Tensor) -> list[str]:
    parts = losses.split(list(batch.targets))
    return [key for key, part in zip(batch.keys, parts, strict=True) if not part.isfinite().all()]
