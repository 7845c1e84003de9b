"""Excludes the samples that a file lists, without changing the positions of the others."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from lavic.distributed.context import DistributedContext
from lavic.errors import ConfigError, first_names
from lavic.storage.text_files import TextFileError, read_lines
from lavic.tracking.tracker import Tracker
from lavic.train.input.collate import MicroBatch
from lavic.train.input.data_loader import TaskDataset
from lavic.train.nonfinite import NAMED_SAMPLES

log = logging.getLogger(__name__)
_JOURNAL_KEYS = 1000
"""Maximum number of keys in the journal."""


def apply_denylist(samples: TaskDataset, path: Path | None, tracker: Tracker, world: DistributedContext) -> TaskDataset:
    """The training set without the samples that a file lists, which are recorded in the journal. Collective.

    Raises:
        ConfigError: The file cannot be read, or lists every sample.
    """
    keys = world.broadcast_object(read_denylist(path))
    if not keys:
        return samples
    remaining = DenylistDataset(samples, keys)
    unknown = remaining.unknown() if world.is_main else []
    if unknown:
        log.warning(
            "--loop.skip-samples: %d of %d keys are not in the training set: %s",
            len(unknown),
            len(keys),
            first_names(unknown, NAMED_SAMPLES),
        )
    tracker.event("skip_samples", keys=keys[:_JOURNAL_KEYS], samples=len(keys) - len(unknown))
    return remaining


def read_denylist(path: Path | None) -> tuple[str, ...]:
    """The keys in a file, one per line; empty without a file.

    Raises:
        ConfigError: The file cannot be read.
    """
    if path is None:
        return ()
    try:
        return tuple(dict.fromkeys(line.strip() for _, line in read_lines(path) if line.strip()))
    except TextFileError as error:
        raise ConfigError(f"--loop.skip-samples {error}") from None


class DenylistDataset:
    """Replaces each sample of a list by the next one in the order.

    Positions, and so batches, shares and the order of the other samples, do not change: a run can be resumed with
    another list.
    """

    def __init__(self, samples: TaskDataset, keys: Collection[str]) -> None:
        self.samples = samples
        self.keys = frozenset(keys)

    def unknown(self) -> list[str]:
        """The keys that are not in the set; reads keys of the set until all are found.

        Raises:
            ConfigError: Every sample is skipped.
        """
        missing, any_remaining = set(self.keys), False
        for position in range(len(self)):
            if missing or not any_remaining:
                key = self.samples.key(position)
                missing.discard(key)
                any_remaining = any_remaining or key not in self.keys
        if not any_remaining:
            raise ConfigError("--loop.skip-samples lists every sample of the training set")
        return sorted(missing)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, position: int) -> Any:
        return self.samples[self._source_position(position)]

    def key(self, position: int) -> str:
        """See `TaskDataset.key`."""
        return self.samples.key(self._source_position(position))

    def lengths(self, positions: Sequence[int]) -> list[int]:
        """See `TaskDataset.lengths`."""
        return self.samples.lengths([self._source_position(position) for position in positions])

    @property
    def overhead(self) -> int:
        """See `TaskDataset.overhead`."""
        return self.samples.overhead

    def collate(self, samples: Sequence[Any]) -> MicroBatch:
        """See `TaskDataset.collate`."""
        return self.samples.collate(samples)

    def _source_position(self, position: int) -> int:
        while self.samples.key(position) in self.keys:
            position += 1
        return position
