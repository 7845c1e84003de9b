"""The order of training samples: a pure function of a seed and a position."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class ShuffleOrder:
    """The order of samples: a pure function of (n, seed, block), whose only state is a position.

    Position p is sample p % n of epoch p // n. In every epoch the blocks of `block` adjacent samples are shuffled, then
    the samples within each window of `mix` blocks: random enough for training, local enough for reading from a disk. A
    window is shuffled when it is reached, so training resumes instantly at any position of a set of any size.

    Args:
        n: Samples per epoch, at least 1.
        seed: Of the order.
        block: Adjacent samples that stay in the same window.
        mix: Blocks per window.
        bounds: Instead of `block`: the start of each block, from 0, and the end of the last.
    """

    def __init__(
        self, n: int, seed: int = 0, block: int = 256, mix: int = 16, bounds: Sequence[int] | np.ndarray | None = None
    ) -> None:
        if n < 1 or block < 1 or mix < 1:
            raise ValueError(f"n, block and mix are at least 1, got {n}, {block} and {mix}")
        if bounds is not None and (bounds[0] != 0 or bounds[-1] != n):
            raise ValueError(f"bounds of {n} samples are from 0 to {n}, not from {bounds[0]} to {bounds[-1]}")
        self.n, self.seed, self.block, self.mix = n, seed, block, mix
        self._bounds = None if bounds is None else np.unique(bounds)
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None
        self._window: tuple[int, int, np.ndarray] | None = None

    @property
    def window(self) -> int:
        """About how many samples are shuffled together."""
        if self._bounds is None:
            return min(self.n, self.block * self.mix)
        return -(-self.n * self.mix // (len(self._bounds) - 1))

    def at(self, position: int) -> int:
        """Index of the sample at a global position, counted from 0 over all epochs."""
        return int(self.span(position, position + 1)[0])

    def span(self, first: int, last: int) -> np.ndarray:
        """Indices at the positions from `first` to `last - 1`: int64 [last - first]."""
        parts = [np.empty(0, np.int64)]
        while first < last:
            epoch, offset = divmod(first, self.n)
            blocks, starts = self._blocks(epoch)
            window = int(np.searchsorted(starts, offset, side="right")) - 1
            start = int(starts[window])
            parts.append(self._indices(epoch, window, blocks)[offset - start : offset - start + last - first])
            first += len(parts[-1])
        return np.concatenate(parts)

    def epoch(self, epoch: int) -> np.ndarray:
        """The permutation of an epoch: int64 [n]."""
        return self.span(epoch * self.n, (epoch + 1) * self.n)

    def _blocks(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shuffled blocks, and the offset of each window in the epoch, with the end."""
        if self._epoch is None or self._epoch[0] != epoch:
            count = -(-self.n // self.block) if self._bounds is None else len(self._bounds) - 1
            blocks = self._random(epoch).permutation(count)
            sizes = self._ends(blocks) - self._starts(blocks)
            ends = np.cumsum([0, *np.add.reduceat(sizes, np.arange(0, len(sizes), self.mix))])
            self._epoch = (epoch, blocks, ends)
        return self._epoch[1], self._epoch[2]

    def _indices(self, epoch: int, window: int, blocks: np.ndarray) -> np.ndarray:
        if self._window is None or self._window[:2] != (epoch, window):
            mixed = blocks[window * self.mix : (window + 1) * self.mix]
            bounds = zip(self._starts(mixed).tolist(), self._ends(mixed).tolist(), strict=True)
            indices = np.concatenate([np.arange(start, end) for start, end in bounds])
            self._random(epoch, window + 1).shuffle(indices)
            self._window = (epoch, window, indices)
        return self._window[2]

    def _starts(self, blocks: np.ndarray) -> np.ndarray:
        return blocks * self.block if self._bounds is None else self._bounds[blocks]

    def _ends(self, blocks: np.ndarray) -> np.ndarray:
        return np.minimum((blocks + 1) * self.block, self.n) if self._bounds is None else self._bounds[blocks + 1]

    def _random(self, *stream: int) -> np.random.RandomState:
        # numpy guarantees the streams of RandomState for all versions: a resumed run needs the same order.
        return np.random.RandomState([self.seed & 0xFFFFFFFF, *stream])
