"""Outcomes of planned photos: their kinds, the ledger's rows, the summary, and what to do about failures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from lavic.data.ledger import ledger_path
from lavic.errors import DataError
from lavic.storage.atomic import atomic_write

Kind = Literal[
    "ok",
    "gone",
    "forbidden",
    "throttled",
    "timeout",
    "too_slow",
    "too_big",
    "not_image",
    "truncated",
    "bomb",
    "unsupported",
    "opted_out",
    "bad_url",
    "blocked_address",
    "dns",
    "connect",
    "tls",
    "http_error",
    "placeholder",
    "unasked",
]

KINDS: tuple[Kind, ...] = get_args(Kind)

MEANING: dict[Kind, str] = {
    "ok": "stored",
    "gone": "the server has no such photo (404, 410)",
    "forbidden": "the server refuses (401, 403, 451)",
    "throttled": "the server limits requests (429, 503, a long Crawl-delay)",
    "timeout": "no complete response within --fetch.deadline",
    "too_slow": "slower than --fetch.min-speed",
    "too_big": "larger than --fetch.max-bytes",
    "not_image": "the response is not a photo, often a web page",
    "truncated": "the photo is cut short or damaged",
    "bomb": "beyond --photo.max-pixels, max-scans or decode-seconds",
    "unsupported": "an image format or size that is not supported",
    "opted_out": "robots.txt or a response header forbids it",
    "bad_url": "the link, or its redirect, is not an http(s) URL",
    "blocked_address": "a private network, a cloud's metadata service, or a redirect from https to http",
    "dns": "the host's name cannot be resolved",
    "connect": "no connection to the host, or it broke",
    "tls": "the host's certificate or encryption is not valid",
    "http_error": "another HTTP error",
    "placeholder": "a placeholder for a missing photo, or smaller than --photo.min-side",
    "unasked": "never requested: the host was down or paused, or its robots.txt could not be read",
}

_REMEDY: dict[Kind, str] = {
    "gone": "the catalogue's links are out of date",
    "forbidden": "the server refuses this crawler; set --fetch.contact and ask its owner",
    "throttled": "use a lower --fetch.host-rate, then --retry throttled. With a longer --fetch.patience photos wait "
    "for hosts that ask for a long pause",
    "timeout": "the server or the network is slow: use a longer --fetch.deadline or a lower --fetch.host-connections, "
    "then --retry timeout",
    "too_slow": "the server or the network is slow: use a lower --fetch.min-speed or --fetch.host-connections, then "
    "--retry too_slow",
    "too_big": "raise --fetch.max-bytes if photos of that size are wanted, then --retry too_big",
    "not_image": "open one of the URLs in the ledger: it is probably a page with the reason",
    "truncated": "--retry truncated; if that fails too, the photos are damaged on the server",
    "bomb": "the ledger has the limit of each: a longer --photo.decode-seconds needs --retry bomb, others a new --out",
    "unsupported": "the ledger has the reason of each; HEIC needs pip install 'lavic[heif]', AVIF 'pillow>=11.3', then "
    "--retry unsupported; SVG and others are not supported",
    "opted_out": "the photos' owner does not allow crawlers; the ledger has the rule",
    "bad_url": "the ledger says what is wrong with each link; correct the catalogue and use a new --out",
    "blocked_address": "if they are on this machine or in your own network, use --fetch.allow-private with "
    "--retry blocked_address. Clouds' metadata services and redirects from https to http are always refused",
    "dns": "check the network of the machine that runs this, then --retry dns",
    "connect": "check that the server is up and its address is right, then --retry connect",
    "tls": "check this machine's clock and certificates, then --retry tls",
    "http_error": "see the HTTP status of each in the ledger, then --retry http_error",
    "placeholder": "the catalogue's links lead to placeholders; small photos need a new --out with a lower "
    "--photo.min-side",
    "unasked": "run the same command again to request them; the ledger has the reason of each",
}

UNAVAILABLE: frozenset[Kind] = frozenset({"gone", "opted_out", "placeholder"})
"""Photos that no crawl could store: they do not count for the success rate."""

ALWAYS_RETRIED: frozenset[str] = frozenset({"unasked"})
"""Photos that any later run requests, without --retry: they were not requested yet."""

_STILL_BLOCKED = (
    "--retry blocked_address requests again those that were refused before --fetch.allow-private was given. Clouds' "
    "metadata services, link-local addresses and redirects from https to http are always refused; the ledger has the "
    "reason of each"
)

_to_json = json.JSONEncoder(ensure_ascii=False).encode
"""Made once: `json.dumps` with options makes an encoder for every photo."""
_NETWORK: frozenset[str] = frozenset({"dns", "connect", "tls", "timeout"})


@dataclass(kw_only=True)
class Outcome:
    """One row of a shard's ledger; every planned photo has one, in the order of the plan.

    Treated as frozen; `frozen=True` would cost microseconds per photo.
    """

    key: str
    item_id: str
    n: int
    url: str
    kind: Kind
    reason: str = ""
    """In words, for kinds other than ok."""
    http: int = 0
    """The last HTTP status, 0 if there was no response."""
    attempts: int = 0
    """Requests sent."""
    bytes: int = 0
    """Received."""
    sha256: str = ""
    """Of what was received."""
    seconds: float = 0.0
    """From the first request to the checked photo."""
    same_as: str = ""
    """Key of the photo that was fetched for this one too, since both links show one picture."""
    etag: str = ""
    """Of the response with the stored photo; `--refresh` uses it in a conditional request."""
    last_modified: str = ""
    """Of the same response."""
    refresh_failed: str = ""
    """Why the last `--refresh` could not fetch this photo, as kind and reason; the stored one was kept."""


def write_ledger(shard: Path, outcomes: Iterable[Outcome]) -> str:
    """Write a shard's ledger; returns the sha256 of the file."""
    text = "".join(_to_json(vars(row)) + "\n" for row in outcomes)
    atomic_write(ledger_path(shard), text)
    return hashlib.sha256(text.encode()).hexdigest()


def read_ledger(shard: Path) -> list[Outcome]:
    """Read a shard's ledger; empty if it has none yet.

    Raises:
        DataError: A line is not a row of a ledger.
    """
    path = ledger_path(shard)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    return parse_ledger(data, path)


def parse_ledger(data: bytes, path: Path) -> list[Outcome]:
    """The rows in the bytes of a ledger, which is at `path`.

    Raises:
        DataError: A line is not a row of a ledger.
    """
    try:
        rows = [Outcome(**json.loads(line)) for line in data.decode().split("\n") if line]
        for row in rows:
            if not isinstance(row.key, str) or row.kind not in KINDS:
                raise ValueError(f"a row without a key, or with the unknown outcome {row.kind!r}")
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: broken ledger ({error}); remove it and run the same crawl again") from None
    return rows


def success_rate(outcomes: Mapping[str, int]) -> float:
    """The share of photos that were stored, without `UNAVAILABLE` ones; unrequested ones count as not stored."""
    available = sum(count for kind, count in outcomes.items() if kind not in UNAVAILABLE)
    return outcomes.get("ok", 0) / available if available else 1.0


def outcome_table(outcomes: Mapping[str, int]) -> str:
    """The number and share of photos by outcome, most frequent first."""
    total = sum(outcomes.values())
    rows = sorted(outcomes.items(), key=lambda row: (row[0] != "ok", -row[1]))
    lines = [f"  {'outcome':<16}{'photos':>12}{'share':>10}"]
    for kind, count in rows:
        lines.append(f"  {kind:<16}{count:>12,}{count / max(1, total):>10.1%}  {MEANING.get(kind, '')}")  # type: ignore[call-overload]
    return "\n".join(lines)


def advice(outcomes: Mapping[str, int], min_share: float = 0.9, *, allow_private: bool = False) -> str:
    """What to do if less than the share `min_share` of the photos was stored; empty if more was."""
    total, failed = sum(outcomes.values()), {kind: n for kind, n in outcomes.items() if kind != "ok" and n}
    if not failed or (total - sum(failed.values())) / total >= min_share:
        return ""
    worst = max(failed, key=lambda kind: failed[kind])
    if len(_NETWORK & set(failed)) > 1 and (network := sum(failed.get(kind, 0) for kind in _NETWORK)) * 2 > sum(
        failed.values()
    ):
        kinds = " ".join(sorted(_NETWORK & set(failed)))
        return (
            f"{network:,} of {total:,} ended without a response ({kinds}): check this machine's network and that the "
            f"hosts are up, then --retry {kinds}"
        )
    remedy = _STILL_BLOCKED if worst == "blocked_address" and allow_private else _REMEDY[worst]  # type: ignore[index]
    return f"{failed[worst]:,} of {total:,} ended as {worst}: {remedy}"
