"""The views of a photo: the photo at the size of a tile, and the tiles of a larger copy.

LLaVA-NeXT cuts a photo into a grid of tiles that fits its shape (Liu et al. 2024). By default every photo gets a 2 x 2
grid here, so it has five views whatever its shape. `views: lavic` is the processor's choice among several grids, as in
the LaViC code (arXiv 2503.23312); it gives slim photos three or four views.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

VIEWS = 5
"""Views of a photo with the 2 x 2 grid; each gives an item token, its [CLS]."""

Grid = tuple[int, int]
"""Rows and columns of tiles."""


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The photo geometry of a base model."""

    size: int
    """Width and height of a view, pixels."""
    patch: int
    """Width and height of a patch, pixels."""
    mean: tuple[float, float, float]
    """Subtracted from each channel, of values in [0, 1]."""
    std: tuple[float, float, float]
    """Divides each channel."""
    grids: tuple[Grid, ...] = ((2, 2),)
    """The grids to choose from."""

    @property
    def most(self) -> int:
        """Largest number of views of a photo."""
        return 1 + max(rows * columns for rows, columns in self.grids)

    def grid(self, size: tuple[int, int]) -> Grid:
        """The grid for a photo of (width, height) `size`: keeps the most pixels, then has the smallest border."""
        if len(self.grids) == 1:
            return self.grids[0]
        from transformers.image_processing_utils import select_best_resolution

        shapes = [(rows * self.size, columns * self.size) for rows, columns in self.grids]
        height, width = select_best_resolution(size[::-1], shapes)
        return height // self.size, width // self.size

    def count(self, size: tuple[int, int]) -> int:
        """Views of a photo of (width, height) `size`."""
        rows, columns = self.grid(size)
        return 1 + rows * columns

    def cut(self, photo: Image.Image) -> np.ndarray:
        """The views of a photo, float32 [views, 3, size, size], normalized.

        View 0 is the photo, stretched to a square. The others are the tiles, row by row, of the photo fitted into its
        grid with a black border.
        """
        from PIL import Image

        photo = photo.convert("RGB")
        square = (self.size, self.size)
        rows, columns = self.grid(photo.size)
        overview = np.asarray(photo.resize(square, Image.Resampling.BICUBIC))
        large = np.zeros((rows * self.size, columns * self.size, 3), np.uint8)
        width, height = self.fit(photo.size)
        left, top = (columns * self.size - width) // 2, (rows * self.size - height) // 2
        fitted = np.asarray(photo.resize((width, height), Image.Resampling.BICUBIC))
        large[top : top + height, left : left + width] = fitted
        # [rows, y, columns, x, channel] -> [row, column, channel, y, x]
        tiles = large.reshape(rows, self.size, columns, self.size, 3).transpose(0, 2, 4, 1, 3)
        pixels = np.concatenate([overview.transpose(2, 0, 1)[None], tiles.reshape(-1, 3, *square)])
        shape = (1, 3, 1, 1)
        mean, std = (np.array(values, np.float32).reshape(shape) for values in (self.mean, self.std))
        return (pixels.astype(np.float32) / np.float32(255) - mean) / std

    def fit(self, size: tuple[int, int]) -> tuple[int, int]:
        """Width and height of a photo of (width, height) `size` fitted into its grid, rounded as in LLaVA-NeXT."""
        rows, columns = self.grid(size)
        width, height = columns * self.size, rows * self.size
        scale_x, scale_y = width / size[0], height / size[1]
        if scale_x < scale_y:
            return width, min(math.ceil(size[1] * scale_x), height)
        return min(math.ceil(size[0] * scale_y), width), height

    def as_dict(self) -> dict[str, object]:
        """The geometry in a manifest, which is compared before item tokens are used."""
        grids = {} if self.grids == ((2, 2),) else {"grids": [list(grid) for grid in self.grids]}
        return {
            "views": self.most,
            "size": self.size,
            "patch": self.patch,
            "mean": list(self.mean),
            "std": list(self.std),
            **grids,
        }
