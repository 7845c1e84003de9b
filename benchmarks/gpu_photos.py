"""The GPU benchmark's photos, and how they become views: with Pillow where it is there, else with torch alone."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import torch

from lavic.model.tiling import Geometry

SIDE = 500
"""Of a photo, pixels."""
PHOTOS = 64


def draw_photos() -> list[object]:
    """Soft noise: as JPEG files where Pillow is there, else as pixels."""
    rng = np.random.default_rng(0)
    coarse = [rng.integers(0, 256, (25, 25, 3), dtype=np.uint8) for _ in range(PHOTOS)]
    if not pillow():
        return [torch.from_numpy(c.repeat(20, 0).repeat(20, 1)).permute(2, 0, 1) for c in coarse]
    from PIL import Image

    jpgs: list[object] = []
    for pixels in coarse:
        file = io.BytesIO()
        Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        jpgs.append(file.getvalue())
    return jpgs


def pillow() -> bool:
    """Whether Pillow is there."""
    try:
        import PIL  # noqa: F401
    except ImportError:
        return False
    return True


def photo_cut(geometry: Geometry) -> Callable[[object], torch.Tensor]:
    """How a photo becomes views, float32 [5, 3, size, size], in our loops."""
    return OurCut(geometry) if pillow() else TorchCut(geometry)


class OurCut:
    """Our preparation of a photo, in loader workers."""

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry

    def __call__(self, photo: object) -> torch.Tensor:
        from PIL import Image

        return torch.from_numpy(self.geometry.cut(Image.open(io.BytesIO(photo)).convert("RGB")))  # type: ignore[arg-type]


class TorchCut:
    """The same preparation without Pillow, for both loops."""

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry

    def __call__(self, photo: object) -> torch.Tensor:
        g, resize = self.geometry, torch.nn.functional.interpolate
        pixels = photo[None].float()  # type: ignore[index]
        whole = resize(pixels, (g.size, g.size), mode="bicubic", antialias=True)
        large = resize(pixels, (2 * g.size, 2 * g.size), mode="bicubic", antialias=True)
        quarters = large.unflatten(2, (2, g.size)).unflatten(4, (2, g.size)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
        mean, std = (torch.tensor(values)[:, None, None] for values in (g.mean, g.std))
        return (torch.cat([whole, quarters]).clamp(0, 255) / 255 - mean) / std
