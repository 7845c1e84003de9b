"""Every kind of photo becomes a whole, upright RGB JPEG, or is refused under its name."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from lavic.shards.photo import PhotoError, PhotoSettings, to_jpeg

DECODE, HEADER = PhotoSettings(), PhotoSettings(check="header")


@pytest.mark.parametrize("name", ["plain.jpg", "grey.jpg", "bad-exif.jpg"])
@pytest.mark.parametrize("how", [DECODE, HEADER])
def test_a_good_jpeg_is_kept_byte_for_byte(photos: dict[str, bytes], name: str, how: PhotoSettings) -> None:
    stored = to_jpeg(photos[name], how)
    assert stored.jpg == photos[name] and (stored.width, stored.height) == (64, 48)


@pytest.mark.parametrize(
    "name", ["rotated.jpg", "clear.png", "palette.gif", "animated.gif", "animated.webp", "cmyk.jpg"]
)
def test_others_become_upright_rgb_jpegs(photos: dict[str, bytes], name: str) -> None:
    stored = to_jpeg(photos[name], DECODE)
    image = Image.open(io.BytesIO(stored.jpg))
    assert (
        (image.format, image.mode, image.size)
        == ("JPEG", "RGB", (64, 48))
        == ("JPEG", "RGB", (stored.width, stored.height))
    )
    assert not image.getexif() and "icc_profile" not in image.info
    left, right = image.getpixel((10, 24)), image.getpixel((54, 24))
    assert left[0] > 180 and left[2] < 90, f"{name}: red is not on the left: {left}"
    assert right[2] > 180 and right[0] < 90, f"{name}: blue is not on the right: {right}"


def test_transparency_becomes_white(photos: dict[str, bytes]) -> None:
    clear = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    out = io.BytesIO()
    clear.save(out, "PNG")
    assert Image.open(io.BytesIO(to_jpeg(out.getvalue(), DECODE).jpg)).getpixel((5, 5)) == (255, 255, 255)


def test_sixteen_bits_become_eight(photos: dict[str, bytes]) -> None:
    image = Image.open(io.BytesIO(to_jpeg(photos["deep.png"], DECODE).jpg))
    assert image.mode == "RGB" and all(abs(value - 128) <= 2 for value in image.getpixel((9, 9)))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("cut.jpg", "truncated"),
        ("cut.png", "truncated"),
        ("empty.jpg", "truncated"),
        ("bomb.png", "bomb"),
        ("page.jpg", "not_image"),
        ("drawing.jpg", "unsupported"),
        ("apple.jpg", "unsupported"),
    ],
)
def test_what_is_refused(photos: dict[str, bytes], name: str, kind: str) -> None:
    with pytest.raises(PhotoError) as caught:
        to_jpeg(photos[name], DECODE)
    assert caught.value.kind == kind and caught.value.reason


def test_the_header_check_trusts_the_header(photos: dict[str, bytes]) -> None:
    assert to_jpeg(photos["cut.jpg"], HEADER).jpg == photos["cut.jpg"]
    with pytest.raises(PhotoError) as caught:
        to_jpeg(photos["plain.jpg"], PhotoSettings(check="header", max_pixels=100))
    assert caught.value.kind == "bomb"


def test_equal_photos_give_equal_bytes(photos: dict[str, bytes]) -> None:
    assert to_jpeg(photos["clear.png"], DECODE) == to_jpeg(photos["clear.png"], DECODE)
