"""Every photo becomes an upright sRGB JPEG or is refused with an outcome kind."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from random import Random

import pytest
from PIL import Image

from lavic.shards.image.normalize import PhotoError, PhotoSettings
from lavic.shards.image.placeholders import placeholder_id
from lavic.shards.pack.outcomes import KINDS
from tests.external import EXTERNAL
from tests.shards.image.to_jpeg import to_jpeg

CASES = EXTERNAL / "cases/crawl/img"
DECODE, HEADER = PhotoSettings(), PhotoSettings(check="header")
KEPT = ["plain.jpg", "progressive.jpg", "grey.jpg", "bad-exif.jpg", "srgb.jpg", "bad-profile.jpg"]


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("settings", [DECODE, HEADER])
def test_a_valid_jpeg_is_stored_unchanged(photos: dict[str, bytes], name: str, settings: PhotoSettings) -> None:
    stored = to_jpeg(photos[name], settings)
    assert stored.jpg == photos[name] and (stored.width, stored.height) == (64, 48)


@pytest.mark.parametrize(
    "name",
    [
        *("rotated.jpg", "clear.png", "palette.gif", "palette.png", "animated.gif", "animated.webp", "cmyk.jpg"),
        "profile.jpg",
    ],
)
def test_other_photos_become_upright_srgb_jpegs(photos: dict[str, bytes], name: str) -> None:
    stored = to_jpeg(photos[name], HEADER)
    image = Image.open(io.BytesIO(stored.jpg))
    assert (
        (image.format, image.mode, image.size)
        == ("JPEG", "RGB", (64, 48))
        == ("JPEG", "RGB", (stored.width, stored.height))
    )
    assert not image.getexif() and "icc_profile" not in image.info
    left, right = image.getpixel((10, 24)), image.getpixel((54, 24))
    if name != "palette.png":
        assert left[0] > 180 and left[2] < 90, f"{name}: red is not on the left: {left}"
        assert right[2] > 180 and right[0] < 90, f"{name}: blue is not on the right: {right}"
    else:
        assert (255, 255, 255) in (left, right), f"the transparent colour is not white: {left}, {right}"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_applied(orientation: int) -> None:
    """All eight files show the same image after their orientation is applied."""
    upright = Image.new("RGB", (80, 48), "blue")
    upright.paste("red", (0, 0, 40, 24))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    out = io.BytesIO()
    stored.save(out, "JPEG", exif=exif, quality=95, subsampling=0)
    normalized = to_jpeg(out.getvalue(), DECODE)
    image = Image.open(io.BytesIO(normalized.jpg))
    assert image.size == (80, 48) == (normalized.width, normalized.height)
    red = [image.getpixel(at)[0] > 128 for at in ((9, 9), (70, 9), (9, 38), (70, 38))]
    assert red == [True, False, False, False] and (orientation == 1) == (normalized.jpg == out.getvalue())


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
        ("cut-and-closed.jpg", "truncated"),
        ("cut.png", "truncated"),
        ("empty.jpg", "truncated"),
        ("bomb.png", "bomb"),
        ("bomb.jpg", "bomb"),
        ("zip-bomb.png", "bomb"),
        ("text-bomb.png", "bomb"),
        ("page.jpg", "not_image"),
        ("drawing.jpg", "unsupported"),
        ("apple.jpg", "unsupported"),
    ],
)
def test_refused_photos_have_an_outcome_kind(photos: dict[str, bytes], name: str, kind: str) -> None:
    assert refusal_kind(photos[name], DECODE) == kind


def refusal_kind(data: bytes, settings: PhotoSettings) -> str:
    with pytest.raises(PhotoError) as caught:
        to_jpeg(data, settings)
    assert caught.value.reason
    return caught.value.kind


def test_damage_inside_a_jpeg_is_found_by_decoding(photos: dict[str, bytes]) -> None:
    """Half of the coded data is lost, both ends are intact: libjpeg decodes it without an error."""
    data = photos["plain.jpg"]
    damaged = data[: len(data) // 2] + bytes(200) + data[-200:]
    assert refusal_kind(damaged, DECODE) == "truncated"
    assert to_jpeg(damaged, HEADER).jpg == damaged


def test_the_header_check_reads_both_ends(photos: dict[str, bytes]) -> None:
    assert refusal_kind(photos["cut.jpg"], HEADER) == "truncated"
    assert refusal_kind(photos["plain.jpg"], PhotoSettings(check="header", max_pixels=100)) == "bomb"
    padded = photos["plain.jpg"] + bytes(1000)
    assert to_jpeg(padded, HEADER).jpg == padded


def test_corrupted_photos_are_decoded_or_refused(photos: dict[str, bytes]) -> None:
    random = Random(1)
    for name in ("plain.jpg", "clear.png", "animated.gif", "animated.webp", "profile.jpg"):
        for _ in range(60):
            data = bytearray(photos[name])
            for _ in range(random.randrange(1, 9)):
                data[random.randrange(len(data))] = random.randrange(256)
            try:
                Image.open(io.BytesIO(to_jpeg(bytes(data[: random.randrange(len(data))]), DECODE).jpg)).load()
            except PhotoError as error:
                assert error.kind in KINDS


def test_placeholders_are_matched_by_digest_and_amazon_id(photos: dict[str, bytes], tmp_path: Path) -> None:
    digest = hashlib.sha256(photos["stand-in.jpg"]).hexdigest()
    (tmp_path / "known.txt").write_text(f"\ufeff{digest}  stand-in.jpg\n{'0' * 64}\n\n71-Ab+cdEfL no photo\n")
    for placeholders in ((digest.upper(),), (str(tmp_path / "known.txt"),)):
        settings = PhotoSettings(placeholders=placeholders)
        assert refusal_kind(photos["stand-in.jpg"], settings) == "placeholder" and digest in settings.placeholders
        assert to_jpeg(photos["plain.jpg"], settings).jpg == photos["plain.jpg"]
    amazon = "https://m.media-amazon.com/images/I/71-Ab%2BcdEfL._AC_SL1500_.jpg"
    for placeholders in (("71-Ab+cdEfL",), (str(tmp_path / "known.txt"),), (amazon,)):
        assert placeholder_id(amazon, PhotoSettings(placeholders=placeholders).placeholders) == "71-Ab+cdEfL"
    for unknown in (str(tmp_path / "none"), "abc"):
        with pytest.raises(ValueError, match="neither a sha256 digest nor a file"):
            PhotoSettings(placeholders=(unknown,))
    (tmp_path / "wrong.txt").write_text("a shop's word\n")
    with pytest.raises(ValueError, match="'a' is not a sha256 digest or an Amazon image id"):
        PhotoSettings(placeholders=(str(tmp_path / "wrong.txt"),))


@pytest.mark.parametrize(
    ("url", "known"),
    [
        ("https://m.media-amazon.com/images/I/01RmK+J4pJL.gif", True),
        ("https://m.media-amazon.com/images/I/01RmK+J4pJL._AC_SL1500_.jpg", True),
        ("https://images-na.ssl-images-amazon.com/images/I/01RmK%2BJ4pJL._SX38_SY50_CR,0,0,38,50_.jpg", True),
        ("https://m.media-amazon.com/images/W/WEBP_402378-T1/images/I/01MKUOLsA5L._SL500_.gif", True),
        ("http://g-ecx.images-amazon.com/images/G/01/x-site/icons/no-img-sm._CB192198896_.gif", True),
        ("http://g-ecx.images-amazon.com/images/G/01/nav2/dp/no-image-avail-img-map._V192545771_AA300_.gif", True),
        ("https://m.media-amazon.com/images/I/71yko2LDYUL._AC_UL1500_.jpg", False),
        ("https://shop.example/images/I/01RmK+J4pJL.gif", False),
        ("https://shop.example/no-img-sm.gif", False),
        ("http://[broken/images/I/01RmK+J4pJL.gif", False),
    ],
)
def test_amazon_placeholders_are_matched_in_any_size(url: str, known: bool) -> None:
    assert bool(placeholder_id(url, ())) == known


def test_defaults_of_newer_settings_are_not_in_the_identity() -> None:
    before = {"check": "decode", "max_pixels": 50_000_000, "max_frames": 1000, "quality": 95, "placeholders": ()}
    assert PhotoSettings().identity() == PhotoSettings(decode_seconds=1).identity() == before
    assert PhotoSettings(min_side=16, resize=512).identity() == {**before, "min_side": 16, "resize": 512}


def test_the_first_frame_of_an_animation_is_stored(photos: dict[str, bytes]) -> None:
    three_frames, many_frames = (to_jpeg(photos[name], DECODE) for name in ("animated.gif", "frames.gif"))
    assert three_frames == many_frames and (many_frames.width, many_frames.height) == (64, 48)


@pytest.mark.external
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("turned6.tif", "ok"),
        ("no-eoi.jpg", "ok"),
        ("pad-before-dqt.jpg", "ok"),
        ("1x1.gif", "placeholder"),
        ("tall.png", "unsupported"),
    ],
)
def test_cases_from_bug_reports(name: str, kind: str) -> None:
    data = (CASES / name).read_bytes()
    if kind != "ok":
        assert refusal_kind(data, DECODE) == kind
        return
    image = Image.open(io.BytesIO(to_jpeg(data, DECODE).jpg))
    image.load()
    assert image.size == (64, 48)
    if name == "turned6.tif":
        assert image.getpixel((2, 24))[0] > 200 and image.getpixel((61, 24))[2] > 200


def test_equal_photos_give_equal_bytes(photos: dict[str, bytes]) -> None:
    for name in ("clear.png", "profile.jpg", "cmyk.jpg"):
        assert to_jpeg(photos[name], DECODE) == to_jpeg(photos[name], DECODE)
