"""Amazon links in a text, in the forms that people post: markdown, redirects, app links, old and truncated
ones."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import unquote

_LONGEST = 2048
"""Maximum number of characters of a link that are examined."""
_ROUNDS = 3
"""Times that a link may be percent-encoded: a redirect within a redirect."""

# Direction marks, zero-width characters and soft hyphens, which apps put around an id that they copy.
_INVISIBLE = dict.fromkeys([0xAD, *range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x206A), 0xFEFF])
_ESCAPED = re.compile(r"\\([!-/:-@\[-`{-~])")
"""A character that markdown escapes; Reddit's editor escapes `_` within links too."""
_EDGE = re.compile(r'[<>"|]|\]\(|\)\[|\)\s*,')
"""What ends a link in markdown and HTML, besides spaces."""

_SUFFIX = r"(?:com?\.[a-z]{2}|com|[a-z]{2})"
_HOST = re.compile(
    rf"(?<![a-z0-9_@-])(?:(?P<store>amazon\.{_SUFFIX})|(?P<app>amzn\.(?:com|asia))|(?P<short>amzn\.(?:to|eu|in)|a\.co))"
    r"\.?(?::\d+)?(?![\w-]|\.[a-z0-9])",
    re.IGNORECASE,
)
NAMED = re.compile(r"amazon|amzn|\ba\.co\b", re.IGNORECASE)
"""Occurs in every link, however the rest of the link is encoded."""
_SHORT_NAMED = re.compile(r"amzn|\ba\.co\b", re.IGNORECASE)
_SPACE = re.compile(r"\s")
_TARGET = re.compile(r"[/?#%&]")
"""What follows a host in every link, as it is, percent-encoded or as an entity of HTML."""
_SCHEME = re.compile(r"https?:/", re.IGNORECASE)
_SHORT_PATH = re.compile(r"/(?:d/)?[A-Za-z0-9_-]{5,}")

# The lookahead at the end rejects longer words. Every Amazon id has a digit, unlike words of ten letters. Books have
# their ISBN-10.
_ID = r"(?P<id>(?:B(?=[A-Z]*\d)[0-9A-Z]{9}|\d{9}[\dX]))(?![0-9A-Z])"
_FORMS = (
    ("dp", rf"/dp/(?:product/|ref=[^/?]*/)?{_ID}"),
    ("gp/product", rf"/gp/product/(?:[a-z-]+/)?{_ID}"),
    ("gp/aw", rf"/gp/aw/[a-z]+/{_ID}"),
    ("o/ASIN", rf"/o/(?:asin/|tg/detail/-/){_ID}"),
    ("exec/obidos", rf"/exec/obidos/(?:[^?#]*/)?{_ID}"),
    ("offer-listing", rf"/offer-listing/{_ID}"),
    ("reviews", rf"/(?:product-|customer-)?reviews?/(?:product/)?{_ID}"),
    ("product", rf"/product/{_ID}"),
    ("gp", rf"/gp/(?:[a-z-]+/){{1,3}}{_ID}"),
    ("d", rf"/d/(?:[^/?#]+/)*{_ID}"),
    ("ASIN", rf"/asin/{_ID}"),
    ("bare", rf"^/{_ID}|/(?P<segment>B0[0-9A-Z]{{8}})(?=[/?#]|$)"),
    ("query", rf"[?&#](?:creative|asins?%5b%5d)?asin={_ID}"),
)
_PATTERNS = tuple((form, re.compile(pattern, re.IGNORECASE)) for form, pattern in _FORMS)

FORMS = tuple(form for form, _ in _FORMS)
"""The forms of links, most reliable first."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """A link to an item."""

    asin: str
    """The item's id, in upper case."""
    form: str
    """One of `FORMS`."""
    host: str
    """Domain of the shop, as `amazon.co.uk`."""


def asins(text: str) -> list[str]:
    """Ids of the items that a text (markdown, HTML or plain) links to, in order, without repeats."""
    return list(dict.fromkeys(link.asin for link in find_links(text)))


def find_links(text: str) -> list[Link]:
    """Links to items on Amazon in a text, in order; an item that is linked twice is returned twice."""
    return [link for part in _parts(text) for link in _links(part)]


def short_links(text: str) -> list[str]:
    """Short links in a text, as `https://amzn.to/3HR4q7E`, in order, without repeats; only a request shows the item."""
    urls: dict[str, None] = {}
    for part in _parts(text) if _SHORT_NAMED.search(text) else ():
        for host, target in _targets(part):
            path = _SHORT_PATH.match(target)
            if path and (host["short"] or (host["app"] and path[0].startswith("/d/") and not _link(target, ""))):
                name = (host["short"] or host["app"]).lower()
                urls[f"https://{name}{path[0]}"] = None
    return list(urls)


def _parts(text: str) -> list[str]:
    """Decoded pieces of a text that may hold links to Amazon."""
    parts: list[str] = []
    end = 0
    for name in NAMED.finditer(text):
        if name.start() < end:
            continue
        start = name.start()
        while start > end and not text[start - 1].isspace():
            start -= 1
        space = _SPACE.search(text, name.end())
        end = space.start() if space else len(text)
        if _TARGET.search(text, name.end(), end):
            parts += map(_decoded, _EDGE.split(_ESCAPED.sub(r"\1", html.unescape(text[start:end]))))
    return parts


def _decoded(part: str) -> str:
    """A piece with its percent-encoding decoded, at most `_ROUNDS` times."""
    for _ in range(_ROUNDS):
        if "%" not in part or (decoded := unquote(part)) == part:
            break
        part = decoded
    return part.translate(_INVISIBLE)


def _links(part: str) -> list[Link]:
    links = []
    for host, target in _targets(part):
        name = host["store"] or host["app"]
        if name and (link := _link(target, name.lower())):
            links.append(link)
    return links


def _targets(part: str) -> Iterator[tuple[re.Match[str], str]]:
    """Each Amazon host in a piece, with the text between it and the next link."""
    hosts = list(_HOST.finditer(part))
    ends = [host.start() for host in hosts[1:]] + [len(part)]
    for host, end in zip(hosts, ends, strict=False):
        target = part[host.end() : min(end, host.end() + _LONGEST)]
        scheme = _SCHEME.search(target)
        yield host, target[: scheme.start()] if scheme else target


def _link(target: str, host: str) -> Link | None:
    """The item of a link, from what follows its host."""
    for form, pattern in _PATTERNS:
        if match := pattern.search(target):
            id = match["id"] or match["segment"]
            return Link(asin=id.upper(), form=form, host=host)
    return None
