"""Placeholders for missing photos: known by Amazon's image id, or by the bytes that the server sends."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from lavic.data.sources.image_links import amazon_image_id
from lavic.storage.text_files import TextFileError, read_lines

AMAZON = frozenset(
    {
        *("01RmK+J4pJL", "01AodW1Gh-L", "01QFb8SNuTL", "01PkLIhTX3L", "21xiVkxN-SL", "01GmVhVRioL"),
        *("01RPy1SfeqL", "01-y6Ov3R+L", "01e-XWjq3EL", "11RGjrCdvsL", "01MKUOLsA5L", "31CTP6oiIBL"),
    }
)
"""Ids of the images that Amazon's shops show for products without one, in several languages: those that the shops'
pages replace, and those that MusicBrainz' cover art importer skips."""

_NO_IMAGE = re.compile(r"no-ima?ge?-\w.*")
"""Names under `/images/G/`, as `x-site/icons/no-img-sm` and `nav2/dp/no-image-avail-img-map`."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ID = re.compile(r"[A-Za-z0-9+-]{11}")


def read_placeholders(word: str) -> list[str]:
    """The digests and ids of one value of `--photo.placeholders`.

    Raises:
        ValueError: It is neither, nor a file with one on each line.
    """
    if (mark := _placeholder_key(word)) and not Path(word).is_file():
        return [mark]
    try:
        lines = [line.split()[0] for _, line in read_lines(word) if line.strip()]
    except TextFileError as error:
        raise ValueError(
            f"{word!r} is neither a sha256 digest nor a file that can be read ({error}), nor an Amazon image id"
        ) from None
    if wrong := [line for line in lines if not _placeholder_key(line)]:
        raise ValueError(
            f"{word}: {wrong[0]!r} is not a sha256 digest or an Amazon image id, as expected at the start of each line"
        )
    return [_placeholder_key(line) for line in lines]


def placeholder_id(url: str, placeholders: tuple[str, ...]) -> str:
    """The Amazon image id of a link to a known placeholder, in any size; empty for other links."""
    id = amazon_image_id(url)
    if not id or not (id in AMAZON or id in _known(placeholders) or _NO_IMAGE.fullmatch(id.rpartition("/")[2])):
        return ""
    return id


def is_placeholder(sha256: str, placeholders: tuple[str, ...]) -> bool:
    """Whether a response with this digest is a known placeholder."""
    return sha256 in _known(placeholders)


def _placeholder_key(word: str) -> str:
    if _SHA256.fullmatch(word.lower()):
        return word.lower()
    return word if _ID.fullmatch(word) else amazon_image_id(word) or ""


@lru_cache(maxsize=4)
def _known(placeholders: Iterable[str]) -> frozenset[str]:
    return frozenset(placeholders)
