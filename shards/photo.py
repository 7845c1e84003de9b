"""From the bytes a server sent to the JPEG that is stored: whole, upright, RGB; untouched where it already is that."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageCms, ImageOps
from pydantic import Field

from lavic.config import settings
from lavic.shards.outcomes import Kind

_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\x00", b"MM\x00*")
_FOREIGN = (b"\x00\x00\x00\x0cJXL ", b"\xff\x0a", b"\x00\x00\x00\x0cjP  ", b"8BPS")
_ORIENTATION = 0x0112
_UPRIGHT = 1


@settings
class PhotoSettings:
    """Which photos are taken, and how they are stored."""

    check: Literal["decode", "header"] = "decode"
    """decode: read every photo to its end, so that a damaged one is found now; header: trust what the header says."""
    max_pixels: int = Field(default=50_000_000, ge=1)
    """Photos with more pixels than this are refused before they are decoded."""
    quality: int = Field(default=95, ge=1, le=100)
    """JPEG quality of photos that must be written anew: other formats, turned or transparent ones. Others keep their
    bytes."""


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


def to_jpeg(data: bytes, settings: PhotoSettings) -> Stored:
    """Check a photo and make it a JPEG as shards hold it.

    A JPEG that is upright and RGB or grey is kept byte for byte. Otherwise: first frame, orientation applied,
    transparency on white, 16 bit to 8, CMYK to RGB, and written as JPEG without metadata.

    Raises:
        PhotoError: Not a photo, damaged, or beyond the limits.
    """
    with warnings.catch_warnings():
        # The pixel cap below is ours; Pillow's own warning would go to a worker's log.
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
        except Image.DecompressionBombError as error:
            raise PhotoError("bomb", str(error)) from None
        except Exception as error:
            # Parsers of foreign bytes fail in many ways (OSError, SyntaxError, struct.error, ...): all mean the same.
            raise _unreadable(data, error) from None
        if image.width * image.height > settings.max_pixels:
            raise PhotoError("bomb", f"{image.width} x {image.height} pixels")
        try:
            if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L") and _orientation(image) == _UPRIGHT:
                size = image.size
                if settings.check == "decode":
                    # An eighth of the size and grey: every byte is still read, most of the arithmetic is not done.
                    image.draft("L", (max(1, size[0] // 8), max(1, size[1] // 8)))
                    image.load()
                return Stored(data, *size)
            upright = _upright_rgb(image)
        except Image.DecompressionBombError as error:
            raise PhotoError("bomb", str(error)) from None
        except Exception as error:
            raise PhotoError("truncated", f"{image.format} that cannot be decoded: {error}") from None
    out = io.BytesIO()
    upright.save(out, "JPEG", quality=settings.quality, subsampling=0)
    return Stored(out.getvalue(), *upright.size)


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
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        values = np.asarray(image, dtype=np.float64)
        # 16-bit greys arrive as 32-bit integers from some formats.
        return Image.fromarray((values / (257 if values.max() > 255 else 1)).clip(0, 255).astype(np.uint8)).convert(
            "RGB"
        )
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    if image.mode == "CMYK" and (profile := image.info.get("icc_profile")):
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
            return converted or image.convert("RGB")
        except ImageCms.PyCMSError:
            pass
    return image.convert("RGB")


def _unreadable(data: bytes, error: Exception) -> PhotoError:
    if not data:
        return PhotoError("truncated", "an empty answer")
    if data.startswith(_MAGIC):
        return PhotoError("truncated", f"begins like an image and cannot be read ({type(error).__name__})")
    if data.startswith(_FOREIGN) or data[4:8] == b"ftyp" or b"<svg" in data[:512].lower():
        return PhotoError("unsupported", "an image format that is not read here")
    start = data[:24].decode("latin-1").replace("\n", " ").strip()
    return PhotoError("not_image", f"begins with {start!r}")
