"""JPEGs: malformed but complete files are kept or repaired, truncated ones are refused."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from lavic.shards.image.normalize import PhotoError, PhotoSettings
from tests.shards.fault_server import encoded, make_noise
from tests.shards.image.to_jpeg import to_jpeg

SETTINGS = PhotoSettings()
ENCODINGS = {
    "baseline": {"quality": 85},
    "progressive": {"quality": 85, "progressive": True},
    "restarts": {"quality": 85, "restart_marker_blocks": 2},
    "444": {"quality": 85, "subsampling": 0, "progressive": True},
}


def pixels(data: bytes) -> np.ndarray:
    return simplejpeg.decode_jpeg(data, "RGB", strict=False)


def check_strict_decoding(data: bytes) -> None:
    """Decodes as readers do that treat warnings as errors: libjpeg and Pillow."""
    simplejpeg.decode_jpeg(data, "RGB", strict=True)
    Image.open(io.BytesIO(data)).load()


def malformed_variants(data: bytes) -> dict[str, bytes]:
    tables, scan = data.index(b"\xff\xdb"), data.index(b"\xff\xda")
    first = scan + 2 + struct.unpack(">H", data[scan + 2 : scan + 4])[0]
    return {
        "a zero before the tables": data[:tables] + b"\0" + data[tables:],
        "a fill byte before the tables": data[:tables] + b"\xff" + data[tables:],
        "bytes behind the first marker": data[:2] + b"\0\0" + data[2:],
        "text before the scan": data[:scan] + b"\0text" + data[scan:],
        "no end marker": data[:-2],
        "half an end marker": data[:-1],
        "no end marker and zeros": data[:-2] + bytes(500),
        "another JFIF version": data.replace(b"JFIF\0\x01\x01", b"JFIF\0\x02\x07", 1),
        "parameters of a progressive scan": data[: first - 3] + b"\0\0\0" + data[first:],
        "an unknown colour transform": without_jfif(data, transform=7),
        "the colour transform of four components": without_jfif(data, transform=2),
        "an unknown colour transform behind the frame": data[:2] + data[20:scan] + adobe(7) + data[scan:],
    }


def adobe(transform: int) -> bytes:
    return b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0" + bytes([transform])


def without_jfif(data: bytes, transform: int) -> bytes:
    """Replaces JFIF by an Adobe segment, which then decides the colour transform."""
    return data[:2] + adobe(transform) + data[20:]


@pytest.mark.parametrize("name", malformed_variants(encoded(make_noise())))
def test_malformed_jpegs_are_repaired_with_the_same_pixels(name: str) -> None:
    plain = encoded(make_noise(), quality=85)
    stored = to_jpeg(malformed_variants(plain)[name], SETTINGS).jpg
    check_strict_decoding(stored)
    assert np.array_equal(pixels(stored), pixels(plain))


@pytest.mark.parametrize("name", ["trailing bytes", "bytes before the end marker", "broken EXIF"])
def test_harmless_extra_bytes_keep_the_file_unchanged(name: str) -> None:
    plain = encoded(make_noise(), quality=85)
    data = {
        "trailing bytes": plain + b"garbage" * 100,
        "bytes before the end marker": plain[:-2] + b"\x12\x34\xff\xd9",
        "broken EXIF": plain[:2] + b"\xff\xe1\0\x10Exif\0\0garbage!" + plain[2:],
    }[name]
    assert to_jpeg(data, SETTINGS).jpg == data


@pytest.mark.parametrize("tail", [b"\xff\xd9", bytes(3000), bytes(3000) + b"\xff\xd9"])
def test_malformed_jpegs_without_their_end_are_refused(tail: bytes) -> None:
    for name, data in malformed_variants(encoded(make_noise(), quality=85)).items():
        with pytest.raises(PhotoError) as caught:
            to_jpeg(data[: len(data) * 2 // 3] + tail, SETTINGS)
        assert caught.value.kind == "truncated", name


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_truncated_jpeg_is_kept_only_with_every_pixel(encoding: str) -> None:
    """Truncated at any byte: as is, with an end marker, or padded with zeros."""
    complete = encoded(make_noise(), **ENCODINGS[encoding])
    expected = pixels(complete)
    kept = 0
    for length in range(2, len(complete)):
        for tail in (b"", b"\xff\xd9", bytes(300), bytes(3000) + b"\xff\xd9"):
            try:
                stored = to_jpeg(complete[:length] + tail, SETTINGS).jpg
            except PhotoError:
                continue
            assert np.array_equal(pixels(stored), expected), f"cut at {length} of {len(complete)}, then {tail[:4]!r}"
            kept += 1
    assert kept >= 5


def test_a_jpeg_without_huffman_tables_is_encoded_again() -> None:
    """As frames of motion JPEG: libjpeg-turbo uses the standard tables."""
    plain = encoded(make_noise(), quality=85)
    without_tables = plain
    while (offset := without_tables.find(b"\xff\xc4")) >= 0:
        (size,) = struct.unpack(">H", without_tables[offset + 2 : offset + 4])
        without_tables = without_tables[:offset] + without_tables[offset + 2 + size :]
    stored = to_jpeg(without_tables, SETTINGS).jpg
    assert b"\xff\xc4" in stored and np.abs(pixels(stored).astype(int) - pixels(plain)).mean() < 3


def test_an_unknown_cmyk_transform_is_read_as_ycck() -> None:
    plain = encoded(make_noise().convert("CMYK"), quality=85)
    offset = plain.index(b"Adobe") + 11
    unknown, ycck = (plain[:offset] + code + plain[offset + 1 :] for code in (b"\x07", b"\x02"))
    assert to_jpeg(unknown, SETTINGS).jpg == to_jpeg(ycck, SETTINGS).jpg
