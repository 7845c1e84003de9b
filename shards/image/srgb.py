"""Converts images of any mode to 8-bit sRGB on white."""

from __future__ import annotations

import io
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
from PIL import Image, ImageCms

_MAX_SHIFT = 3
"""A profile that changes no colour by more than this, of 255, is treated as sRGB."""
_STEPS = (0, 32, 64, 96, 128, 160, 192, 224, 255)
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
_WHITE_IS_ZERO, _SIGNED = 0, 2
"""TIFF tags and values, which Pillow applies to images of up to 8 bits."""
_UNUSED_ALPHA = ("BMP", "TIFF")
"""Formats with a fourth channel that many programs leave at zero; browsers do not treat it as transparency then."""


def to_rgb(image: Image.Image) -> Image.Image:
    """A loaded image of any mode as 8-bit sRGB (or grey as RGB), transparency on white."""
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        grey = to_srgb(_eight_bits(image), profile)
        return _on_white(grey, _opaque(image)) if "transparency" in image.info else grey
    if image.has_transparency_data:
        grey_only = image.mode in ("LA", "La", "L", "1")
        alpha = image.convert("RGBA").getchannel("A")
        colours = image.convert("RGBA") if image.mode in ("RGBa", "La") else image
        opaque = to_srgb(_without_alpha(colours, "L" if grey_only else "RGB"), profile)
        unused = image.format in _UNUSED_ALPHA and alpha.getextrema() == (0, 0)
        return opaque if unused else _on_white(opaque, alpha)
    return to_srgb(image if image.mode in ("RGB", "L", "CMYK", "LAB") else image.convert("RGB"), profile)


_known_srgb: set[tuple[bytes, str]] = set()
_MAX_KNOWN = 64


def remember_srgb(profile: bytes, mode: str) -> None:
    """Remember a profile for which `is_srgb` was true in another process."""
    if len(_known_srgb) < _MAX_KNOWN:
        _known_srgb.add((profile, mode))


def is_known_srgb(profile: bytes, mode: str) -> bool:
    """Whether a profile is known to be sRGB, without parsing it."""
    return (profile, mode) in _known_srgb


@lru_cache(maxsize=64)
def is_srgb(profile: bytes, mode: str) -> bool:
    """Whether an embedded profile shows RGB (or L) values as sRGB does; so does a broken one, which is ignored.

    Names are unreliable (`sRGB IEC61966-2.1`, `c2`, `sRGB built-in`, ...), so a palette is converted.
    """
    if mode == "L":
        values = np.arange(256, dtype=np.uint8)[None]
        palette = Image.fromarray(values)
    else:
        values = np.array(list(product(_STEPS, repeat=3)), dtype=np.uint8)[None]
        palette = Image.fromarray(values)
    expected = np.asarray(palette.convert("RGB"), dtype=int)
    return int(np.abs(np.asarray(to_srgb(palette, profile), dtype=int) - expected).max()) <= _MAX_SHIFT


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """An RGB, L, CMYK or LAB image as sRGB, by its profile if there is one that fits.

    A profile that is broken, or of another colour space than the image, is ignored, as in browsers.
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
    """Made once per profile: a catalogue's photos have few different ones."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Greys of up to 32 bits as 8."""
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    if image.mode.startswith("I;16"):
        greys = (values >> (tags.get(_BITS, (16,))[0] - 8)).astype(np.uint8)
    elif image.format == "PNG":
        # 16 bits, which older versions of Pillow return as 32.
        greys = (values >> 8).astype(np.uint8)
    else:
        values = values.astype(np.float32)
        finite = values[np.isfinite(values)]
        smallest, largest = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
        low, high = _range(smallest, largest, image)
        values = np.nan_to_num(values, copy=False, nan=low, posinf=high, neginf=low)
        greys = ((values - low) * (255 / (high - low))).clip(0, 255).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        greys = 255 - greys
    return Image.fromarray(greys)


def _range(low: float, high: float, image: Image.Image) -> tuple[float, float]:
    """The values of black and white, from the smallest and largest one: files of floats and of 32 bits do not say."""
    if low < -0.1 * max(high, 0.0):
        return low, max(high, low + 1e-6)
    # Resampling leaves values a little outside of 0 to 1.
    if image.mode == "F" and high <= 4:
        return 0.0, max(high, 1.0)
    signed = getattr(image, "tag_v2", {}).get(_SAMPLE_FORMAT) == (_SIGNED,)
    usual_maxima = (255.0, 32767.0) if signed else (255.0, 65535.0)
    return 0.0, next((maximum for maximum in usual_maxima if high <= maximum), high)


def _opaque(image: Image.Image) -> Image.Image:
    """The alpha channel of a grey image with one transparent value."""
    clear: Any = image.info["transparency"]
    return Image.fromarray(np.where(np.asarray(image) == clear, 0, 255).astype(np.uint8))


def _without_alpha(image: Image.Image, mode: str) -> Image.Image:
    image = image.copy()
    image.info.pop("transparency", None)
    return image.convert(mode)


def _on_white(image: Image.Image, alpha: Image.Image) -> Image.Image:
    return Image.composite(image, Image.new("RGB", image.size, "white"), alpha)
