"""Image formats and modes: grey values, orientation, and truncated or malformed files."""

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


def stored_greys(data: bytes) -> list[int]:
    """Grey values of the stored ramp at five places from left to right."""
    image = Image.open(io.BytesIO(to_jpeg(data, SETTINGS).jpg)).convert("RGB")
    values = [image.getpixel((x, 24)) for x in (2, 16, 32, 48, 61)]
    assert all(max(value) - min(value) < 6 for value in values)
    return [value[1] for value in values]


def tiff(values: np.ndarray, *, bits: int, form: int, photometric: int = 1, width: int = 64) -> bytes:
    """A TIFF of one uncompressed strip; Pillow reads more sample formats than it writes."""
    order = ">" if values.dtype.byteorder == ">" else "<"
    data = values.tobytes()
    tags = ((256, width), (257, len(values)), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1))
    entries = [*tags, (278, len(values)), (279, len(data)), (339, form)]
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "I", 8 + len(data))
    body = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in entries)
    return head + data + struct.pack(order + "H", len(entries)) + body + bytes(4)


def twelve_bits() -> np.ndarray:
    values = (RAMP * 4095).astype(np.uint16)
    even, odd = values[:, 0::2], values[:, 1::2]
    triples = np.stack([even >> 4, (even & 15) << 4 | odd >> 8, odd & 255], axis=2)
    return triples.reshape(48, 96).astype(np.uint8)


def nonfinite_values() -> np.ndarray:
    values = RAMP.copy()
    values[:8], values[8:16] = np.inf, np.nan
    return values


HIGH_BIT_DEPTH = {
    "float 0 to 1": tiff(RAMP, bits=32, form=3),
    "float 0 to 255": tiff(RAMP * 255, bits=32, form=3),
    "float -1 to 1": tiff(RAMP * 2 - 1, bits=32, form=3),
    "float 0 to a million": tiff(RAMP * 1e6, bits=32, form=3),
    "float a little over": tiff(RAMP * 1.02 - np.float32(0.01), bits=32, form=3),
    "float with infinities": tiff(nonfinite_values(), bits=32, form=3),
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


@pytest.mark.parametrize("name", HIGH_BIT_DEPTH)
def test_high_bit_depth_greys_are_scaled(name: str) -> None:
    assert np.abs(np.array(stored_greys(HIGH_BIT_DEPTH[name])) - [8, 65, 130, 194, 247]).max() <= 6


def test_a_dark_16_bit_photo_stays_dark() -> None:
    assert max(stored_greys(encoded(Image.fromarray((RAMP * 200).astype(np.uint16)), "PNG"))) <= 1
    assert max(stored_greys(tiff(RAMP * 0, bits=32, form=3))) == 0


def lab() -> Image.Image:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    transform = ImageCms.buildTransform(*profiles, "RGB", "LAB")
    image = ImageCms.applyTransform(grey().convert("RGB"), transform)
    assert image
    return image


def grey() -> Image.Image:
    return Image.fromarray((RAMP * 255).astype(np.uint8))


MODES = {
    "JPEG": ("L", "RGB", "YCbCr", "CMYK"),
    "PNG": ("L", "LA", "P", "RGB", "RGBA"),
    "TIFF": ("L", "LA", "P", "RGB", "RGBA", "CMYK", "LAB"),
    "WEBP": ("L", "P", "RGB", "RGBA"),
}


@pytest.mark.parametrize(("format", "mode"), [(format, mode) for format, modes in MODES.items() for mode in modes])
def test_grey_values_survive_every_mode(format: str, mode: str) -> None:
    image = lab() if mode == "LAB" else (grey().convert("RGB") if mode == "YCbCr" else grey()).convert(mode)
    assert np.abs(np.array(stored_greys(encoded(image, format))) - [8, 64, 129, 194, 247]).max() <= 6


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "I;16"])
def test_a_transparent_colour_becomes_white(mode: str) -> None:
    image = Image.fromarray((RAMP * 65535).astype(np.uint16)) if mode == "I;16" else grey().convert(mode)
    clear = {"RGB": (0, 0, 0), "P": bytes((0, *[255] * 255))}.get(mode, 0)
    stored = Image.open(io.BytesIO(to_jpeg(encoded(image, "PNG", transparency=clear), SETTINGS).jpg))
    assert stored.getpixel((0, 24))[0] > 200 and stored.getpixel((16, 24))[0] < 90


def with_alpha(format: str, alpha: int) -> bytes:
    image = grey().convert("RGBA")
    image.putalpha(alpha)
    if format != "BMP":
        return encoded(image, format, lossless=True)
    # Pillow writes no BMP that declares its fourth channel.
    pixels = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM).tobytes("raw", "BGRA")
    header = struct.pack("<IiiHHI20x", 108, *image.size, 1, 32, 3)
    header += struct.pack("<IIII52x", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    start = 14 + len(header)
    return struct.pack("<2sIII", b"BM", start + len(pixels), 0, start) + header + pixels


@pytest.mark.parametrize(("format", "darkest"), [("BMP", 8), ("TIFF", 8), ("PNG", 255), ("WEBP", 255)])
def test_a_fourth_channel_of_zeros_is_transparency_where_programs_mean_it(format: str, darkest: int) -> None:
    assert Image.open(io.BytesIO(with_alpha(format, 0))).mode == "RGBA"
    assert abs(min(stored_greys(with_alpha(format, 0))) - darkest) <= 6
    assert min(stored_greys(with_alpha(format, 1))) > 250


def oriented_file(orientation: int, format: str, **options: object) -> bytes:
    """A file that shows a red quarter at the top left after its EXIF orientation is applied."""
    upright = Image.new("RGB", (80, 48), "blue")
    upright.paste("red", (0, 0, 40, 24))
    image = upright if orientation == 1 else upright.transpose(Image.Transpose(UNDO[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
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
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once_in_every_format(
    format: str, options: dict[str, object], orientation: int
) -> None:
    if format == "AVIF" and "AVIF" not in Image.SAVE:
        pytest.skip("this Pillow has no AVIF")
    assert is_upright(to_jpeg(oriented_file(orientation, format, **options), SETTINGS).jpg)


def test_png_exif_after_the_pixels_is_read() -> None:
    data = oriented_file(6, "PNG")
    start, end = data.index(b"eXIf") - 4, data.index(b"IEND") - 4
    size = 12 + struct.unpack(">I", data[start : start + 4])[0]
    reordered = data[:start] + data[start + size : end] + data[start : start + size] + data[end:]
    assert is_upright(to_jpeg(reordered, SETTINGS).jpg)


def test_heic_is_read_if_its_decoder_is_installed() -> None:
    pytest.importorskip("pillow_heif").register_heif_opener()
    data = oriented_file(1, "HEIF", quality=90)
    assert is_upright(to_jpeg(data, SETTINGS).jpg)
    # HEIC has its own rotation properties; its EXIF orientation is already applied.
    assert to_jpeg(oriented_file(6, "HEIF"), SETTINGS).width == 48
    for orientation in range(2, 9):
        # The encoder writes these properties for images with an EXIF orientation.
        image = Image.open(io.BytesIO(oriented_file(orientation, "PNG")))
        assert is_upright(to_jpeg(encoded(image, "HEIF", quality=90), SETTINGS).jpg)
    assert refusal_kind(data[:-200]) == refusal_kind(data[:200]) == "truncated"


def test_a_missing_decoder_names_the_package_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from lavic.shards.image import formats

    monkeypatch.setattr(formats, "_reads_heif", lambda: False)
    monkeypatch.setattr(Image, "OPEN", {name: value for name, value in Image.OPEN.items() if name != "AVIF"})
    for brand, hint in ((b"heic", "lavic[heif]"), (b"mif1", "lavic[heif]"), (b"avif", "Pillow 11.3")):
        with pytest.raises(PhotoError) as caught:
            to_jpeg(b"\0\0\0\x18ftyp" + brand + bytes(4) + brand + bytes(40), SETTINGS)
        assert caught.value.kind == "unsupported" and hint in caught.value.reason


def refusal_kind(data: bytes, settings: PhotoSettings = SETTINGS) -> str:
    with pytest.raises(PhotoError) as caught:
        to_jpeg(data, settings)
    return caught.value.kind


def chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    parsed, offset = [], 8
    while offset < len(data):
        size, kind = struct.unpack(">I4s", data[offset : offset + 8])
        parsed.append((kind, data[offset + 8 : offset + 8 + size]))
        offset += 12 + size
    return parsed


def join_chunks(pairs: list[tuple[bytes, bytes]], wrong_checksum: bytes = b"") -> bytes:
    """A PNG of the given chunks, with wrong checksums for one kind of chunk."""
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in pairs:
        checksum = zlib.crc32(kind + body) ^ (kind == wrong_checksum)
        data += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)
    return data


def test_malformed_pngs_with_all_pixels_are_read() -> None:
    data = encoded(make_noise(), "PNG")
    expected = to_jpeg(data, SETTINGS)
    header, pixels, end = chunks(data)
    text = (b"tEXt", b"Comment\0a shop's words")
    stream = pixels[1]
    malformed = {
        "checksum of text": join_chunks([header, text, pixels, end], wrong_checksum=b"tEXt"),
        "checksum of a profile": join_chunks([header, (b"iCCP", b"x\0\0junk"), pixels, end], wrong_checksum=b"iCCP"),
        "checksum of the pixels' chunk": join_chunks([header, pixels, end], wrong_checksum=b"IDAT"),
        "checksum of the stream": join_chunks([header, (b"IDAT", stream[:-4] + b"oops"), end]),
        "no checksum of the stream": join_chunks([header, (b"IDAT", stream[:-4]), end]),
        "no end": join_chunks([header, pixels]),
        "wrong end": join_chunks([header, pixels, end], wrong_checksum=b"IEND"),
        "bytes behind the end": data + b"garbage" * 99,
        "many pieces": join_chunks([header, *((b"IDAT", stream[n : n + 7]) for n in range(0, len(stream), 7)), end]),
        "more pixels than places": join_chunks(
            [header, (b"IDAT", zlib.compress(zlib.decompress(stream) + bytes(999))), end], wrong_checksum=b"IDAT"
        ),
    }
    for name, bytes_ in malformed.items():
        assert to_jpeg(bytes_, SETTINGS) == expected, name


def test_pngs_that_lack_a_pixel_are_refused() -> None:
    data = encoded(make_noise(), "PNG")
    header, (_, stream), end = chunks(data)
    palette = encoded(make_noise().quantize(8), "PNG")
    damaged = bytearray(stream)
    damaged[len(stream) // 2] ^= 1
    bad = {
        "cut": join_chunks([header, (b"IDAT", stream[: len(stream) // 2]), end]),
        "cut by a little": join_chunks([header, (b"IDAT", stream[:-40]), end]),
        "a flipped bit": data.replace(stream, bytes(damaged)),
        "palette": join_chunks(chunks(palette), wrong_checksum=b"PLTE"),
        "no pixels": join_chunks([header, end]),
    }
    for name, bytes_ in bad.items():
        assert refusal_kind(bytes_) == "truncated", name


@pytest.mark.parametrize("format", ["PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_a_truncated_file_is_complete_or_refused(format: str) -> None:
    complete = encoded(make_noise(), format)
    expected = to_jpeg(complete, SETTINGS)
    for length in range(0, len(complete), 1 if len(complete) < 3000 else 7):
        try:
            assert to_jpeg(complete[:length], SETTINGS) == expected, length
        except PhotoError as error:
            assert error.kind in ("truncated", "not_image"), length
    assert to_jpeg(complete + b"more" * 20, SETTINGS) == expected


def test_webps_with_a_wrong_length_are_read() -> None:
    data = encoded(make_noise(), "WEBP")
    for size in (0, len(data) - 20, len(data) + 500):
        assert to_jpeg(data[:4] + struct.pack("<I", size) + data[8:], SETTINGS) == to_jpeg(data, SETTINGS)


def test_unreadable_tiff_types_are_unsupported() -> None:
    assert refusal_kind(tiff(RAMP.astype("<f8"), bits=64, form=3)) == "unsupported"


def test_min_side_max_side_and_resize() -> None:
    tall = Image.new("L", (40, 65_600), 200)
    for image in (tall, Image.new("L", (1, 65_600))):
        assert refusal_kind(encoded(image, "PNG")) == "unsupported"
    for image, format in ((Image.new("RGB", (64, 31)), "JPEG"), (Image.new("P", (1, 1)), "GIF")):
        assert refusal_kind(encoded(image, format)) == "placeholder"
    assert to_jpeg(encoded(Image.new("RGB", (64, 31))), PhotoSettings(min_side=31)).height == 31
    settings = PhotoSettings(resize=50)
    assert (stored := to_jpeg(encoded(tall, "PNG"), settings)).height == 50 and stored.width == 1
    for format, orientation, size in (
        ("JPEG", 1, (50, 30)),
        ("JPEG", 6, (50, 30)),
        ("PNG", 1, (50, 30)),
        ("TIFF", 8, (50, 30)),
    ):
        stored = to_jpeg(oriented_file(orientation, format), settings)
        image = Image.open(io.BytesIO(stored.jpg))
        assert image.size == (stored.width, stored.height) == size and image.getpixel((5, 5))[0] > 200
    # A smaller photo is stored unchanged.
    assert to_jpeg(oriented_file(1, "JPEG"), PhotoSettings(resize=80)).jpg == oriented_file(1, "JPEG")
