"""One request and its answer, under its name: read within limits of time, speed and size, or not at all."""

from __future__ import annotations

import asyncio
import email.utils
import re
import socket
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from yarl import URL

from lavic.errors import first_line
from lavic.shards.http.content_encoding import BrokenBody, Undecodable, codings, decode
from lavic.shards.http.robots import opt_out
from lavic.shards.http.url import BadUrl, read_link
from lavic.shards.pack.outcomes import Kind

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_PASSING: frozenset[Kind] = frozenset({"throttled", "timeout", "too_slow", "truncated", "dns", "connect", "unasked"})
_WHOLE = frozenset({200, 203, 206})
"""Statuses of answers that hold what was asked for: OK, changed by a proxy, and a range that is the whole."""
_RANGE = re.compile(r"\s*bytes\s+0-(\d+)/(?:(\d+)|\*)\s*", re.IGNORECASE)
_MARK_LENGTH = 200
"""Longest ETag or Last-Modified that a ledger keeps."""
_DRAINED = 64 * 1024
"""An error's page is read to so many bytes, so that its connection can be used again."""


@dataclass
class Answer:
    """What came of fetching one URL. Not frozen, which costs microseconds for every photo; nobody changes one."""

    kind: Kind
    """`ok` means a whole answer with status 200, 203 or 206; whether it is a photo is not looked at here."""
    body: bytes = b""
    reason: str = ""
    http: int = 0
    attempts: int = 1
    """Requests made; 0 where the host was not asked."""
    retry_after: float = 0.0
    """Seconds the server asks to wait."""
    target: URL | None = None
    """Where a redirect leads; it is to be followed."""
    etag: str = ""
    """The answer's ETag, by which a later request can ask whether it has changed."""
    last_modified: str = ""
    """Its Last-Modified, for the same."""
    final: bool = False
    """The host is not asked for now: no use in another try."""
    reached: bool = True
    """There was a connection to the host."""
    refused: tuple[str, int] | None = None
    """Where the host refused: its budget, and the version of it under which the request was sent."""
    codings: tuple[str, ...] = ()
    """Compressions of a body that is as it was sent."""


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What is taken of an answer."""

    deadline: float
    """Seconds for the whole; enforced by the session's or the request's timeout."""
    max_bytes: int
    min_speed: int
    """Bytes a second on average, once `speed_after` seconds have passed."""
    speed_after: float
    opt_outs: bool = True
    """Heed opt-outs in the headers."""
    raw: bool = False
    """Take the body of any 2xx as it was sent, and of a longer one the beginning."""
    conditions: Mapping[str, str] = field(default_factory=dict)
    """Headers of a conditional request; with them status 304 is `ok`, without a body."""


async def exchange(
    session: aiohttp.ClientSession,
    url: URL,
    bounds: Bounds,
    timeout: aiohttp.ClientTimeout | None = None,
    headers: Mapping[str, str] | None = None,
    **options: Any,
) -> Answer:
    """Send one GET. Never raises for what a server does; a redirect is not followed.

    Args:
        session: To send it with.
        url: What is requested.
        bounds: What is taken of the answer.
        timeout: In place of the session's.
        headers: Sent besides the session's.
        options: Of the request, such as `proxy`.

    Raises:
        BlockedAddress: The host's name leads to an address that is not public.
    """
    if timeout is not None:
        options["timeout"] = timeout
    if bounds.conditions:
        headers = {**(headers or {}), **bounds.conditions}
    try:
        async with session.get(url, allow_redirects=False, headers=headers, **options) as response:
            return await _read(response, url, bounds)
    except aiohttp.ClientHttpProxyError as error:
        return Answer("connect", reason=f"the proxy answers {error.status} {error.message}"[:200], reached=False)
    except aiohttp.ClientProxyConnectionError as error:
        return Answer("connect", reason=f"the proxy: {_said(error)}", reached=False)
    except aiohttp.ConnectionTimeoutError as error:
        return Answer("connect", reason=_said(error), reached=False)
    except (asyncio.TimeoutError, TimeoutError):
        return Answer("timeout", reason=f"no whole answer within {bounds.deadline:g} s")
    except aiohttp.ClientConnectorDNSError as error:
        if "proxy" in options:
            return Answer("connect", reason=f"the proxy's name is not known: {error.os_error}", reached=False)
        # A name that does not exist will not exist in a second.
        unknown = getattr(error.os_error, "errno", None) == socket.EAI_NONAME
        return Answer("dns", reason=str(error.os_error), final=unknown, reached=False)
    except (aiohttp.ClientSSLError, ssl.SSLError) as error:
        return Answer("tls", reason=_said(error), reached=False)
    except aiohttp.ClientPayloadError as error:
        return Answer("truncated", reason=f"the answer breaks off: {_said(error)}")
    except aiohttp.InvalidURL:
        return Answer("bad_url", reason="the link is not one that can be requested")
    except aiohttp.ClientResponseError as error:
        return Answer("http_error", reason=f"not HTTP: {_said(error)}")
    except aiohttp.ClientConnectorError as error:
        return Answer("connect", reason=_said(error), reached=False)
    except (aiohttp.ClientError, OSError) as error:
        return Answer("connect", reason=_said(error))


def may_pass(answer: Answer) -> bool:
    """Whether another try may end otherwise."""
    if answer.kind == "http_error":
        return not answer.final and (not answer.http or answer.http >= 500)
    return not answer.final and answer.kind in _PASSING


async def _read(response: aiohttp.ClientResponse, url: URL, bounds: Bounds) -> Answer:
    status, headers = response.status, response.headers
    taken = status in _WHOLE or (bounds.raw and 200 < status < 300)
    if status == 206 and not bounds.raw and not _is_complete(headers.get("Content-Range", "")):
        return Answer("truncated", reason=f"only a part was sent: {headers['Content-Range'][:80]}", http=status)
    if status == 304 and bounds.conditions:
        return Answer("ok", http=status)
    if not taken:
        await _drain(response)
        if status in _REDIRECTS and (target := headers.get("Location")):
            try:
                return Answer("http_error", http=status, target=read_link(target, url))
            except BadUrl as error:
                return Answer("bad_url", reason=f"redirected: {error}", http=status)
        return Answer(_kind_of(status), reason=f"HTTP {status}", http=status, retry_after=_retry_after(headers))
    if bounds.opt_outs and (out := opt_out(headers.getall("X-Robots-Tag", ()), headers.get("TDM-Reservation", ""))):
        return Answer("opted_out", reason=out, http=status)
    if (response.content_length or 0) > bounds.max_bytes and not bounds.raw:
        return _too_big(status, bounds)
    chunks: list[bytes] = []
    size, began = 0, time.monotonic()
    try:
        while chunk := await response.content.readany():
            chunks.append(chunk)
            size += len(chunk)
            if size > bounds.max_bytes:
                if bounds.raw:
                    break
                return _too_big(status, bounds)
            seconds = time.monotonic() - began
            if seconds > bounds.speed_after and size < bounds.min_speed * seconds:
                return _too_slow(size, seconds, bounds)
    except (asyncio.TimeoutError, TimeoutError):
        seconds = time.monotonic() - began
        if seconds > bounds.speed_after and size < bounds.min_speed * seconds:
            return _too_slow(size, seconds, bounds)
        raise
    body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
    if "Content-Encoding" in headers or "Transfer-Encoding" in headers:
        names = codings(headers.getall("Content-Encoding", ()), headers.getall("Transfer-Encoding", ()))
        if names and bounds.raw:
            return Answer("ok", body, http=status, codings=tuple(names))
        if names:
            return _decoded(body, names, status, bounds)
    return Answer("ok", body, http=status, etag=_mark(headers, "ETag"), last_modified=_mark(headers, "Last-Modified"))


def _mark(headers: Mapping[str, str], name: str) -> str:
    """A header that a conditional request sends back; empty where it is missing or cannot be sent."""
    value = headers.get(name, "").strip()
    return value if len(value) <= _MARK_LENGTH and value.isascii() and value.isprintable() else ""


def _is_complete(content_range: str) -> bool:
    """Whether a Content-Range spans the whole, as far as it says."""
    match = _RANGE.fullmatch(content_range)
    return not content_range or (match is not None and (match[2] is None or int(match[1]) + 1 == int(match[2])))


async def _drain(response: aiohttp.ClientResponse) -> None:
    if (response.content_length or 0) <= _DRAINED:
        size = 0
        while size <= _DRAINED and (chunk := await response.content.readany()):
            size += len(chunk)


def _decoded(body: bytes, names: list[str], http: int, bounds: Bounds) -> Answer:
    """The answer with a body that was compressed although that was not asked for."""
    try:
        whole = decode(body, names, bounds.max_bytes)
    except Undecodable as error:
        named = ", ".join(names)[:40]
        return Answer("http_error", reason=f"compressed as {named}, which was not asked for: {error}", http=http)
    except BrokenBody as error:
        return Answer("truncated", reason=str(error), http=http)
    if len(whole) > bounds.max_bytes:
        return Answer("too_big", reason=f"more than {bounds.max_bytes:,} bytes once decompressed", http=http)
    return Answer("ok", whole, http=http)


def _too_big(status: int, bounds: Bounds) -> Answer:
    return Answer("too_big", reason=f"more than {bounds.max_bytes:,} bytes", http=status)


def _too_slow(size: int, seconds: float, bounds: Bounds) -> Answer:
    return Answer(
        "too_slow", reason=f"{size:,} bytes in {seconds:.1f} s, less than {bounds.min_speed:,} a second", http=200
    )


def _kind_of(status: int) -> Kind:
    if status in (404, 410):
        return "gone"
    if status in (401, 403, 451):
        return "forbidden"
    return "throttled" if status in (429, 503) else "http_error"


def _retry_after(headers: Mapping[str, str]) -> float:
    value = headers.get("Retry-After", "").strip()
    if value.isascii() and value.isdigit():
        return float(value[:12])
    try:
        until = email.utils.parsedate_to_datetime(value).timestamp()
    except (ValueError, TypeError, OverflowError):
        return 0.0
    try:
        # By the server's own clock, where it tells it.
        now = email.utils.parsedate_to_datetime(headers.get("Date", "")).timestamp()
    except (ValueError, TypeError, OverflowError):
        now = time.time()
    return max(0.0, until - now)


def _said(error: BaseException) -> str:
    """Of a server's making, perhaps: as much of it as a ledger's row bears."""
    return first_line(error)[:200]
