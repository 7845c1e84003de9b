"""A photo's five views: the whole photo, and the four quarters of a twice larger copy.

This is LLaVA-NeXT's preparation with one grid, 2 x 2, for every shape. The stock processor gives slim photos three or
four views, so that the number of item tokens, and with mixed batches their values, depended on the photo's shape and on
its batch-mates (Liu et al. 2024, LLaVA-NeXT; the LaViC code, arXiv 2503.23312, inherits it).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

VIEWS = 5
"""Views of a photo, and so item tokens: one [CLS] each."""


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """How a base model wants its photos."""

    size: int
    """Width and height of a view, pixels."""
    patch: int
    """Width and height of a patch, pixels."""
    mean: tuple[float, float, float]
    """Subtracted from each channel, of values in [0, 1]."""
    std: tuple[float, float, float]
    """Divides each channel."""

    def cut(self, photo: Image.Image) -> np.ndarray:
        """The five views of a photo, float32 [5, 3, size, size], normalised.

        View 0 is the whole photo, stretched to a square. Views 1-4 are the quarters (top left, top right, bottom left,
        bottom right) of the photo fitted into a square of twice the size, black around it.
        """
        from PIL import Image

        photo = photo.convert("RGB")
        square = (self.size, self.size)
        whole = np.asarray(photo.resize(square, Image.Resampling.BICUBIC))
        large = np.zeros((2 * self.size, 2 * self.size, 3), np.uint8)
        width, height = self.fit(photo.size)
        left, top = (2 * self.size - width) // 2, (2 * self.size - height) // 2
        fitted = np.asarray(photo.resize((width, height), Image.Resampling.BICUBIC))
        large[top : top + height, left : left + width] = fitted
        # [rows, y, columns, x, channel] -> [row, column, channel, y, x]
        quarters = large.reshape(2, self.size, 2, self.size, 3).transpose(0, 2, 4, 1, 3)
        pixels = np.concatenate([whole.transpose(2, 0, 1)[None], quarters.reshape(4, 3, *square)])
        shape = (1, 3, 1, 1)
        mean, std = (np.array(values, np.float32).reshape(shape) for values in (self.mean, self.std))
        return (pixels.astype(np.float32) / np.float32(255) - mean) / std

    def fit(self, size: tuple[int, int]) -> tuple[int, int]:
        """Width and height of a photo of (width, height) `size` after fitting it into the large square."""
        side = 2 * self.size
        width, height = size
        if width >= height:
            return side, min(-(-height * side // width), side)
        return min(-(-width * side // height), side), side

    def as_dict(self) -> dict[str, object]:
        """What a manifest keeps, to refuse item tokens of another geometry."""
        return {
            "views": VIEWS,
            "size": self.size,
            "patch": self.patch,
            "mean": list(self.mean),
            "std": list(self.std),
        }
