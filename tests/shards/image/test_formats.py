"""Every mode and format: turned once, not black, and whole where every pixel is there."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from lavic.shards.image.normalize import PhotoError, PhotoSettings
from tests.shards.fault_server import encoded, make_noise
from tests.shards.image.to_jpeg import to_jpeg

Image.init()
SETTINGS = PhotoSettings()
UNDO = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
RAMP = np.tile(np.linspace(0, 1, 64, dtype=np.float32), (48, 1))


def greys(data: bytes) -> list[int]:
    """What is stored of the ramp, at five places from left to right."""
    image = Image.open(io.BytesIO(to_jpeg(data, SETTINGS).jpg)).convert("RGB")
    values = [image.getpixel((x, 24)) for x in (2, 16, 32, 48, 61)]
    assert all(max(value) - min(value) < 6 for value in values)
    return [value[1] for value in values]


def tiff(values: np.ndarray, *, bits: int, form: int, photometric: int = 1, width: int = 64) -> bytes:
    """A TIFF of one uncompressed strip; Pillow writes few of the forms that it reads."""
    order = ">" if values.dtype.byteorder == ">" else "<"
    data = values.tobytes()
    tags = ((256, width), (257, len(values)), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1))
    entries = [*tags, (278, len(values)), (279, len(data)), (339, form)]
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "I", 8 + len(data))
    body = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in entries)
    return head + data + struct.pack(order + "H", len(entries)) + body + bytes(4)


def twelve_bits() -> np.ndarray:
    values = (RAMP * 4095).astype(np.uint16)
    left, right = values[:, 0::2], values[:, 1::2]
    triples = np.stack([left >> 4, (left & 15) << 4 | right >> 8, right & 255], axis=2)
    return triples.reshape(48, 96).astype(np.uint8)


def over_the_top() -> np.ndarray:
    values = RAMP.copy()
    values[:8], values[8:16] = np.inf, np.nan
    return values


DEEP = {
    "float 0 to 1": tiff(RAMP, bits=32, form=3),
    "float 0 to 255": tiff(RAMP * 255, bits=32, form=3),
    "float -1 to 1": tiff(RAMP * 2 - 1, bits=32, form=3),
    "float 0 to a million": tiff(RAMP * 1e6, bits=32, form=3),
    "float a little over": tiff(RAMP * 1.02 - np.float32(0.01), bits=32, form=3),
    "float with infinities": tiff(over_the_top(), bits=32, form=3),
    "float big-endian": tiff(RAMP.astype(">f4"), bits=32, form=3),
    "float white is zero": tiff(1 - RAMP, bits=32, form=3, photometric=0),
    "12 bit": tiff(twelve_bits(), bits=12, form=1),
    "16 bit": tiff((RAMP * 65535).astype("<u2"), bits=16, form=1),
    "16 bit big-endian": tiff((RAMP * 65535).astype(">u2"), bits=16, form=1),
    "16 bit white is zero": tiff((65535 - RAMP * 65535).astype("<u2"), bits=16, form=1, photometric=0),
    "16 bit signed": tiff((RAMP * 65535 - 32768).astype("<i2"), bits=16, form=2),
    "16 bit signed and positive": tiff((RAMP * 32767).astype(">i2"), bits=16, form=2),
    "32 bit with 16 used": tiff((RAMP * 65535).astype("<i4"), bits=32, form=2),
    "32 bit": tiff((RAMP * 2e9).astype("<i4"), bits=32, form=2),
    "16 bit PNG": encoded(Image.fromarray((RAMP * 65535).astype(np.uint16)), "PNG"),
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_greys_are_neither_black_nor_white(name: str) -> None:
    assert np.abs(np.array(greys(DEEP[name])) - [8, 65, 130, 194, 247]).max() <= 6


def test_a_dark_photo_of_16_bits_stays_dark() -> None:
    assert max(greys(encoded(Image.fromarray((RAMP * 200).astype(np.uint16)), "PNG"))) <= 1
    assert max(greys(tiff(RAMP * 0, bits=32, form=3))) == 0


def lab() -> Image.Image:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    turn = ImageCms.buildTransform(*profiles, "RGB", "LAB")
    made = ImageCms.applyTransform(grey().convert("RGB"), turn)
    assert made
    return made


def grey() -> Image.Image:
    return Image.fromarray((RAMP * 255).astype(np.uint8))


MODES = {
    "JPEG": ("L", "RGB", "YCbCr", "CMYK"),
    "PNG": ("L", "LA", "P", "RGB", "RGBA"),
    "TIFF": ("L", "LA", "P", "RGB", "RGBA", "CMYK", "LAB"),
    "WEBP": ("L", "P", "RGB", "RGBA"),
}


@pytest.mark.parametrize(("format", "mode"), [(format, mode) for format, modes in MODES.items() for mode in modes])
def test_every_mode(format: str, mode: str) -> None:
    image = lab() if mode == "LAB" else (grey().convert("RGB") if mode == "YCbCr" else grey()).convert(mode)
    assert np.abs(np.array(greys(encoded(image, format))) - [8, 64, 129, 194, 247]).max() <= 6


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "I;16"])
def test_one_transparent_colour_becomes_white(mode: str) -> None:
    image = Image.fromarray((RAMP * 65535).astype(np.uint16)) if mode == "I;16" else grey().convert(mode)
    clear = {"RGB": (0, 0, 0), "P": bytes((0, *[255] * 255))}.get(mode, 0)
    made = Image.open(io.BytesIO(to_jpeg(encoded(image, "PNG", transparency=clear), SETTINGS).jpg))
    assert made.getpixel((0, 24))[0] > 200 and made.getpixel((16, 24))[0] < 90


def turned(turn: int, format: str, **options: object) -> bytes:
    """A file with a red quarter at the top left once a viewer has turned it."""
    upright = Image.new("RGB", (80, 48), "blue")
    upright.paste("red", (0, 0, 40, 24))
    image = upright if turn == 1 else upright.transpose(Image.Transpose(UNDO[turn]))
    exif = Image.Exif()
    exif[0x0112] = turn
    return encoded(image, format, exif=exif, **({"append_images": [image]} if format == "MPO" else {}), **options)


def is_upright(data: bytes) -> bool:
    image = Image.open(io.BytesIO(data))
    red = [image.getpixel(at)[0] > 128 for at in ((9, 9), (70, 9), (9, 38), (70, 38))]
    return (image.size, red) == ((80, 48), [True, False, False, False])


ORIENTED: list[tuple[str, dict[str, object]]] = [
    ("JPEG", {}),
    ("MPO", {"save_all": True}),
    ("PNG", {}),
    ("WEBP", {}),
    ("TIFF", {}),
    ("TIFF", {"compression": "tiff_lzw"}),
    ("TIFF", {"compression": "jpeg"}),
    ("AVIF", {}),
]


@pytest.mark.parametrize(("format", "options"), ORIENTED)
@pytest.mark.parametrize("turn", range(1, 9))
def test_every_format_is_turned_once(format: str, options: dict[str, object], turn: int) -> None:
    if format == "AVIF" and "AVIF" not in Image.SAVE:
        pytest.skip("this Pillow has no AVIF")
    assert is_upright(to_jpeg(turned(turn, format, **options), SETTINGS).jpg)


def test_exif_of_png_may_stand_behind_the_pixels() -> None:
    data = turned(6, "PNG")
    at, end = data.index(b"eXIf") - 4, data.index(b"IEND") - 4
    size = 12 + struct.unpack(">I", data[at : at + 4])[0]
    moved = data[:at] + data[at + size : end] + data[at : at + size] + data[end:]
    assert is_upright(to_jpeg(moved, SETTINGS).jpg)


def test_heic_is_read_where_its_decoder_is_installed() -> None:
    pytest.importorskip("pillow_heif").register_heif_opener()
    data = turned(1, "HEIF", quality=90)
    assert is_upright(to_jpeg(data, SETTINGS).jpg)
    # HEIC is turned by properties of its own; what EXIF says of it is history.
    assert to_jpeg(turned(6, "HEIF"), SETTINGS).width == 48
    for turn in range(2, 9):
        # The encoder writes such properties for images whose orientation it reads itself.
        assert is_upright(
            to_jpeg(encoded(Image.open(io.BytesIO(turned(turn, "PNG"))), "HEIF", quality=90), SETTINGS).jpg
        )
    assert refused(data[:-200]) == refused(data[:200]) == "truncated"


def test_without_the_decoder_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from lavic.shards.image import formats

    monkeypatch.setattr(formats, "_reads_heif", lambda: False)
    monkeypatch.setattr(Image, "OPEN", {name: value for name, value in Image.OPEN.items() if name != "AVIF"})
    for brand, hint in ((b"heic", "lavic[heif]"), (b"mif1", "lavic[heif]"), (b"avif", "Pillow 11.3")):
        with pytest.raises(PhotoError) as caught:
            to_jpeg(b"\0\0\0\x18ftyp" + brand + bytes(4) + brand + bytes(40), SETTINGS)
        assert caught.value.kind == "unsupported" and hint in caught.value.reason


def refused(data: bytes, settings: PhotoSettings = SETTINGS) -> str:
    with pytest.raises(PhotoError) as caught:
        to_jpeg(data, settings)
    return caught.value.kind


def chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    found, at = [], 8
    while at < len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        found.append((kind, data[at + 8 : at + 8 + size]))
        at += 12 + size
    return found


def joined(found: list[tuple[bytes, bytes]], wrong: bytes = b"") -> bytes:
    """A PNG of these chunks; the checksums of one kind are wrong."""
    parts = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body) ^ (kind == wrong))
        for kind, body in found
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_odd_pngs_are_kept() -> None:
    data = encoded(make_noise(), "PNG")
    expected = to_jpeg(data, SETTINGS)
    header, pixels, end = chunks(data)
    text = (b"tEXt", b"Comment\0a shop's words")
    stream = pixels[1]
    odd = {
        "checksum of text": joined([header, text, pixels, end], wrong=b"tEXt"),
        "checksum of a profile": joined([header, (b"iCCP", b"x\0\0junk"), pixels, end], wrong=b"iCCP"),
        "checksum of the pixels' chunk": joined([header, pixels, end], wrong=b"IDAT"),
        "checksum of the stream": joined([header, (b"IDAT", stream[:-4] + b"oops"), end]),
        "no checksum of the stream": joined([header, (b"IDAT", stream[:-4]), end]),
        "no end": joined([header, pixels]),
        "wrong end": joined([header, pixels, end], wrong=b"IEND"),
        "bytes behind the end": data + b"garbage" * 99,
        "many pieces": joined([header, *((b"IDAT", stream[n : n + 7]) for n in range(0, len(stream), 7)), end]),
        "more pixels than places": joined(
            [header, (b"IDAT", zlib.compress(zlib.decompress(stream) + bytes(999))), end], wrong=b"IDAT"
        ),
    }
    for name, bytes_ in odd.items():
        assert to_jpeg(bytes_, SETTINGS) == expected, name


def test_pngs_without_a_pixel_are_refused() -> None:
    data = encoded(make_noise(), "PNG")
    header, (_, stream), end = chunks(data)
    palette = encoded(make_noise().quantize(8), "PNG")
    damaged = bytearray(stream)
    damaged[len(stream) // 2] ^= 1
    bad = {
        "cut": joined([header, (b"IDAT", stream[: len(stream) // 2]), end]),
        "cut by a little": joined([header, (b"IDAT", stream[:-40]), end]),
        "a flipped bit": data.replace(stream, bytes(damaged)),
        "palette": joined(chunks(palette), wrong=b"PLTE"),
        "no pixels": joined([header, end]),
    }
    for name, bytes_ in bad.items():
        assert refused(bytes_) == "truncated", name


@pytest.mark.parametrize("format", ["PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_what_is_kept_of_a_file_that_is_cut_has_every_pixel(format: str) -> None:
    whole = encoded(make_noise(), format)
    expected = to_jpeg(whole, SETTINGS)
    for at in range(0, len(whole), 1 if len(whole) < 3000 else 7):
        try:
            assert to_jpeg(whole[:at], SETTINGS) == expected, at
        except PhotoError as error:
            assert error.kind in ("truncated", "not_image"), at
    assert to_jpeg(whole + b"more" * 20, SETTINGS) == expected


def test_webps_that_say_a_wrong_length_are_kept() -> None:
    data = encoded(make_noise(), "WEBP")
    for size in (0, len(data) - 20, len(data) + 500):
        assert to_jpeg(data[:4] + struct.pack("<I", size) + data[8:], SETTINGS) == to_jpeg(data, SETTINGS)


def test_kinds_of_tiff_that_are_not_read_are_not_called_damaged() -> None:
    assert refused(tiff(RAMP.astype("<f8"), bits=64, form=3)) == "unsupported"


def test_sides_and_resize() -> None:
    long = encoded(Image.new("L", (40, 65_600), 200), "PNG")
    assert refused(long) == "unsupported" and refused(encoded(Image.new("L", (1, 65_600)), "PNG")) == "unsupported"
    assert (
        refused(encoded(Image.new("RGB", (64, 31)))) == refused(encoded(Image.new("P", (1, 1)), "GIF")) == "placeholder"
    )
    assert to_jpeg(encoded(Image.new("RGB", (64, 31))), PhotoSettings(min_side=31)).height == 31
    small = PhotoSettings(resize=50)
    assert (made := to_jpeg(long, small)).height == 50 and made.width == 1
    for format, turn, size in (
        ("JPEG", 1, (50, 30)),
        ("JPEG", 6, (50, 30)),
        ("PNG", 1, (50, 30)),
        ("TIFF", 8, (50, 30)),
    ):
        made = to_jpeg(turned(turn, format), small)
        image = Image.open(io.BytesIO(made.jpg))
        assert image.size == (made.width, made.height) == size and image.getpixel((5, 5))[0] > 200
    # Never up, and with its own bytes.
    assert to_jpeg(turned(1, "JPEG"), PhotoSettings(resize=80)).jpg == turned(1, "JPEG")
