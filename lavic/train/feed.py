"""Which samples make a step, and on which rank: from endless positions to micro-batches."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from lavic.errors import ConfigError
from lavic.train.settings import LoopSettings
from lavic.world import World


class Sample(Protocol):
    """One training example on its way into a batch."""

    @property
    def length(self) -> int:
        """Tokens: samples of like length share a micro-batch."""


class Minibatch(Protocol):
    """What a task's forward takes."""

    @property
    def keys(self) -> Sequence[str]:
        """What each sample is called in messages."""

    @property
    def targets(self) -> Sequence[int]:
        """Target tokens of each sample."""

    @property
    def tokens(self) -> int:
        """Tokens of all samples, without padding."""

    def to(self, device: torch.device) -> Minibatch:
        """The batch on a device."""


S = TypeVar("S", bound=Sample)


class Samples(Protocol[S]):
    """A set to train on or to validate with.

    Positions go on after the last sample: position p of a set of n is a sample of epoch p // n. What `samples[p]` gives
    is a function of p and of the set's seed alone, whichever process asks.
    """

    def __len__(self) -> int:
        """Samples of one epoch."""

    def __getitem__(self, position: int) -> S:
        """The sample at a position >= 0."""

    def collate(self, samples: Sequence[S]) -> Minibatch:
        """A batch of samples."""


class Feed:
    """One rank's share of every step.

    Step s (from 0) takes the positions s * batch to (s + 1) * batch - 1, of which rank r has every size-th, from r. So
    a step holds the same samples with any number of ranks, and the whole state of the feed is the step.
    """

    def __init__(self, samples: Samples[Any], world: World, loop: LoopSettings) -> None:
        """Checks that there is something to share out.

        Args:
            samples: What to train on.
            world: The ranks.
            loop: Batch, micro-batch and workers.

        Raises:
            ConfigError: There is nothing to train on, or ranks would get unequal shares.
        """
        if not len(samples):
            raise ConfigError("there is nothing to train on: the training set is empty")
        self.samples = samples
        self.batch = loop.batch
        self.workers = loop.workers
        self.micro_batch, self.micro_steps = loop.split(world.size)
        self._world = world

    def positions(self, step: int) -> range:
        """This rank's positions in a step, counted from 0."""
        return range(step * self.batch + self._world.rank, (step + 1) * self.batch, self._world.size)

    def steps(self, first: int, last: int) -> Iterator[list[Minibatch]]:
        """The micro-batches of each step from `first` up to, but not with, `last`."""
        loader = DataLoader(
            _Positions(self.samples),
            batch_sampler=(list(self.positions(step)) for step in range(first, last)),
            collate_fn=self._split,
            num_workers=self.workers,
            worker_init_fn=_shield if self.workers else None,
            pin_memory=False,
        )
        yield from loader

    def _split(self, share: list[Any]) -> list[Minibatch]:
        # like lengths together: less padding; the loss of a step does not depend on how it is split
        share.sort(key=lambda sample: sample.length)
        return [
            self.samples.collate(share[start : start + self.micro_batch])
            for start in range(0, len(share), self.micro_batch)
        ]


class _Positions(Dataset[Any]):
    """A set as torch's loader wants it."""

    def __init__(self, samples: Samples[Any]) -> None:
        self.samples = samples

    def __getitem__(self, position: int) -> Any:
        return self.samples[position]


def _shield(_: int) -> None:
    """A stop request goes to the whole process group; workers must live until the step they feed is done."""
    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)
    torch.set_num_threads(1)
