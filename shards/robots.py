"""What a site forbids crawlers: robots.txt (RFC 9309) and the opt-outs in an answer's headers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from protego import Protego

from lavic.shards.outcomes import Kind

PRODUCT = "lavic"
"""The name by which robots.txt and X-Robots-Tag may speak to this crawler."""
MAX_BYTES = 500 * 1024
"""As much of a robots.txt is read as the RFC demands."""
KEPT_S = 24 * 3600.0
"""For so long a robots.txt holds, the RFC's limit."""
RETRY_S = 60.0
"""A robots.txt that could not be read is asked for again after this."""

_OPT_OUTS = frozenset({"noai", "noimageai", "noindex", "noimageindex", "noml", "none"})
_VALUED = re.compile(r"\s*(unavailable_after|max-[a-z-]+)\s*:", re.IGNORECASE)
_NAMED = re.compile(r"\s*([A-Za-z0-9_*.-]+)\s*:(.*)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Robots:
    """What came of asking a site for its robots.txt."""

    kind: Kind = "ok"
    """Other than ok: it could not be read, so that nothing is allowed (RFC 9309, 2.3.1.4)."""
    reason: str = ""
    text: str = ""
    """Empty: everything is allowed, as where there is none."""


@dataclass
class Rules:
    """A site's robots.txt, read."""

    robots: Robots
    _parsed: Protego | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.robots.text:
            self._parsed = Protego.parse(self.robots.text.removeprefix("\ufeff"))

    def allow(self, url: str) -> bool:
        """Whether robots.txt lets this crawler fetch an address."""
        return self._parsed is None or self._parsed.can_fetch(url, PRODUCT)

    @property
    def delay(self) -> float:
        """Seconds between requests that it asks for; 0 for none. Not in the RFC, and yet the host's wish."""
        return (self._parsed and self._parsed.crawl_delay(PRODUCT)) or 0.0


def opt_out(tags: Iterable[str], tdm: str = "") -> str:
    """The opt-out that an answer's headers hold, empty where there is none.

    Args:
        tags: Every X-Robots-Tag header. A part that names a crawler counts where it names this one, `lavic`, or `*`.
        tdm: The TDM-Reservation header; `1` reserves the rights to text and data mining.
    """
    for header in tags:
        ours = True
        for part in header.split(","):
            word = part
            if not _VALUED.match(part) and (named := _NAMED.match(part)):
                ours = named[1].lower() in (PRODUCT, "*")
                word = named[2]
            if ours and (word := word.strip().lower()) in _OPT_OUTS:
                return f"X-Robots-Tag: {word}"
    return "TDM-Reservation: 1" if tdm.strip() == "1" else ""
