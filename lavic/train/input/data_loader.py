"""Loads the micro-batches of each step and distributes them over the ranks, with prefetching in worker processes."""

from __future__ import annotations

import atexit
import signal
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from typing import Any, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from lavic.distributed.context import DistributedContext
from lavic.errors import ConfigError, DataError, LavicError
from lavic.train.config import LoopSettings
from lavic.train.input.collate import MicroBatch, Sample
from lavic.train.input.length_bucketing import balance_micro_batches, bucket_by_length

T = TypeVar("T")


class TaskDataset(Protocol):
    """A training or validation set.

    Positions are unbounded: position p of a set of n samples is in epoch p // n. `dataset[p]` depends only on p and on
    the set's seed, in every process.
    """

    def __len__(self) -> int:
        """Samples of one epoch."""

    def __getitem__(self, position: int) -> Sample:
        """The sample at a position >= 0."""

    def key(self, position: int) -> str:
        """The name of a sample in messages; cheap."""

    def lengths(self, positions: Sequence[int]) -> list[int]:
        """Tokens of samples; cheap."""

    @property
    def overhead(self) -> int:
        """Cost of a sample besides its tokens, in tokens."""

    def collate(self, samples: Sequence[Any]) -> MicroBatch:
        """A batch of samples."""


class TrainDataLoader:
    """Loads a rank's share of every step.

    Step s (from 0) has the positions s * batch to (s + 1) * batch - 1, with any number of ranks: the step is the only
    state of the loader. Without `micro_tokens`, rank r takes every size-th position, from r. Otherwise the samples are
    distributed by length (`balance_micro_batches`), which every rank computes independently.

    Raises:
        ConfigError: The training set is empty, or ranks would get unequal shares.
    """

    def __init__(self, samples: TaskDataset, world: DistributedContext, loop: LoopSettings) -> None:
        if not len(samples):
            raise ConfigError("the training set is empty")
        self.samples = samples
        self.batch = loop.global_batch_size
        self.workers = loop.num_workers
        self.micro_tokens = loop.micro_tokens
        self.micro_batch, _ = loop.split_batch(world.size)
        self._world = world

    def positions(self, step: int) -> list[int]:
        """This rank's positions in a step, counted from 0."""
        return [position for group in self._groups(step) for position in group]

    def steps(self, first: int, last: int) -> Iterator[list[MicroBatch]]:
        """The micro-batches of each step from `first` to `last - 1`."""
        return prefetch(self._step, range(first, last), self.workers)

    def _step(self, step: int) -> list[MicroBatch]:
        groups = [[self.samples[position] for position in group] for group in self._groups(step)]
        if self.micro_tokens is None:
            # Group similar lengths, for less padding; the loss does not depend on how a step is split.
            (share,) = groups
            rows = bucket_by_length([sample.length for sample in share], max_samples=self.micro_batch)
            groups = [[share[i] for i in row] for row in rows]
        return [self.samples.collate(group) for group in groups]

    def _groups(self, step: int) -> list[list[int]]:
        """This rank's positions: by micro-batch with `micro_tokens`, else in a single group."""
        positions = range(step * self.batch, (step + 1) * self.batch)
        if self.micro_tokens is None:
            return [list(positions[self._world.rank :: self._world.size])]
        by_rank = balance_micro_batches(
            self.samples.lengths(positions),
            self._world.size,
            max_tokens=self.micro_tokens,
            max_samples=self.micro_batch,
            overhead=self.samples.overhead,
        )
        return [[positions[i] for i in group] for group in by_rank[self._world.rank]]


def prefetch(make: Callable[[int], T], numbers: Sequence[int], workers: int) -> Iterator[T]:
    """Calls `make` for each number, in order: in this process, or in worker processes with prefetching."""
    earlier = set(active_children())
    items = iter(
        DataLoader(
            _FunctionDataset(make),
            batch_size=None,
            sampler=numbers,
            num_workers=workers,
            collate_fn=_identity,
            worker_init_fn=_ignore_stop_signals if workers else None,
        )
    )
    # At exit, Python sends SIGTERM to workers, which ignore it, and joins them: after an error, whose traceback keeps
    # them alive, kill them instead.
    kill = partial(_kill, [child for child in active_children() if child not in earlier])
    atexit.register(kill)
    try:
        for item in items:
            if isinstance(item, Exception):
                raise item
            yield item
    except GeneratorExit:
        pass  # closed by the caller: the workers end with the iterator
    atexit.unregister(kill)


class _FunctionDataset(Dataset[Any]):
    """A function as a map-style dataset."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        self.make = make

    def __getitem__(self, number: int) -> Any:
        """The function's value, or its error: the DataLoader would turn an exception's message into a traceback."""
        try:
            return self.make(number)
        except LavicError as error:  # a subclass may not unpickle from its message alone
            return (DataError if error.exit_code == DataError.exit_code else LavicError)(str(error))
        except OSError as error:
            return error


def _identity(item: Any) -> Any:
    return item


def _kill(workers: Sequence[BaseProcess]) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise an error about killed workers
    for worker in workers:
        worker.kill()


def _ignore_stop_signals(_: int) -> None:
    """Ignores signals to the process group: workers must live until the step that they load is done."""
    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)
    torch.set_num_threads(1)
