"""Features that are computed once and kept in the run's folder, in parts that ranks share.

FOLDER/<identity>/<name>-00000.npy   float16 [rows, width]
"""

from __future__ import annotations

import io
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from lavic.distributed.context import DistributedContext
from lavic.distributed.signals import StopRequest
from lavic.errors import DataError
from lavic.storage.atomic import atomic_write, remove_partial_files

ROWS = 1024
"""Rows of a part: a stopped command loses less than one."""
_LARGEST = float(np.finfo(np.float16).max)


class FeatureCache:
    """The features of one run. Parts do not depend on the number of ranks.

    Args:
        folder: In the run's folder.
        identity: Digest of all that the features are made from; features of another one are removed.
        main: Whether this is the rank that removes them.
    """

    def __init__(self, folder: Path, identity: str, *, main: bool = True) -> None:
        self.folder = folder / identity
        if main:
            for other in folder.glob("*"):
                if other != self.folder:
                    shutil.rmtree(other, ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_partial_files(self.folder)

    def compute(
        self,
        name: str,
        rows: int,
        make: Callable[[range], torch.Tensor],
        world: DistributedContext,
        stop: StopRequest,
    ) -> None:
        """Makes the parts that are missing, this rank's share of them. Collective.

        Args:
            make: The features of some rows, [rows, width].
            stop: Ends the work after a part.

        Raises:
            Stopped: On request; the parts that are done stay.
            DataError: Features are not finite.
        """
        for part in range(world.rank, math.ceil(rows / ROWS), world.size):
            path = self._part(name, part)
            if stop.requested:
                break
            if not path.is_file():
                features = make(range(part * ROWS, min(rows, (part + 1) * ROWS)))
                if (nonfinite_rows := (~features.isfinite()).any(1).nonzero()).numel():
                    first = part * ROWS + int(nonfinite_rows[0])
                    raise DataError(
                        f"{name}: features that are not finite (first: row {first}): the base model overflows in this "
                        "precision; use --model.dtype float32"
                    )
                file = io.BytesIO()
                # Rare outliers are clamped to the range of float16.
                np.save(file, features.clamp(-_LARGEST, _LARGEST).numpy().astype(np.float16))
                atomic_write(path, file.getvalue())
        stop.raise_if_requested(world)
        world.barrier()

    def read(self, name: str, rows: int) -> torch.Tensor:
        """All rows of some features, float16 [rows, width].

        Raises:
            DataError: A part is missing or broken.
        """
        parts = []
        for part in range(math.ceil(rows / ROWS)):
            path = self._part(name, part)
            try:
                parts.append(np.load(path, allow_pickle=False))
            except (OSError, ValueError, EOFError) as error:
                path.unlink(missing_ok=True)
                raise DataError(f"{path}: broken ({error}): run the same command again to rebuild it") from None
        return torch.from_numpy(np.concatenate(parts))

    def _part(self, name: str, number: int) -> Path:
        return self.folder / f"{name}-{number:05d}.npy"
