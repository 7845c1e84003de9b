"""Content codings: bodies that are compressed although `identity` was requested."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable

from lavic.storage.compression import zstd_module

_GZIP = b"\x1f\x8b"
_IMAGES = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"RIFF", b"II*\0", b"MM\0*", b"BM")
_ISO_MEDIA = (b"ftyp", b"jP  ")
"""Magic bytes 4 to 8 of HEIC, AVIF and JPEG 2000."""
_TEXT = re.compile(rb"[^\x00-\x08\x0e-\x1f\x7f]*")
_EXAMINED = 1024
_COMPRESSIONS = frozenset({"gzip", "x-gzip", "deflate", "br", "zstd", "compress", "x-compress"})


class UnsupportedEncoding(Exception):
    """A body whose compression is not supported here."""


class CorruptBody(Exception):
    """A compressed body that ends early or is damaged."""


def codings(content: Iterable[str], transfer: Iterable[str] = ()) -> list[str]:
    """Names of the compressions in Content-Encoding and Transfer-Encoding, in the order they were applied.

    Values that name no compression (`none`, `utf-8`, empty) are ignored, as in curl.
    """
    words = (word.strip().lower() for value in (*content, *transfer) for word in value.split(","))
    return [word for word in words if word in _COMPRESSIONS]


def decode(body: bytes, names: list[str], limit: int) -> bytes:
    """Decompress a body, to at most `limit + 1` bytes.

    A body that is an image or text is returned as it is: some servers label files as compressed that are not.

    Raises:
        UnsupportedEncoding: There is no decoder for one of them.
        CorruptBody: The body is truncated or damaged.
    """
    for name in reversed(names):
        if _is_plain(body):
            return body
        body = _DECODERS.get(name.removeprefix("x-"), _unknown)(body, limit + 1)
        if len(body) > limit:
            return body
    return body


def _is_plain(body: bytes) -> bool:
    if body.startswith(_IMAGES) or body[4:8] in _ISO_MEDIA or not body:
        return True
    start = body[:_EXAMINED]
    if not _TEXT.fullmatch(start):
        return False
    try:
        start.decode("utf-8")
    except UnicodeDecodeError as error:
        # The last character may be truncated.
        return len(body) > _EXAMINED and error.start > _EXAMINED - 4
    return True


def _unknown(body: bytes, limit: int) -> bytes:
    raise UnsupportedEncoding("no decoder for this compression")


def _gzip(body: bytes, limit: int) -> bytes:
    """One or more gzip members; what follows the last is ignored, as in gzip and curl."""
    out, size = [], 0
    while True:
        part, body = _inflate(body, zlib.MAX_WBITS | 32, limit - size)
        out.append(part)
        size += len(part)
        if size >= limit or not body.startswith(_GZIP):
            return b"".join(out)


def _deflate(body: bytes, limit: int) -> bytes:
    """A zlib stream, as the standard says, or a raw one, which many servers send."""
    try:
        return _inflate(body, zlib.MAX_WBITS | 32, limit)[0]
    except CorruptBody as error:
        try:
            return _inflate(body, -zlib.MAX_WBITS, limit)[0]
        except CorruptBody:
            raise error from None


def _inflate(body: bytes, bits: int, limit: int) -> tuple[bytes, bytes]:
    decoder = zlib.decompressobj(bits)
    try:
        decoded = decoder.decompress(body, limit)
    except zlib.error as error:
        raise CorruptBody(f"cannot be decompressed: {error}") from None
    if len(decoded) < limit and not decoder.eof:
        raise CorruptBody("the compressed response ended early")
    return decoded, decoder.unused_data


def _brotli(body: bytes, limit: int) -> bytes:
    try:
        import brotli
    except ImportError:
        raise UnsupportedEncoding("install brotli to read it") from None
    decoder = brotli.Decompressor()
    try:
        decoded: bytes = decoder.process(body, output_buffer_limit=limit)
        while (
            len(decoded) < limit and not decoder.is_finished() and (chunk := decoder.process(b"", limit - len(decoded)))
        ):
            decoded += chunk
    except TypeError:
        raise UnsupportedEncoding("this brotli cannot limit its output; update it") from None
    except brotli.error as error:
        raise CorruptBody(f"cannot be decompressed: {error}") from None
    if len(decoded) < limit and not decoder.is_finished():
        raise CorruptBody("the compressed response ended early")
    return decoded


def _zstd(body: bytes, limit: int) -> bytes:
    try:
        zstd = zstd_module()
    except ImportError as error:
        raise UnsupportedEncoding(str(error)) from None
    decoder = zstd.ZstdDecompressor()
    try:
        decoded: bytes = decoder.decompress(body, limit)
    except zstd.ZstdError as error:
        raise CorruptBody(f"cannot be decompressed: {error}") from None
    if len(decoded) < limit and not decoder.eof:
        raise CorruptBody("the compressed response ended early")
    return decoded


_DECODERS = {"gzip": _gzip, "deflate": _deflate, "br": _brotli, "zstd": _zstd}
