"""Links to photos: which of them show the same picture."""

from __future__ import annotations

import re
from urllib.parse import unquote, urlsplit, urlunsplit

_AMAZON = re.compile(r"(?:.+\.)?(?:media-amazon|images-amazon|ssl-images-amazon)\.com")
_AMAZON_PHOTO = re.compile(
    r"/images/(?:W/[^/]+/images/)*(?P<kind>[A-Z])/(?P<id>.+?)(?:\._(?P<changes>.*)_)?\.\w+", re.DOTALL
)
"""A served image: its id, then the requested changes, such as `._AC_SX300_`. `W/...` names a way of delivery."""
_PLAIN_LINK = re.compile(r"https?://(?P<host>[A-Za-z0-9.-]+)(?::\d+)?(?P<path>/[!$->@-~]*)(?:[?#][!-~]*)?")
_ONLY_SIZE = re.compile(
    r"(?:S[XYLS]|U[XYLS])\d+"  # width, height, longest side, side of a square
    r"|SC(?:L|M|T)ZZZZZZZ|SCTHUMBZZZ|SCSWATCHZZ"  # the older names of five sizes
    r"|QL\d+|FM(?:jpg|png|webp)|AC|\.?"  # JPEG quality, file format, a prefix of the web shop's sizes
)
"""The changes that keep the picture. A square (`_SS`, `_US`) pads with white and crops nothing, see
https://hail2u.net/blog/internet/zoom-resize-crop-amazon-image.html; `_SC...` are the sizes of the Product Advertising
API. All others, including unknown ones, count as changes of the picture: crops, overlays, badges (`_CR`, `_CLa`,
`_PE20`)."""


def picture_of(url: str) -> str:
    """Identifies the picture that a link shows: equal for links to one picture in different sizes.

    Amazon serves an image under one id in any size, https://m.media-amazon.com/images/I/<id>._<changes>_.<ext>. Links
    whose changes affect only size, quality or format show the same picture. Any other link is its own picture, except
    for the letter case of its host and its fragment.
    """
    if image := _amazon_image(url):
        changes = image["changes"] or ""
        only_sizes = all(map(_ONLY_SIZE.fullmatch, changes.split("_")))
        return f"amazon:{image['kind']}/{image['id']}" + ("" if only_sizes else f"._{changes}_")
    try:
        parts = urlsplit(url)
    except ValueError:
        return url
    return urlunsplit((parts.scheme, parts.netloc.lower(), parts.path, parts.query, ""))


def amazon_image_id(url: str) -> str | None:
    """The id of an image that Amazon serves, such as `01RmK+J4pJL`, in any size; None for any other link."""
    image = _amazon_image(url)
    return image["id"] if image else None


def _amazon_image(url: str) -> re.Match[str] | None:
    if "amazon.com" not in url.lower():
        return None
    # Called for every photo: this expression takes a tenth of the time of urlsplit.
    if match := _PLAIN_LINK.fullmatch(url):
        host, path = match["host"].lower(), match["path"]
    else:
        try:
            parts = urlsplit(url)
            host, path = parts.hostname or "", parts.path
        except ValueError:
            return None
    return _AMAZON_PHOTO.fullmatch(unquote(path)) if _AMAZON.fullmatch(host.rstrip(".")) else None
