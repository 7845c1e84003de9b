"""What becomes of a planned photo: the kinds, the ledger's row, the table at the end and what to do about it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from lavic.data.ledger import ledger_path
from lavic.errors import DataError
from lavic.storage.atomic import write_whole

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
    "throttled": "the server asks for fewer requests (429, 503, a long Crawl-delay)",
    "timeout": "no whole answer within --fetch.deadline",
    "too_slow": "less than --fetch.min-speed",
    "too_big": "more than --fetch.max-bytes",
    "not_image": "the answer is not a photo, often a web page",
    "truncated": "the photo breaks off or is damaged",
    "bomb": "beyond --photo.max-pixels, max-frames, max-scans or decode-seconds",
    "unsupported": "a kind or size of image that is not taken here",
    "opted_out": "robots.txt or a header of the answer forbids it",
    "bad_url": "the link, or where it redirects to, is no http(s) address",
    "blocked_address": "a private network, a cloud's metadata, or a redirect from https to http",
    "dns": "the host's name is not known",
    "connect": "no connection to the host, or it broke off",
    "tls": "the host's certificate or encryption does not hold",
    "http_error": "another HTTP error",
    "placeholder": "stands for a missing photo, or smaller than --photo.min-side",
    "unasked": "never asked for: the host was down, asked for a rest, or its robots.txt could not be read",
}

_REMEDY: dict[Kind, str] = {
    "gone": "the catalogue's links are out of date",
    "forbidden": "the server does not let this crawler in; name a --fetch.contact and ask its owner",
    "throttled": "ask for less: a lower --fetch.host-rate; then --retry throttled. A longer --fetch.patience waits "
    "where a host asks for a long rest",
    "timeout": "the server or the line is slow: a longer --fetch.deadline or a lower --fetch.host-connections; then "
    "--retry timeout",
    "too_slow": "the server or the line is slow: a lower --fetch.min-speed or --fetch.host-connections; then "
    "--retry too_slow",
    "too_big": "raise --fetch.max-bytes if photos of that size are wanted; then --retry too_big",
    "not_image": "open one of the URLs in the ledger: it is likely a page that says why",
    "truncated": "--retry truncated; if they stay, the photos are damaged on the server",
    "bomb": "the ledger says which limit: a longer --photo.decode-seconds needs --retry bomb, others a new --out",
    "unsupported": "the ledger says why; HEIC needs pip install 'lavic[heif]', AVIF pip install 'pillow>=11.3', then "
    "--retry unsupported; SVG and others are not read here",
    "opted_out": "the photos' owner does not want crawlers; the ledger says how that was said",
    "bad_url": "the ledger says what is wrong with each link; correct the catalogue and crawl it into a new --out",
    "blocked_address": "if they are on this machine or in your own network: --fetch.allow-private with "
    "--retry blocked_address. Clouds' metadata and redirects from https to http are always refused",
    "dns": "check the network of the machine that runs this, then --retry dns",
    "connect": "check that the server is up and its address right, then --retry connect",
    "tls": "check this machine's clock and certificates, then --retry tls",
    "http_error": "the ledger has the HTTP status of each; then --retry http_error",
    "placeholder": "the catalogue's links lead to placeholders; small photos need a new --out with a lower "
    "--photo.min-side",
    "unasked": "run the same command again, it asks for them; the ledger says for each what was wrong with its host",
}

NOT_TO_BE_HAD: frozenset[Kind] = frozenset({"gone", "opted_out", "placeholder"})
"""Photos that no crawl could store: they say nothing about how well this one went."""

ASKED_AGAIN: frozenset[str] = frozenset({"unasked"})
"""Photos that any later run asks for, without --retry: no server has been asked for them yet."""

_STILL_BLOCKED = (
    "--retry blocked_address asks again for those that were refused before --fetch.allow-private was given. Clouds' "
    "metadata, link-local addresses and redirects from https to http are refused in spite of it; the ledger has the "
    "reason of each"
)

_NETWORK: frozenset[str] = frozenset({"dns", "connect", "tls", "timeout"})


@dataclass(kw_only=True)
class Outcome:
    """One row of a shard's ledger; every planned photo has one, in the order of the plan.

    Not frozen, which costs microseconds for every photo; nobody changes one.
    """

    key: str
    item_id: str
    n: int
    url: str
    kind: Kind
    reason: str = ""
    """In words, for kinds other than ok."""
    http: int = 0
    """The last HTTP status, 0 where there was no answer."""
    attempts: int = 0
    """Requests made; 0 for a photo kept from an earlier run of the shard."""
    bytes: int = 0
    """Received."""
    sha256: str = ""
    """Of what was received."""
    seconds: float = 0.0
    """From the first request to the checked photo."""
    same_as: str = ""
    """Key of the photo that was fetched for this one too, since both links show one picture."""
    etag: str = ""
    """Of the answer with the stored photo; `--refresh` asks whether the photo has changed since."""
    last_modified: str = ""
    """Of the same answer."""
    refresh_failed: str = ""
    """Why the last `--refresh` could not get this photo, as kind and reason; the stored one was kept."""


def write_ledger(shard: Path, outcomes: Iterable[Outcome]) -> str:
    """Write a shard's ledger whole; returns the sha256 of the file."""
    text = "".join(json.dumps(vars(row), ensure_ascii=False) + "\n" for row in outcomes)
    write_whole(ledger_path(shard), text)
    return hashlib.sha256(text.encode()).hexdigest()


def read_ledger(shard: Path) -> list[Outcome]:
    """Read a shard's ledger; empty where it has none yet.

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


def success(outcomes: Mapping[str, int]) -> float:
    """The share of photos stored, of those that could be had; those that were not asked for count as not stored."""
    wanted = sum(count for kind, count in outcomes.items() if kind not in NOT_TO_BE_HAD)
    return outcomes.get("ok", 0) / wanted if wanted else 1.0


def table(outcomes: Mapping[str, int]) -> str:
    """The number and share of photos of every kind that occurred, most frequent first."""
    total = sum(outcomes.values())
    rows = sorted(outcomes.items(), key=lambda row: (row[0] != "ok", -row[1]))
    lines = [f"  {'outcome':<16}{'photos':>12}{'share':>10}"]
    for kind, count in rows:
        lines.append(f"  {kind:<16}{count:>12,}{count / max(1, total):>10.1%}  {MEANING.get(kind, '')}")  # type: ignore[call-overload]
    return "\n".join(lines)


def advice(outcomes: Mapping[str, int], enough: float = 0.9, *, allow_private: bool = False) -> str:
    """What to change when fewer than a share of the photos were stored; empty when all is well.

    Args:
        outcomes: Number of photos by kind.
        enough: Share of stored photos from which on nothing is said.
        allow_private: `--fetch.allow-private` was given.
    """
    total, failed = sum(outcomes.values()), {kind: n for kind, n in outcomes.items() if kind != "ok" and n}
    if not failed or (total - sum(failed.values())) / total >= enough:
        return ""
    worst = max(failed, key=lambda kind: failed[kind])
    if len(_NETWORK & set(failed)) > 1 and (network := sum(failed.get(kind, 0) for kind in _NETWORK)) * 2 > sum(
        failed.values()
    ):
        kinds = " ".join(sorted(_NETWORK & set(failed)))
        return (
            f"{network:,} of {total:,} ended without an answer ({kinds}): check this machine's network and whether the "
            f"hosts are up, then --retry {kinds}"
        )
    remedy = _STILL_BLOCKED if worst == "blocked_address" and allow_private else _REMEDY[worst]  # type: ignore[index]
    return f"{failed[worst]:,} of {total:,} ended as {worst}: {remedy}"
