"""What a site forbids crawlers: robots.txt (RFC 9309) and opt-outs in response headers."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from protego import Protego

from lavic.shards.http.content_encoding import CorruptBody, UnsupportedEncoding, decode
from lavic.shards.pack.outcomes import Kind

PRODUCT = "lavic"
"""The name of this crawler in robots.txt and X-Robots-Tag."""
MAX_BYTES = 500 * 1024
"""Bytes of a robots.txt that are read, as the RFC demands."""
MAX_AGE_S = 24 * 3600.0
"""Seconds that a robots.txt is valid, the RFC's limit."""
RETRY_S = 60.0
"""Seconds after which a robots.txt that could not be read is requested again."""

ACCEPT = "text/plain, */*;q=0.5"
_IMAGES = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"RIFF")
_BOMS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_CONTROLS = bytes({*range(32), 127} - set(b"\t\n\v\f\r\x1a\x1b"))
_RULE = re.compile(rb"^\s*(user-?agent|(dis)?allow)\s*:", re.IGNORECASE | re.MULTILINE)
_OUR_VERSION = re.compile(rf"^(\s*user-?agent\s*:\s*{PRODUCT})(?![a-z_-])[^\r\n#]+", re.IGNORECASE | re.MULTILINE)
"""A version or comment after this crawler's name, as in `LaViC/1.0`, which crawlers ignore."""
_OPT_OUTS = frozenset({"noai", "noimageai", "noindex", "noimageindex", "noml", "none"})
_WITH_VALUE = re.compile(r"\s*(unavailable_after|max-[a-z-]+)\s*:", re.IGNORECASE)
_WITH_PRODUCT = re.compile(r"\s*([A-Za-z0-9_*.-]+)\s*:(.*)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Robots:
    """A site's robots.txt, or why it could not be read."""

    kind: Kind = "ok"
    """Other than ok: it could not be read, so nothing is allowed (RFC 9309, 2.3.1.4) and photos end as this kind."""
    reason: str = ""
    text: str = ""
    """Empty if there is no robots.txt, or none with rules: everything is allowed."""
    final: bool = False
    """Whether a retry cannot succeed."""

    @classmethod
    def read(cls, body: bytes, codings: Iterable[str] = ()) -> Robots:
        """Decode the first `MAX_BYTES` of a robots.txt, leniently; gzip is recognized even if no coding names it."""
        names = list(codings) or (["gzip"] if body.startswith(b"\x1f\x8b") else [])
        try:
            decoded = decode(body, names, MAX_BYTES)
            text = _decode_text(decoded)
        except (UnsupportedEncoding, CorruptBody, _NotText) as error:
            reason = f"{', '.join(names)}: {error}" if names else str(error)
            return cls(kind="unasked", reason=reason, final=True)
        if max(len(body), len(decoded)) >= MAX_BYTES:
            # A rule that was cut in two would forbid more, or less, than it should.
            text = text[: max(text.rfind("\n"), text.rfind("\r")) + 1]
        # Concatenated files contain further byte order marks.
        return cls(text=_OUR_VERSION.sub(r"\1", text.replace("\ufeff", "")))


@dataclass
class Rules:
    """A parsed robots.txt."""

    robots: Robots
    delay: float = field(init=False, default=0.0)
    """Seconds between two requests by Crawl-delay, which is not in the RFC; 0 for none."""
    _parsed: Protego | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.robots.text:
            self._parsed = Protego.parse(self.robots.text)
            self.delay = self._parsed.crawl_delay(PRODUCT) or 0.0

    def allow(self, url: object) -> bool:
        """Whether this crawler may fetch a URL."""
        return self._parsed is None or self._parsed.can_fetch(str(url), PRODUCT)


def opt_out(tags: Iterable[str], tdm: str = "") -> str:
    """The opt-out in a response's headers, empty if there is none.

    Args:
        tags: Every X-Robots-Tag header. A part that names a crawler counts where it names this one, `lavic`, or `*`.
        tdm: The TDM-Reservation header; `1` reserves the rights to text and data mining.
    """
    for header in tags:
        applies = True
        for part in header.split(","):
            word = part
            if not _WITH_VALUE.match(part) and (named := _WITH_PRODUCT.match(part)):
                applies = named[1].lower() in (PRODUCT, "*")
                word = named[2]
            if applies and (word := word.strip().lower()) in _OPT_OUTS:
                return f"X-Robots-Tag: {word}"
    return "TDM-Reservation: 1" if tdm.strip() == "1" else ""


class _NotText(Exception):
    """Bytes that are not text."""


def _decode_text(body: bytes) -> str:
    """The text; empty for an image, which holds no rules."""
    if body.startswith(_IMAGES):
        return ""
    for mark, encoding in _BOMS.items():
        if body.startswith(mark):
            return body[len(mark) :].decode(encoding, "replace")
    if len(body) > 3 and (body[1] == body[3] == 0 or body[0] == body[2] == 0):
        return body.decode("utf-16-le" if body[1] == 0 else "utf-16-be", "replace")
    if len(body.translate(None, _CONTROLS)) < 0.95 * len(body) and not _RULE.search(body):
        raise _NotText("not text")
    # Bytes that are not UTF-8 are escaped as in a URL.
    text = body.decode("utf-8", "surrogateescape")
    return re.sub("[\udc80-\udcff]", lambda byte: f"%{ord(byte[0]) - 0xDC00:02X}", text)
