"""Turns what a server sent into the JPEG that is stored: complete, upright, sRGB; unchanged if it is that already."""

from __future__ import annotations

import hashlib
import io
import warnings
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

from PIL import Image
from pydantic import Field, field_validator

from lavic.config import settings
from lavic.shards.image import jpeg
from lavic.shards.image.formats import PhotoError, check_magic, decode, orientation, turn_upright, with_right_length
from lavic.shards.image.placeholders import is_placeholder, read_placeholders
from lavic.shards.image.png import has_intact_pixels, repair_png
from lavic.shards.image.srgb import is_known_srgb, is_srgb, to_rgb

_JPEG = b"\xff\xd8"
_MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)
"""Pillow refuses more than this."""
_FAST, _SLOW = 8_000_000, 100_000_000
"""Pixels times scans of a JPEG that is checked within milliseconds, and within a second."""

__all__ = ["InspectedPhoto", "NormalizedPhoto", "PhotoError", "PhotoSettings", "inspect", "normalize"]

_ADDED_LATER = ("max_scans", "min_side", "resize")

Effort = Literal["little", "much", "unknown"]
"""Time to check a photo: milliseconds, at most about a second, or unknown."""


@settings
class PhotoSettings:
    """Which photos are accepted, and how they are stored."""

    check: Literal["decode", "header"] = "decode"
    """decode: read every photo to its last coded bit, so that damage is found now; header: check the header and the end
    alone."""
    max_pixels: int = Field(default=50_000_000, ge=1, le=_MAX_PIXELS)
    """Photos with more pixels than this are refused before they are decoded."""
    max_scans: int = Field(default=100, ge=1)
    """JPEGs with more scans than this are refused before they are decoded. Progressive ones have about ten."""
    decode_seconds: float = Field(default=20.0, gt=0)
    """Seconds of CPU time to decode one photo; one that takes longer is refused. Of animations the first frame is
    decoded alone."""
    min_side: int = Field(default=32, ge=1)
    """Images with a side of fewer pixels than this are treated as placeholders."""
    quality: int = Field(default=95, ge=1, le=100)
    """JPEG quality of photos that must be converted: other formats, rotated or transparent ones, other colour spaces.
    Others keep their bytes."""
    resize: int | None = Field(default=None, ge=1, le=jpeg.LONGEST_SIDE)
    """Scale photos down whose longest side has more pixels than this. By default every photo keeps its size."""
    placeholders: tuple[str, ...] = ()
    """Placeholders for missing photos, besides the known ones of Amazon: Amazon image ids, sha256 digests of what the
    server sends, or files with one of these on each line, as `sha256sum` writes them."""

    @field_validator("placeholders")
    @classmethod
    def _read(cls, words: tuple[str, ...]) -> tuple[str, ...]:
        """Files are read now: workers elsewhere may not see them, and the plan holds their content."""
        return tuple(sorted({mark for word in words for mark in read_placeholders(word)}))

    def identity(self) -> dict[str, Any]:
        """The settings that affect a shard's bytes, as plain values.

        Sets of earlier versions can be continued: settings that they do not know are left out at their default, and one
        that was removed has its default.
        """
        values = {**asdict(self), "max_frames": 1000}
        del values["decode_seconds"]
        defaults = asdict(PhotoSettings())
        return {name: value for name, value in values.items() if name not in _ADDED_LATER or value != defaults[name]}


@dataclass(frozen=True)
class NormalizedPhoto:
    """A photo as a shard stores it."""

    jpg: bytes
    width: int
    height: int


class InspectedPhoto(NamedTuple):
    """What a server sent, and its header if it is a JPEG."""

    data: bytes
    header: jpeg.JpegHeader | None
    effort: Effort
    canonical: bool = False
    """A JPEG that is stored unchanged, if its profile is sRGB."""


def inspect(data: bytes, settings: PhotoSettings, sha256: str = "") -> InspectedPhoto:
    """Check a photo's header, in microseconds for a JPEG; `sha256` is the digest of its bytes if that is known.

    Raises:
        PhotoError: Not a photo, a placeholder, or beyond the limits.
    """
    if settings.placeholders and is_placeholder(sha256 or hashlib.sha256(data).hexdigest(), settings.placeholders):
        raise PhotoError("placeholder", "known by its sha256 digest")
    header = jpeg.read_header(data) if data.startswith(_JPEG) else None
    if header is None:
        check_magic(data)
        return InspectedPhoto(data, None, "unknown")
    _check_size(header.width, header.height, settings)
    work = header.width * header.height
    if not header.one_scan:
        if (scans := jpeg.count_scans(data)) > settings.max_scans:
            raise PhotoError("bomb", f"{scans:,} scans; --photo.max-scans is {settings.max_scans:,}")
        work *= scans
    effort: Effort = "little" if work <= _FAST else "much" if work <= _SLOW else "unknown"
    canonical = header.plain and header.orientation == 1 and not _exceeds_resize(header.width, header.height, settings)
    if not canonical or (header.profile and not is_known_srgb(header.profile, header.mode)):
        effort = "unknown"
    return InspectedPhoto(data, header, effort, canonical)


def normalize(photo: InspectedPhoto, settings: PhotoSettings) -> NormalizedPhoto:
    """Check an inspected photo and convert it to a JPEG as shards store it.

    A JPEG that is upright, sRGB or grey, is kept byte for byte. Otherwise: first frame, orientation applied,
    transparency on white, 16 bit to 8, other colour spaces to sRGB, and written as JPEG without metadata.

    Raises:
        PhotoError: Damaged, a placeholder, or beyond the limits. Whatever a decoder raises becomes one.
    """
    try:
        return _normalize(photo, settings)
    except PhotoError:
        raise
    except MemoryError:
        raise PhotoError("bomb", "needs more memory than there is") from None
    except Exception as error:
        # Decoders and encoders fail in many ways (OSError, RecursionError, struct.error, ...): the photo is the reason.
        raise PhotoError("truncated", f"cannot be decoded ({type(error).__name__}: {error})") from None


def _normalize(photo: InspectedPhoto, settings: PhotoSettings) -> NormalizedPhoto:
    data, header = photo.data, photo.header
    if header is None and data.startswith(_JPEG):
        damage = jpeg.find_damage(data)
        repaired = jpeg.repair(data, damage)
        if repaired and (inspected := inspect(repaired, settings)).header:
            return _normalize(inspected, settings)
        if damage and not _is_unsupported(damage):
            raise PhotoError("truncated", damage)
    if header is None:
        return _convert(data, settings)
    if (settings.check == "decode" or not jpeg.has_end_marker(data)) and (damage := jpeg.find_damage(data)):
        if not (repaired := jpeg.repair(data, damage)):
            raise PhotoError("unsupported" if _is_unsupported(damage) else "truncated", damage)
        data = repaired
    if settings.check == "decode" and not header.one_scan and not jpeg.has_every_scan(data):
        raise PhotoError("truncated", "a JPEG without its last scans")
    if photo.canonical and (not header.profile or is_srgb(header.profile, header.mode)):
        return NormalizedPhoto(data, header.width, header.height)
    return _convert(data, settings, header.orientation)


def _is_unsupported(damage: str) -> bool:
    """Whether libjpeg does not support this kind of JPEG, rather than that the file is damaged."""
    return "supported" in damage.lower()


def _convert(data: bytes, settings: PhotoSettings, turn: int | None = None) -> NormalizedPhoto:
    """Decode a photo and encode it again."""
    check_size = partial(_check_size, settings=settings)
    with warnings.catch_warnings():
        # Pixels are limited by a setting; Pillow's own warning would go to a worker's log.
        warnings.simplefilter("ignore")
        try:
            if not has_intact_pixels(data):
                raise PhotoError("truncated", "PNG with damaged pixels")
            image = decode(data, check_size)
        except PhotoError as error:
            if error.kind != "truncated" or not (repaired := repair_png(data) or with_right_length(data)):
                raise
            image = decode(repaired, check_size)
        upright = turn_upright(to_rgb(image), orientation(image) if turn is None else turn)
    if _exceeds_resize(*upright.size, settings):
        upright = _resized(upright, settings.resize or 0)
    out = io.BytesIO()
    try:
        upright.save(out, "JPEG", quality=settings.quality, subsampling=0)
    except OSError as error:
        raise PhotoError("unsupported", f"cannot be written as JPEG: {error}") from None
    return NormalizedPhoto(out.getvalue(), *upright.size)


def _check_size(width: int, height: int, settings: PhotoSettings) -> None:
    if width * height > settings.max_pixels:
        raise PhotoError("bomb", f"{_sides(width, height)}; --photo.max-pixels is {settings.max_pixels:,}")
    if max(width, height) > jpeg.LONGEST_SIDE and not settings.resize:
        limit = f"a JPEG has at most {jpeg.LONGEST_SIDE:,} on a side; use --photo.resize"
        raise PhotoError("unsupported", f"{_sides(width, height)}; {limit}")
    if min(width, height) < settings.min_side:
        raise PhotoError("placeholder", f"{_sides(width, height)}; --photo.min-side is {settings.min_side:,}")


def _sides(width: int, height: int) -> str:
    return f"{width:,} x {height:,} pixels"


def _exceeds_resize(width: int, height: int, settings: PhotoSettings) -> bool:
    return settings.resize is not None and max(width, height) > settings.resize


def _resized(image: Image.Image, longest: int) -> Image.Image:
    scale = longest / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
