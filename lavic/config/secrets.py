"""Secrets: how they are removed from what is written, and where settings read them from.

A setting never holds a password or a token itself. It refers to one: `env:NAME` is an environment variable, `@FILE` the
content of a file. The reference is what is recorded, and what a reloaded setting reads the secret from again.
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
from lavic.storage.text_files import TextFileError, read_text

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
"""A secret that is replaced wherever it occurs; a short one such as `mlflow` occurs in too many other words."""
_revealed: set[str] = set()
"""Secrets that `reveal` has read, in each of their spellings (percent-encoded or not)."""


def redact(text: str) -> str:
    """The text without secrets: passwords in URLs, tokens in queries and headers, keys, and the secrets that this
    process knows from its environment or from `reveal`.
    """
    for secret in sorted(_known_secrets(), key=len, reverse=True):
        text = text.replace(secret, MASK)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def holds_secret(value: Any, name: str = "") -> bool:
    """Whether a plain value with this key, or anything nested in it, looks like a secret."""
    if isinstance(value, Mapping):
        return any(holds_secret(nested, str(key)) for key, nested in value.items())
    if isinstance(value, (list, tuple)):
        return any(holds_secret(nested) for nested in value)
    if not isinstance(value, str) or not value or is_reference(value):
        return False
    return _is_secret_name(name) or any(pattern.sub(replacement, value) != value for pattern, replacement in _PATTERNS)


def redact_all(value: Any, name: str = "") -> Any:
    """Plain values, nested, without secrets: the values of keys such as `password`, and secrets within texts."""
    if isinstance(value, Mapping):
        return {key: redact_all(nested, str(key)) for key, nested in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact_all(nested) for nested in value]
    if not isinstance(value, (str, os.PathLike)):
        return value
    text = str(value)
    return MASK if text and _is_secret_name(name) and not is_reference(text) else redact(text)


def redact_args(args: list[str]) -> list[str]:
    """A command line without secrets, including the values of flags such as --api-key."""
    redacted: list[str] = []
    for arg in args:
        previous = redacted[-1] if redacted else ""
        flag = previous.lstrip("-") if previous.startswith("--") and "=" not in previous else ""
        redacted.append(redact_all(arg, flag.replace("-", "_")))
    return redacted


def is_reference(value: str) -> bool:
    """Whether a setting refers to its value by `env:NAME` or `@FILE`."""
    return value.startswith(("env:", "@")) and len(value.split()) == 1


def reveal(value: str, setting: str) -> str:
    """The value of a setting: the variable of `env:NAME`, the content of `@FILE`, or itself.

    `setting` is its name, for messages. Raises ConfigError where there is no such variable or file.
    """
    secret = value
    if value.startswith("env:"):
        secret = os.environ.get(value.removeprefix("env:"), "").strip()
        if not secret:
            raise ConfigError(f"{setting} {value}: the environment variable {value.removeprefix('env:')} is not set")
    elif value.startswith("@"):
        secret = _single_word(Path(value[1:]).expanduser(), setting)
    _revealed.update(_password_of(secret))
    return secret


def reveal_key(value: str, setting: str) -> str:
    """An API key: the variable of `env:NAME` or the content of `@FILE`. `redact` knows it from now on.

    Raises ConfigError as `reveal`, and where a header cannot hold the key.
    """
    key = reveal(value, setting)
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise ConfigError(f"{setting} {value}: holds something that is no key")
    _revealed.update(_spellings(key))
    return key


def _single_word(file: Path, setting: str) -> str:
    try:
        words = read_text(file).split()
        readable_by_others = file.stat().st_mode & 0o077
    except (TextFileError, OSError) as error:
        reason = error.reason if isinstance(error, TextFileError) else error.strerror
        raise ConfigError(f"{setting} @{file}: cannot be read ({reason})") from None
    if len(words) != 1:
        raise ConfigError(f"{setting} @{file}: should contain one word, has {len(words)}")
    if readable_by_others and holds_secret(words[0]):
        log.warning("%s: other users can read the password in it: chmod 600 %s", file, file)
    return words[0]


def _password_of(address: str) -> set[str]:
    try:
        return _spellings(urlsplit(address).password or "")
    except ValueError:
        return set()


def _known_secrets() -> set[str]:
    """Secrets of this process: those that were read, and those of its environment."""
    secrets = set(_revealed)
    for name, value in os.environ.items():
        if _is_secret_name(name) and not Path(value).is_absolute():
            secrets |= _spellings(value)
        elif "://" in value and "@" in value:  # a proxy, a database
            secrets |= _password_of(value)
    user, password = (os.environ.get(f"MLFLOW_TRACKING_{name}") for name in ("USERNAME", "PASSWORD"))
    if user and password:
        secrets.add(base64.b64encode(f"{user}:{password}".encode()).decode())
    return secrets


def _spellings(secret: str) -> set[str]:
    decoded = unquote(secret)
    return {
        spelling
        for spelling in (secret, decoded, quote(decoded, safe=""), quote_plus(decoded))
        if _WORD.fullmatch(spelling)
    }


def _is_secret_name(name: str) -> bool:
    return _NAMED.fullmatch(name) is not None
