"""A training set without samples that a list names, at the same positions and the same length."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from lavic.errors import ConfigError
from lavic.storage.text_files import TextFileError, read_lines
from lavic.train.input.data_loader import Minibatch, Samples


def read_keys(path: Path | None) -> tuple[str, ...]:
    """The keys of a list of samples, one a line; none without a file.

    Raises:
        ConfigError: The file cannot be read.
    """
    if path is None:
        return ()
    try:
        return tuple(dict.fromkeys(line.strip() for _, line in read_lines(path) if line.strip()))
    except TextFileError as error:
        raise ConfigError(f"--loop.skip-samples {error}") from None


class Skipping:
    """Gives the next sample in the order in the place of each that is skipped.

    Positions, and with them batches, shares and the order of all other samples, stay as they are, so that a run can go
    on with another list.
    """

    def __init__(self, samples: Samples[Any], keys: Collection[str]) -> None:
        """Describes it.

        Args:
            samples: The whole set.
            keys: Of the samples that are never read.
        """
        self.samples = samples
        self.keys = frozenset(keys)

    def unknown(self) -> list[str]:
        """The keys that no sample of the set has. Looks at the set until it has found them all.

        Raises:
            ConfigError: Every sample is skipped.
        """
        missing, kept = set(self.keys), False
        for position in range(len(self)):
            if missing or not kept:
                key = self.samples.key(position)
                missing.discard(key)
                kept = kept or key not in self.keys
        if not kept:
            raise ConfigError("--loop.skip-samples names every sample of the training set")
        return sorted(missing)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, position: int) -> Any:
        return self.samples[self._read_at(position)]

    def key(self, position: int) -> str:
        """As `Samples.key`."""
        return self.samples.key(self._read_at(position))

    def lengths(self, positions: Sequence[int]) -> list[int]:
        """As `Samples.lengths`."""
        return self.samples.lengths([self._read_at(position) for position in positions])

    @property
    def overhead(self) -> int:
        """As `Samples.overhead`."""
        return self.samples.overhead

    def collate(self, samples: Sequence[Any]) -> Minibatch:
        """As `Samples.collate`."""
        return self.samples.collate(samples)

    def _read_at(self, position: int) -> int:
        while self.samples.key(position) in self.keys:
            position += 1
        return position
