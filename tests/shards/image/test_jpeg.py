"""JPEGs that are odd and whole are kept, those that lack a coded pixel are refused, wherever they are cut."""

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
FORMS = {
    "baseline": {"quality": 85},
    "progressive": {"quality": 85, "progressive": True},
    "restarts": {"quality": 85, "restart_marker_blocks": 2},
    "444": {"quality": 85, "subsampling": 0, "progressive": True},
}


def pixels(data: bytes) -> np.ndarray:
    return simplejpeg.decode_jpeg(data, "RGB", strict=False)


def strictly_read(data: bytes) -> None:
    """As readers do that take no warning: libjpeg's own check, and Pillow."""
    simplejpeg.decode_jpeg(data, "RGB", strict=True)
    Image.open(io.BytesIO(data)).load()


def odd_forms(data: bytes) -> dict[str, bytes]:
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
    """With an Adobe segment instead, which decides the colours where there is no JFIF."""
    return data[:2] + adobe(transform) + data[20:]


@pytest.mark.parametrize("name", odd_forms(encoded(make_noise())))
def test_odd_jpegs_keep_their_pixels_and_can_be_read_by_all(name: str) -> None:
    plain = encoded(make_noise(), quality=85)
    stored = to_jpeg(odd_forms(plain)[name], SETTINGS).jpg
    strictly_read(stored)
    assert np.array_equal(pixels(stored), pixels(plain))


@pytest.mark.parametrize("name", ["trailing bytes", "bytes before the end marker", "broken EXIF"])
def test_odd_jpegs_that_all_can_read_keep_their_bytes(name: str) -> None:
    plain = encoded(make_noise(), quality=85)
    data = {
        "trailing bytes": plain + b"garbage" * 100,
        "bytes before the end marker": plain[:-2] + b"\x12\x34\xff\xd9",
        "broken EXIF": plain[:2] + b"\xff\xe1\0\x10Exif\0\0garbage!" + plain[2:],
    }[name]
    assert to_jpeg(data, SETTINGS).jpg == data


@pytest.mark.parametrize("tail", [b"\xff\xd9", bytes(3000), bytes(3000) + b"\xff\xd9"])
def test_odd_jpegs_without_their_second_half_are_refused(tail: bytes) -> None:
    for name, data in odd_forms(encoded(make_noise(), quality=85)).items():
        with pytest.raises(PhotoError) as caught:
            to_jpeg(data[: len(data) * 2 // 3] + tail, SETTINGS)
        assert caught.value.kind == "truncated", name


@pytest.mark.parametrize("form", FORMS)
def test_a_jpeg_is_kept_only_where_every_pixel_is_there(form: str) -> None:
    """Cut at any byte, alone, closed with an end marker, or filled up with zeros."""
    whole = encoded(make_noise(), **FORMS[form])
    expected = pixels(whole)
    kept = 0
    for at in range(2, len(whole)):
        for tail in (b"", b"\xff\xd9", bytes(300), bytes(3000) + b"\xff\xd9"):
            try:
                stored = to_jpeg(whole[:at] + tail, SETTINGS).jpg
            except PhotoError:
                continue
            assert np.array_equal(pixels(stored), expected), f"cut at {at} of {len(whole)}, then {tail[:4]!r}"
            kept += 1
    assert kept >= 5


def test_codings_that_few_readers_know_are_written_anew() -> None:
    """Without its own Huffman tables, as frames of a camera's film are: libjpeg-turbo has the usual ones."""
    plain = encoded(make_noise(), quality=85)
    bare = plain
    while (at := bare.find(b"\xff\xc4")) >= 0:
        bare = bare[:at] + bare[at + 2 + struct.unpack(">H", bare[at + 2 : at + 4])[0] :]
    stored = to_jpeg(bare, SETTINGS).jpg
    assert b"\xff\xc4" in stored and np.abs(pixels(stored).astype(int) - pixels(plain)).mean() < 3


def test_four_components_of_an_unknown_transform_are_those_that_decoders_take_them_for() -> None:
    plain = encoded(make_noise().convert("CMYK"), quality=85)
    at = plain.index(b"Adobe") + 11
    odd = plain[:at] + b"\x07" + plain[at + 1 :]
    assert to_jpeg(odd, SETTINGS).jpg == to_jpeg(plain[:at] + b"\x02" + plain[at + 1 :], SETTINGS).jpg
