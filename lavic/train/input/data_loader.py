"""Which samples make a step, and on which rank: from endless positions to micro-batches."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from lavic.distributed.context import DistributedContext
from lavic.errors import ConfigError, DataError, LavicError
from lavic.train.config import LoopSettings
from lavic.train.input.length_bucketing import cut, deal


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

    @property
    def padded(self) -> int:
        """Tokens of all samples, with padding."""

    def to(self, device: torch.device) -> Minibatch:
        """The batch on a device."""


S = TypeVar("S", bound=Sample)
T = TypeVar("T")


class Samples(Protocol[S]):
    """A set to train on or to validate with.

    Positions go on after the last sample: position p of a set of n is a sample of epoch p // n. What `samples[p]` gives
    is a function of p and of the set's seed alone, whichever process asks.
    """

    def __len__(self) -> int:
        """Samples of one epoch."""

    def __getitem__(self, position: int) -> S:
        """The sample at a position >= 0."""

    def key(self, position: int) -> str:
        """What the sample at a position is called in messages, without the cost of making it."""

    def lengths(self, positions: Sequence[int]) -> list[int]:
        """Tokens of the samples at some positions, without the cost of making them."""

    @property
    def overhead(self) -> int:
        """What a sample costs besides its tokens, in tokens."""

    def collate(self, samples: Sequence[S]) -> Minibatch:
        """A batch of samples."""


class Feed:
    """One rank's share of every step.

    Step s (from 0) takes the positions s * batch to (s + 1) * batch - 1: the same samples with any number of ranks, so
    the whole state of the feed is the step. Without a budget of tokens rank r has every size-th of them, from r. With
    one the whole step is dealt by length (`batches.deal`), which every rank works out for itself.
    """

    def __init__(self, samples: Samples[Any], world: DistributedContext, loop: LoopSettings) -> None:
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
        self.batch = loop.global_batch_size
        self.workers = loop.num_workers
        self.micro_tokens = loop.micro_tokens
        self.micro_batch, _ = loop.split(world.size)
        self._world = world

    def positions(self, step: int) -> list[int]:
        """This rank's positions in a step, counted from 0."""
        return [position for group in self._groups(step) for position in group]

    def steps(self, first: int, last: int) -> Iterator[list[Minibatch]]:
        """The micro-batches of each step from `first` up to, but not with, `last`."""
        return prepare(self._step, range(first, last), self.workers)

    def _step(self, step: int) -> list[Minibatch]:
        groups = [[self.samples[position] for position in group] for group in self._groups(step)]
        if self.micro_tokens is None:
            # like lengths together: less padding; the loss of a step does not depend on how it is split
            (share,) = groups
            rows = cut([sample.length for sample in share], most=self.micro_batch)
            groups = [[share[i] for i in row] for row in rows]
        return [self.samples.collate(group) for group in groups]

    def _groups(self, step: int) -> list[list[int]]:
        """This rank's positions: its micro-batches where there is a budget, else its whole share in one."""
        places = range(step * self.batch, (step + 1) * self.batch)
        if self.micro_tokens is None:
            return [list(places[self._world.rank :: self._world.size])]
        dealt = deal(
            self.samples.lengths(places),
            self._world.size,
            tokens=self.micro_tokens,
            most=self.micro_batch,
            overhead=self.samples.overhead,
        )
        return [[places[i] for i in group] for group in dealt[self._world.rank]]


def prepare(make: Callable[[int], T], numbers: Sequence[int], workers: int) -> Iterator[T]:
    """Makes something for each number, in order: here and now, or ahead of time in worker processes."""
    for made in DataLoader(
        _Made(make),
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        collate_fn=_unchanged,
        worker_init_fn=_shield if workers else None,
    ):
        if isinstance(made, Exception):
            raise made
        yield made


class _Made(Dataset[Any]):
    """A function as torch's loader wants it."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        self.make = make

    def __getitem__(self, number: int) -> Any:
        """What was made, or the error of ours that kept it from being made.

        An error that is raised in a worker process comes out of torch's loader with a traceback for its message.
        """
        try:
            return self.make(number)
        except LavicError as error:  # some take more than a message, and could not be unpickled
            return (DataError if error.exit_code == DataError.exit_code else LavicError)(str(error))
        except OSError as error:
            return error


def _unchanged(made: Any) -> Any:
    return made


def _shield(_: int) -> None:
    """A stop request goes to the whole process group; workers must live until the step they feed is done."""
    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)
    torch.set_num_threads(1)
