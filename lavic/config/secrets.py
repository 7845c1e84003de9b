"""Secrets: how they are taken out of what is written, and where settings read them from.

A setting never holds a password or a token itself. It names where one is: `env:NAME`, a variable of the environment, or
`@FILE`, a file's first line. That name is what is recorded, and what a recorded setting is read from again.
"""

from __future__ import annotations

import base64
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus, unquote, urlsplit

from lavic.errors import ConfigError

MASK = "***"
"""Replaces a secret."""

log = logging.getLogger(__name__)

_NAMES = (
    r"(?:[\w.\-]*[_.\-])?(?:password|passwd|passphrase|secret|secret[_-]?key|secret[_-]?access[_-]?key|access[_-]?key"
    r"|access[_-]?key[_-]?id|api[_-]?key|apikey|private[_-]?key|account[_-]?key|auth[_-]?token|token|credentials?"
    r"|authorization)"
)
_NAMED = re.compile(_NAMES, re.I)
"""Names of variables and keys whose value is a secret: AWS_SECRET_ACCESS_KEY, hf_token; not `tokens`."""
_QUERY = (
    rf"(?:{_NAMES}|sig|signature|key|auth|pwd|awsaccesskeyid|x-(?:amz|goog)-(?:signature|credential|security-token))"
)
_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = (
    # scheme://user:password@host, also percent-encoded; a password may hold an @, and a / where it is no port
    (re.compile(r"(?i)\b([a-z][a-z0-9+.\-]*(?:://|%3a%2f%2f))[^\s/?#@:'\"<>]*:[^\s/?#'\"<>]*@"), rf"\1{MASK}@"),
    (
        re.compile(r"(?i)\b([a-z][a-z0-9+.\-]*://)(?!\[)[^\s/?#@:'\"<>]*:(?!\d+(?:[/?#\s'\"]|$))[^\s'\"<>]*@"),
        rf"\1{MASK}@",
    ),
    (
        re.compile(r"(?i)\b([a-z][a-z0-9+.\-]*%3a%2f%2f)(?:(?!%2f)[^\s/?#'\"<>])*?(?:%3a|:)[^\s/?#'\"<>]*?%40"),
        rf"\1{MASK}%40",
    ),
    # https://token@host: of other schemes that is a user's name
    (re.compile(r"(?i)\b(https?://)(?!\*\*\*@)[^\s/?#@:'\"<>]+@"), rf"\1{MASK}@"),
    (re.compile(rf"(?i)([?&;]{_QUERY}=)[^\s&;#'\"<>]+"), rf"\1{MASK}"),
    (re.compile(rf"(?i)((?:%3f|%26){_QUERY}%3d)(?:(?!%26|%23)[^\s&'\"<>])+"), rf"\1{MASK}"),
    (re.compile(r"(?i)(authorization['\"]?\s*[:=]\s*['\"]?)(?:(?:basic|bearer|token)\s+)?[^\s'\",}]+"), rf"\1{MASK}"),
    (re.compile(r"\b([Bb]earer|[Bb]asic)\s+(?=\S*[0-9=])(?=\S*[A-Za-z])[A-Za-z0-9+/_.~\-]{12,}=*"), rf"\1 {MASK}"),
    (re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"), MASK),
    (re.compile(r"\b(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|dapi[0-9a-f]{32})\b"), MASK),
    # NAME=value, as in a shell or in --export
    (
        re.compile(r"(?<![?&;\w.\-])((?-i:[A-Z][A-Z0-9_]*(?:PASSWORD|TOKEN|SECRET|KEY(?:_ID)?))=)[^\s,'\"]+"),
        rf"\1{MASK}",
    ),
    (re.compile(r"(?i)\b((?:aws_)?secret_access_key['\"]?\s*[:=]\s*['\"]?)[^\s'\",}]+"), rf"\1{MASK}"),
)
_WORD = re.compile(r"(?=.{6}).*[^a-z].*|.{12,}", re.S)
"""A secret that is looked for wherever it stands: one such as `mlflow` is in too many other words."""
_read: set[str] = set()
"""Secrets that `reveal` has read, in each form they may be written in."""


def redact(text: str) -> str:
    """The text without secrets: passwords in addresses, tokens in queries and headers, keys, and what this process
    knows to be one, from its environment or from `reveal`.
    """
    for secret in sorted(_known(), key=len, reverse=True):
        text = text.replace(secret, MASK)
    for pattern, shown in _PATTERNS:
        text = pattern.sub(shown, text)
    return text


def holds_secret(value: Any, name: str = "") -> bool:
    """Whether a value, or anything in it, is written like a secret, whatever this process knows.

    Args:
        value: Plain values, nested.
        name: The key that it stands under.
    """
    if isinstance(value, Mapping):
        return any(holds_secret(below, str(key)) for key, below in value.items())
    if isinstance(value, (list, tuple)):
        return any(holds_secret(below) for below in value)
    if not isinstance(value, str) or not value or is_reference(value):
        return False
    return _is_secret_name(name) or any(pattern.sub(shown, value) != value for pattern, shown in _PATTERNS)


def redact_all(value: Any, name: str = "") -> Any:
    """Plain values, nested, without secrets: those of keys such as `password`, and those within texts."""
    if isinstance(value, Mapping):
        return {key: redact_all(below, str(key)) for key, below in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact_all(below) for below in value]
    if not isinstance(value, (str, os.PathLike)):
        return value
    text = str(value)
    return MASK if text and _is_secret_name(name) and not is_reference(text) else redact(text)


def redact_words(words: list[str]) -> list[str]:
    """A command line without secrets, also those that follow a flag such as --api-key."""
    shown: list[str] = []
    for word in words:
        flag = shown[-1].lstrip("-") if shown and shown[-1].startswith("--") and "=" not in shown[-1] else ""
        shown.append(redact_all(word, flag.replace("-", "_")))
    return shown


def is_reference(value: str) -> bool:
    """Whether a setting names where its value is."""
    return value.startswith(("env:", "@")) and len(value.split()) == 1


def reveal(value: str, what: str) -> str:
    """What a setting stands for: the variable of `env:NAME`, the first line of `@FILE`, or itself.

    Args:
        value: As it is recorded.
        what: The setting's name, for messages.

    Raises:
        ConfigError: There is no such variable or file.
    """
    shown = value
    if value.startswith("env:"):
        shown = os.environ.get(value.removeprefix("env:"), "").strip()
        if not shown:
            raise ConfigError(f"{what} {value}: the variable {value.removeprefix('env:')} is not set")
    elif value.startswith("@"):
        shown = _first_line(Path(value[1:]).expanduser(), what)
    _read.update(_password_of(shown))
    return shown


def _first_line(file: Path, what: str) -> str:
    try:
        lines = file.read_text("utf-8-sig").split()
        open_to_others = file.stat().st_mode & 0o077
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not text"
        raise ConfigError(f"{what} @{file}: cannot be read ({why})") from None
    if len(lines) != 1:
        raise ConfigError(f"{what} @{file}: should hold one word, holds {len(lines)}")
    if open_to_others and holds_secret(lines[0]):
        log.warning("%s: others can read the password in it: chmod 600 %s", file, file)
    return lines[0]


def _password_of(address: str) -> set[str]:
    try:
        return _forms(urlsplit(address).password or "")
    except ValueError:
        return set()


def _known() -> set[str]:
    """Secrets of this process: those read, and those of its environment."""
    found = set(_read)
    for name, value in os.environ.items():
        if _is_secret_name(name) and not Path(value).is_absolute():
            found |= _forms(value)
        elif "://" in value and "@" in value:  # a proxy, a database
            found |= _password_of(value)
    user, password = (os.environ.get(f"MLFLOW_TRACKING_{name}") for name in ("USERNAME", "PASSWORD"))
    if user and password:
        found.add(base64.b64encode(f"{user}:{password}".encode()).decode())
    return found


def _forms(secret: str) -> set[str]:
    plain = unquote(secret)
    return {form for form in (secret, plain, quote(plain, safe=""), quote_plus(plain)) if _WORD.fullmatch(form)}


def _is_secret_name(name: str) -> bool:
    return _NAMED.fullmatch(name) is not None
