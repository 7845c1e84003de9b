"""Cleans the text of posts for a model: fixes mojibake and HTML entities, removes links and names of users."""

from __future__ import annotations

import html
import re
from collections.abc import Set as AbstractSet
from functools import lru_cache

import ftfy

_CONFIG = ftfy.TextFixerConfig(unescape_html=False, uncurl_quotes=False, fix_latin_ligatures=False, normalization="NFC")
_MARKDOWN = re.compile(
    r"!?\[([^\[\]\n]*)\]\(\s*<?(?:https?:|www\.|/)[^\s)>]*>?(?:\s+\"[^\"\n]*\")?\s*\)", re.IGNORECASE
)
"""A markdown link: its text is kept, unless that is a link too."""
_LINK = re.compile(
    r"<?(?:https?:\\?/\\?/|www\.)[^\s<>\]]*>?|(?<![a-z0-9_])(?:smile\.|m\.)?(?:amazon\.(?:com?\.)?[a-z]{2,3}|amzn\.[a-z]{2,4}|a\.co|geni\.us)/[^\s<>\])]*",
    re.IGNORECASE,
)
_USER = re.compile(
    r"(?:(?<![\w/])(?:/user|/?\bu)|(?<=reddit\.com/)u(?:ser)?)/(?:\\?[A-Za-z0-9_-]){2,24}"
    r"|(?<!\S)@(?:\\?[A-Za-z0-9_-]){3,24}(?!\w)",
    re.IGNORECASE,
)
"""Reddit's editor escapes the `_` of a name."""
_NAME = re.compile(r"(?:\\?[\w-]){4,}")
_LONG_NAME = re.compile(r"[A-Za-z0-9_-]{4,}")
_QUOTE = re.compile(r"^[ \t]*(?:>|&gt;)(?!!)[^\n]*$", re.MULTILINE)
"""A line that quotes; `>!` begins a spoiler instead."""
_ESCAPED = re.compile(r"\\([_*~#>^()\[\]|.!+-])")
_SPACES = re.compile(r"[ \t\f\v]+")
_LINES = re.compile(r" ?\n(?: ?\n)+ ?")
_TAG = re.compile(r"</?(?:submission|comment)>", re.IGNORECASE)

USER = "[user]"
"""Stands for the name of a user."""


@lru_cache(maxsize=1 << 12)
def fix_text(text: str) -> str:
    """A text without mojibake, HTML entities, control characters and broken surrogates."""
    # Entities first, since they may encode mojibake; twice, since some dumps are escaped twice.
    for _ in range(2):
        if "&" not in text:
            break
        text = html.unescape(text)
    return ftfy.fix_text(text, _CONFIG)


def target_text(text: str, users: AbstractSet[str] = frozenset()) -> str:
    """The text of a comment that recommends, with its links; names of `users`, the participants, are replaced."""
    return _TAG.sub("", _without_users(fix_text(text), users)).strip()


def context_text(text: str, users: AbstractSet[str] = frozenset()) -> str:
    """The text of a turn before it, without links; arguments as for `target_text`."""
    text = _MARKDOWN.sub(lambda match: "" if _LINK.search(match[1]) else match[1], fix_text(text))
    text = _ESCAPED.sub(r"\1", _without_users(_LINK.sub("", text), users))
    text = _LINES.sub("\n\n", _SPACES.sub(" ", _TAG.sub("", text)))
    return text.strip()


def without_quotes(text: str) -> str:
    """A text without the lines that quote another post."""
    return _QUOTE.sub("", text)


def _without_users(text: str, users: AbstractSet[str]) -> str:
    def hidden(match: re.Match[str]) -> str:
        name = match[0].replace("\\", "")
        # A name of letters alone may be an ordinary word.
        return USER if name in users and _LONG_NAME.fullmatch(name) and not name.isalpha() else match[0]

    return _NAME.sub(hidden, _USER.sub(USER, text))
