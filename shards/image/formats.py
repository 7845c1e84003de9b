"""Image files of any format: their first frame, decoded by Pillow, or why they cannot be decoded."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache
from typing import Literal

from PIL import Image

from lavic.shards.pack.outcomes import Kind

_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")
_MAGIC = (b"\xff\xd8", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")
_UNSUPPORTED = (b"\0\0\1\0", b"\x00\x00\x00\x0cJXL ", b"\xff\x0a", b"\x00\x00\x00\x0cjP  ", b"8BPS")
_HEIF = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})
_AVIF = frozenset({b"avif", b"avis"})
_ORIENTATION, _UPRIGHT = 0x0112, 1
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Turns an image upright, by its EXIF orientation."""


class PhotoError(Exception):
    """A photo that is refused, with its outcome."""

    def __init__(self, kind: Kind, reason: str) -> None:
        super().__init__(kind, reason)
        self.kind, self.reason = kind, reason


def decode(data: bytes, check_size: Callable[[int, int], None]) -> Image.Image:
    """The first frame of a file, loaded; further ones are not read.

    `check_size` is called with width and height before anything is decoded, and raises PhotoError.

    Raises:
        PhotoError: It cannot be decoded, or is beyond a limit.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=_formats(data))
    except MemoryError:
        raise
    except Exception as error:
        # Parsers of untrusted bytes fail in many ways (OSError, SyntaxError, struct.error, ...): all mean the same.
        raise _unreadable(data, error) from None
    check_size(image.width, image.height)
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:
        raise _undecodable(image, error) from None
    return image


def with_right_length(data: bytes) -> bytes:
    """A WebP with the right length in its header; empty for other files, and if it has it already."""
    size = (len(data) - 8).to_bytes(4, "little")
    return data[:4] + size + data[8:] if data[:4] == b"RIFF" and data[8:12] == b"WEBP" and data[4:8] != size else b""


def orientation(image: Image.Image) -> int:
    """EXIF orientation of a loaded image. Decoders of TIFF and HEIC turn the image and reset it."""
    try:
        value = image.getexif().get(_ORIENTATION, _UPRIGHT)
    except Exception:
        # Broken EXIF is no reason to refuse the photo.
        return _UPRIGHT
    return value if isinstance(value, int) and 1 <= value <= 8 else _UPRIGHT


def turn_upright(image: Image.Image, orientation_tag: int) -> Image.Image:
    """Undo an EXIF orientation."""
    return image.transpose(_TURNS[orientation_tag]) if orientation_tag in _TURNS else image


def _formats(data: bytes) -> list[str]:
    """Pillow's formats that may read the bytes."""
    if data[4:8] != b"ftyp":
        return list(_FORMATS)
    if _is_heif(data):
        return ["HEIF"] if _reads_heif() else []
    Image.init()
    return ["AVIF"] if "AVIF" in Image.OPEN else []


def _is_heif(data: bytes) -> bool:
    return not _brands(data) & _AVIF and bool(_brands(data) & _HEIF)


def _brands(data: bytes) -> set[bytes]:
    """The brands of a file of the ISO base media format."""
    end = min(int.from_bytes(data[:4], "big"), len(data), 256)
    return {data[8:12], *(data[offset : offset + 4] for offset in range(16, end - 3, 4))}


@cache
def _reads_heif() -> bool:
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True


def check_magic(data: bytes) -> None:
    """Raise PhotoError for data that does not begin like a supported file."""
    if not data:
        raise PhotoError("truncated", "an empty response")
    if data[4:8] == b"ftyp" or (data.startswith(_MAGIC) and (data[:4] != b"RIFF" or data[8:12] == b"WEBP")):
        return
    if data.startswith(_UNSUPPORTED) or b"<svg" in data[:512].lower():
        raise PhotoError("unsupported", "an image format that is not supported")
    start = data[:24].decode("latin-1").replace("\n", " ").strip()
    raise PhotoError("not_image", f"begins with {start!r}")


def _unreadable(data: bytes, error: Exception) -> PhotoError:
    if isinstance(error, Image.DecompressionBombError):
        return PhotoError("bomb", "far more pixels than --photo.max-pixels allows")
    if _is_decompression_bomb(error):
        return PhotoError("bomb", str(error))
    if data[4:8] == b"ftyp":
        return _unreadable_media(data)
    if _has_tiff_directory(data):
        return PhotoError("unsupported", "a kind of TIFF that is not supported")
    return PhotoError("truncated", f"begins like an image but cannot be read ({type(error).__name__})")


def _has_tiff_directory(data: bytes) -> bool:
    """Whether the tags of a TIFF's first image are all there."""
    order: Literal["little", "big"] = "little" if data[:2] == b"II" else "big"
    start = int.from_bytes(data[4:8], order)
    entries = int.from_bytes(data[start : start + 2], order)
    return data[:4] in (b"II*\x00", b"MM\x00*") and start > 0 and start + 6 + 12 * entries <= len(data)


def _unreadable_media(data: bytes) -> PhotoError:
    if _formats(data) and b"meta" in data[:1024]:
        return PhotoError("truncated", "HEIC or AVIF that cannot be read")
    if _is_heif(data) and not _reads_heif():
        return PhotoError("unsupported", "HEIC, which pip install 'lavic[heif]' reads")
    if _brands(data) & _AVIF and not _formats(data):
        return PhotoError("unsupported", "AVIF, which Pillow 11.3 and later read")
    return PhotoError("unsupported", "an image or video format that is not supported")


def _undecodable(image: Image.Image, error: Exception) -> PhotoError:
    if _is_decompression_bomb(error):
        return PhotoError("bomb", str(error))
    return PhotoError("truncated", f"{image.format} that cannot be decoded: {error}")


def _is_decompression_bomb(error: Exception) -> bool:
    # The second is what Pillow raises for compressed text.
    return isinstance(error, Image.DecompressionBombError) or "too large" in str(error).lower()
