"""From the bytes a server sent to the JPEG that is stored: whole, upright, sRGB; untouched where it already is that."""

from __future__ import annotations

import hashlib
import io
import warnings
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

from PIL import Image
from pydantic import Field, field_validator

from lavic.config.loader import settings
from lavic.shards.image import jpeg
from lavic.shards.image.formats import PhotoError, check_magic, decode, orientation, turned, with_right_size
from lavic.shards.image.placeholders import is_placeholder, read_placeholders
from lavic.shards.image.png import has_right_pixels, repaired
from lavic.shards.image.srgb import is_srgb, seen_srgb, to_rgb

_JPEG = b"\xff\xd8"
_MOST_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)
"""Beyond this Pillow refuses by itself."""
_LITTLE, _MUCH = 8_000_000, 100_000_000
"""Pixels times scans of a JPEG: up to the first it is checked within milliseconds, up to the second within a second."""

__all__ = ["Photo", "PhotoError", "PhotoSettings", "Stored", "examine", "store", "to_jpeg"]

_LATER = ("max_scans", "min_side", "resize")

Effort = Literal["little", "much", "unknown"]
"""What it takes to check a photo: milliseconds; at most about a second; or nobody knows before it is done."""


@settings
class PhotoSettings:
    """Which photos are taken, and how they are stored."""

    check: Literal["decode", "header"] = "decode"
    """decode: read every photo to its last coded bit, so that a damaged one is found now; header: look at its two ends
    and believe the header."""
    max_pixels: int = Field(default=50_000_000, ge=1, le=_MOST_PIXELS)
    """Photos with more pixels than this are refused before they are decoded."""
    max_frames: int = Field(default=1000, ge=1)
    """Animations with more frames than this are refused before they are decoded; of others the first is taken."""
    max_scans: int = Field(default=100, ge=1)
    """JPEGs with more scans than this are refused before they are decoded. Progressive ones have about ten."""
    decode_seconds: float = Field(default=20.0, gt=0)
    """Seconds of CPU time that one photo may take to be decoded; one that takes longer is refused."""
    min_side: int = Field(default=32, ge=1)
    """Images with a side of fewer pixels than this are no photos but placeholders."""
    quality: int = Field(default=95, ge=1, le=100)
    """JPEG quality of photos that must be written anew: other formats, turned or transparent ones, other colour
    spaces. Others keep their bytes."""
    resize: int | None = Field(default=None, ge=1, le=jpeg.LONGEST_SIDE)
    """Scale photos down whose longest side has more pixels than this; none is scaled up. By default every photo keeps
    its size."""
    placeholders: tuple[str, ...] = ()
    """Images that stand for missing photos, beside those of Amazon that are known: Amazon image ids, sha256 digests of
    what the server sends, or files with one of these on each line, as `sha256sum` writes them."""

    @field_validator("placeholders")
    @classmethod
    def _read(cls, words: tuple[str, ...]) -> tuple[str, ...]:
        """Files are read at once: workers elsewhere may not see them, and the plan is to know what is in them."""
        return tuple(sorted({mark for word in words for mark in read_placeholders(word)}))

    def identity(self) -> dict[str, Any]:
        """What of these decides a shard's bytes, as plain values.

        Settings that sets of earlier versions do not know are in it only where they are not at their default, with
        which those sets were made: such a set is gone on with.
        """
        values = asdict(self)
        del values["decode_seconds"]
        defaults = asdict(PhotoSettings())
        return {name: value for name, value in values.items() if name not in _LATER or value != defaults[name]}


@dataclass(frozen=True)
class Stored:
    """A photo as it goes into a shard."""

    jpg: bytes
    width: int
    height: int


class Photo(NamedTuple):
    """What a server sent, and what its header says where it is a JPEG that is read here."""

    data: bytes
    header: jpeg.JpegHeader | None
    effort: Effort
    canonical: bool = False
    """A JPEG that is stored as it is, if its profile is sRGB."""


def to_jpeg(data: bytes, settings: PhotoSettings, sha256: str = "") -> Stored:
    """Check a photo and make it a JPEG as shards hold it.

    A JPEG that is upright, sRGB or grey, is kept byte for byte. Otherwise: first frame, orientation applied,
    transparency on white, 16 bit to 8, other colour spaces to sRGB, and written as JPEG without metadata.

    Args:
        data: What the server sent.
        settings: Which photos to take.
        sha256: Digest of `data` where it is known already.

    Raises:
        PhotoError: Not a photo, damaged, a placeholder, or beyond the limits. Whatever a decoder raises becomes one.
    """
    return store(examine(data, settings, sha256), settings)


def examine(data: bytes, settings: PhotoSettings, sha256: str = "") -> Photo:
    """Look at a photo's header, in microseconds for a JPEG.

    Raises:
        PhotoError: What is known by then speaks against it.
    """
    if settings.placeholders and is_placeholder(sha256 or hashlib.sha256(data).hexdigest(), settings.placeholders):
        raise PhotoError("placeholder", "known by its sha256 digest")
    header = jpeg.read_header(data) if data.startswith(_JPEG) else None
    if header is None:
        check_magic(data)
        return Photo(data, None, "unknown")
    _check_size(header.width, header.height, settings)
    work = header.width * header.height
    if not header.one_scan:
        if (scans := jpeg.count_scans(data)) > settings.max_scans:
            raise PhotoError("bomb", f"{scans:,} scans; --photo.max-scans is {settings.max_scans:,}")
        work *= scans
    effort: Effort = "little" if work <= _LITTLE else "much" if work <= _MUCH else "unknown"
    canonical = header.plain and header.orientation == 1 and not _shrinks(header.width, header.height, settings)
    if not canonical or (header.profile and not seen_srgb(header.profile, header.mode)):
        effort = "unknown"
    return Photo(data, header, effort, canonical)


def store(photo: Photo, settings: PhotoSettings) -> Stored:
    """Check a photo that was looked at and make it a JPEG as shards hold it. Raises PhotoError, see `to_jpeg`."""
    try:
        return _store(photo, settings)
    except PhotoError:
        raise
    except MemoryError:
        raise PhotoError("bomb", "needs more memory than there is") from None
    except Exception as error:
        # Decoders and encoders fail in many ways (OSError, RecursionError, struct.error, ...): all mean the photo.
        raise PhotoError("truncated", f"cannot be decoded ({type(error).__name__}: {error})") from None


def _store(photo: Photo, settings: PhotoSettings) -> Stored:
    data, header = photo.data, photo.header
    if header is None and data.startswith(_JPEG):
        wrong = jpeg.damage(data)
        regular = jpeg.complete(data, wrong)
        if regular and (again := examine(regular, settings)).header:
            return _store(again, settings)
        if wrong and not _is_unsupported(wrong):
            raise PhotoError("truncated", wrong)
    if header is None:
        return _convert(data, settings)
    if (settings.check == "decode" or not jpeg.ends(data)) and (wrong := jpeg.damage(data)):
        if not (regular := jpeg.complete(data, wrong)):
            raise PhotoError("unsupported" if _is_unsupported(wrong) else "truncated", wrong)
        data = regular
    if settings.check == "decode" and not header.one_scan and not jpeg.has_every_scan(data):
        raise PhotoError("truncated", "a JPEG without its last scans")
    if photo.canonical and (not header.profile or is_srgb(header.profile, header.mode)):
        return Stored(data, header.width, header.height)
    return _convert(data, settings, header.orientation)


def _is_unsupported(wrong: str) -> bool:
    """Whether libjpeg says that it does not know a kind of JPEG, rather than that something is wrong with this one."""
    return "supported" in wrong.lower()


def _convert(data: bytes, settings: PhotoSettings, turn: int | None = None) -> Stored:
    """Decode a photo and write it anew."""
    check_size = partial(_check_size, settings=settings)
    with warnings.catch_warnings():
        # The pixel cap is ours; Pillow's own warning would go to a worker's log.
        warnings.simplefilter("ignore")
        try:
            if not has_right_pixels(data):
                raise PhotoError("truncated", "PNG with damaged pixels")
            image = decode(data, check_size, settings.max_frames)
        except PhotoError as error:
            if error.kind != "truncated" or not (regular := repaired(data) or with_right_size(data)):
                raise
            image = decode(regular, check_size, settings.max_frames)
        upright = turned(to_rgb(image), orientation(image) if turn is None else turn)
    if _shrinks(*upright.size, settings):
        upright = _shrunk(upright, settings.resize or 0)
    out = io.BytesIO()
    try:
        upright.save(out, "JPEG", quality=settings.quality, subsampling=0)
    except OSError as error:
        raise PhotoError("unsupported", f"cannot be written as JPEG: {error}") from None
    return Stored(out.getvalue(), *upright.size)


def _check_size(width: int, height: int, settings: PhotoSettings) -> None:
    if width * height > settings.max_pixels:
        raise PhotoError("bomb", f"{_sides(width, height)}; --photo.max-pixels is {settings.max_pixels:,}")
    if max(width, height) > jpeg.LONGEST_SIDE and not settings.resize:
        most = f"a JPEG has at most {jpeg.LONGEST_SIDE:,} on a side (--photo.resize makes photos smaller)"
        raise PhotoError("unsupported", f"{_sides(width, height)}; {most}")
    if min(width, height) < settings.min_side:
        raise PhotoError("placeholder", f"{_sides(width, height)}; --photo.min-side is {settings.min_side:,}")


def _sides(width: int, height: int) -> str:
    return f"{width:,} x {height:,} pixels"


def _shrinks(width: int, height: int, settings: PhotoSettings) -> bool:
    return settings.resize is not None and max(width, height) > settings.resize


def _shrunk(image: Image.Image, longest: int) -> Image.Image:
    scale = longest / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
