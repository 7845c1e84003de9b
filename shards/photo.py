"""From the bytes a server sent to the JPEG that is stored: whole, upright, sRGB; untouched where it already is that."""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from PIL import Image, ImageOps
from pydantic import Field, field_validator

from lavic.config import settings
from lavic.shards.colour import is_srgb, to_srgb
from lavic.shards.gif import count_frames
from lavic.shards.jpeg import damage, ends, read_header
from lavic.shards.outcomes import Kind
from lavic.storage.text_files import TextFileError, read_lines

_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\x00", b"MM\x00*")
_FOREIGN = (b"\x00\x00\x00\x0cJXL ", b"\xff\x0a", b"\x00\x00\x00\x0cjP  ", b"8BPS")
_ORIENTATION = 0x0112
_UPRIGHT = 1
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MOST_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)
"""Beyond this Pillow refuses by itself."""


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
    quality: int = Field(default=95, ge=1, le=100)
    """JPEG quality of photos that must be written anew: other formats, turned or transparent ones, other colour
    spaces. Others keep their bytes."""
    placeholders: tuple[str, ...] = ()
    """Images that stand for missing photos: sha256 digests of what the server sends, or files with one on each line,
    as `sha256sum` writes them."""

    @field_validator("placeholders")
    @classmethod
    def _digests(cls, words: tuple[str, ...]) -> tuple[str, ...]:
        """Files are read at once: workers elsewhere may not see them, and the plan is to know what is in them."""
        return tuple(sorted({digest for word in words for digest in _read_digests(word)}))


@dataclass(frozen=True)
class Stored:
    """A photo as it goes into a shard."""

    jpg: bytes
    width: int
    height: int


class PhotoError(Exception):
    """A photo that cannot be taken, with the kind under which it is counted."""

    def __init__(self, kind: Kind, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason


def to_jpeg(data: bytes, settings: PhotoSettings, sha256: str = "") -> Stored:
    """Check a photo and make it a JPEG as shards hold it.

    A JPEG that is upright, sRGB or grey, is kept byte for byte. Otherwise: first frame, orientation applied,
    transparency on white, 16 bit to 8, other colour spaces to sRGB, and written as JPEG without metadata.

    Args:
        data: What the server sent.
        settings: Which photos to take.
        sha256: Digest of `data` where it is known already.

    Raises:
        PhotoError: Not a photo, damaged, a known stand-in, or beyond the limits.
    """
    if settings.placeholders and (sha256 or hashlib.sha256(data).hexdigest()) in _known(settings.placeholders):
        raise PhotoError("placeholder", "a known stand-in for a missing photo")
    header = read_header(data) if data.startswith(_MAGIC[0]) else None
    if header is None:
        return _convert(data, settings)
    _check_pixels(header.width, header.height, settings)
    if not header.plain or header.exif or header.icc:
        return _convert(data, settings)
    return _keep(data, header.width, header.height, settings)


def _keep(data: bytes, width: int, height: int, settings: PhotoSettings) -> Stored:
    if (settings.check == "decode" or not ends(data)) and (wrong := damage(data)):
        raise PhotoError("truncated", wrong)
    return Stored(data, width, height)


def _convert(data: bytes, settings: PhotoSettings) -> Stored:
    """The way of everything that is not plainly a plain JPEG."""
    with warnings.catch_warnings():
        # The pixel cap is ours; Pillow's own warning would go to a worker's log.
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
        except Exception as error:
            # Parsers of foreign bytes fail in many ways (OSError, SyntaxError, struct.error, ...): all mean the same.
            raise _unreadable(data, error) from None
        _check_pixels(image.width, image.height, settings)
        try:
            if (frames := _frames(image, data)) > settings.max_frames:
                raise PhotoError("bomb", f"{frames:,} frames")
            if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
                profile = image.info.get("icc_profile")
                if _orientation(image) == _UPRIGHT and (not profile or is_srgb(profile, image.mode)):
                    return _keep(data, *image.size, settings)
            upright = _upright_rgb(image)
        except PhotoError:
            raise
        except Exception as error:
            raise _undecodable(image, error) from None
    out = io.BytesIO()
    upright.save(out, "JPEG", quality=settings.quality, subsampling=0)
    return Stored(out.getvalue(), *upright.size)


def _check_pixels(width: int, height: int, settings: PhotoSettings) -> None:
    if width * height > settings.max_pixels:
        raise PhotoError("bomb", f"{width:,} x {height:,} pixels")


def _frames(image: Image.Image, data: bytes) -> int:
    """Frames by what the file's structure says; nothing is decoded."""
    if image.format == "GIF":
        return count_frames(data)
    # JPEGs with a second picture behind the first are photos with a preview, not animations.
    return 1 if image.format in ("JPEG", "MPO") else int(getattr(image, "n_frames", 1))


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION, _UPRIGHT)
    except Exception:
        # Broken EXIF says nothing about orientation, and nothing against the photo.
        return _UPRIGHT
    return value if isinstance(value, int) and 1 <= value <= 8 else _UPRIGHT


def _upright_rgb(image: Image.Image) -> Image.Image:
    image.seek(0)
    turn = _orientation(image)
    image.load()
    image = _rgb(image)
    if turn != _UPRIGHT:
        exif = Image.Exif()
        exif[_ORIENTATION] = turn
        image.info["exif"] = exif.tobytes()
        image = ImageOps.exif_transpose(image)
    image.info = {}
    return image


def _rgb(image: Image.Image) -> Image.Image:
    """8 bit, sRGB, on white."""
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        values = np.asarray(image, dtype=np.float64)
        # 16-bit greys arrive as 32-bit integers from some formats.
        image = Image.fromarray((values / (257 if values.max() > 255 else 1)).clip(0, 255).astype(np.uint8))
    elif image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        return Image.composite(to_srgb(image.convert("RGB"), profile), Image.new("RGB", image.size, "white"), alpha)
    elif image.mode not in ("RGB", "L", "CMYK", "LAB"):
        image = image.convert("RGB")
    return to_srgb(image, profile)


def _unreadable(data: bytes, error: Exception) -> PhotoError:
    if not data:
        return PhotoError("truncated", "an empty answer")
    if isinstance(error, Image.DecompressionBombError) or "too large" in str(error).lower():
        # The second is what Pillow says of compressed text that unpacks without end.
        return PhotoError("bomb", str(error))
    if data.startswith(_MAGIC):
        return PhotoError("truncated", f"begins like an image and cannot be read ({type(error).__name__})")
    if data.startswith(_FOREIGN) or data[4:8] == b"ftyp" or b"<svg" in data[:512].lower():
        return PhotoError("unsupported", "an image format that is not read here")
    start = data[:24].decode("latin-1").replace("\n", " ").strip()
    return PhotoError("not_image", f"begins with {start!r}")


def _undecodable(image: Image.Image, error: Exception) -> PhotoError:
    if isinstance(error, Image.DecompressionBombError) or "too large" in str(error).lower():
        return PhotoError("bomb", str(error))
    return PhotoError("truncated", f"{image.format} that cannot be decoded: {error}")


def _read_digests(word: str) -> list[str]:
    if _SHA256.fullmatch(word.lower()):
        return [word.lower()]
    try:
        lines = [line.split()[0].lower() for _, line in read_lines(word) if line.strip()]
    except TextFileError as error:
        raise ValueError(f"{word!r} is neither a sha256 digest nor a file that can be read ({error})") from None
    if wrong := [line for line in lines if not _SHA256.fullmatch(line)]:
        raise ValueError(f"{word}: {wrong[0]!r} is not a sha256 digest; one at the start of each line is expected")
    return lines


@lru_cache(maxsize=4)
def _known(placeholders: tuple[str, ...]) -> frozenset[str]:
    return frozenset(placeholders)
