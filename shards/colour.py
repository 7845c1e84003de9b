"""Colours as a screen shows them: embedded profiles and CMYK to sRGB."""

from __future__ import annotations

import io
from functools import lru_cache
from itertools import product

import numpy as np
from PIL import Image, ImageCms

_NEAR = 3
"""Of 255: a profile that moves no colour further is sRGB by another name."""
_STEPS = (0, 32, 64, 96, 128, 160, 192, 224, 255)


@lru_cache(maxsize=64)
def is_srgb(profile: bytes, mode: str) -> bool:
    """Whether an embedded profile shows RGB (or L) values as sRGB does; one that is broken changes nothing either.

    Names say little (`sRGB IEC61966-2.1`, `c2`, `sRGB built-in`, ...): a palette is sent through it.
    """
    if mode == "L":
        values = np.arange(256, dtype=np.uint8)[None]
        palette = Image.fromarray(values)
    else:
        values = np.array(list(product(_STEPS, repeat=3)), dtype=np.uint8)[None]
        palette = Image.fromarray(values)
    expected = np.asarray(palette.convert("RGB"), dtype=int)
    return int(np.abs(np.asarray(to_srgb(palette, profile), dtype=int) - expected).max()) <= _NEAR


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """An RGB, L, CMYK or LAB image as sRGB, by its profile where there is one that fits.

    A profile that is broken, or of another colour space than the image, is disregarded, as browsers do.
    """
    if profile:
        try:
            transform = _transform(profile, image.mode)
            return ImageCms.applyTransform(image, transform) or image.convert("RGB")
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            pass
    return image.convert("RGB")


@lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform:
    """Made once for a profile: a catalogue's photos have few different ones."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
