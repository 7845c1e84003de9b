"""One HTTP request and its response, read within limits of time, speed and size; every failure has a kind."""

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
from lavic.shards.http.content_encoding import CorruptBody, UnsupportedEncoding, codings, decode
from lavic.shards.http.robots import opt_out
from lavic.shards.http.url import BadUrl, parse_url
from lavic.shards.pack.outcomes import Kind

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_RETRYABLE: frozenset[Kind] = frozenset({"throttled", "timeout", "too_slow", "truncated", "dns", "connect", "unasked"})
_COMPLETE = frozenset({200, 203, 206})
"""Statuses of complete responses: OK, changed by a proxy, and a range that is all of the file."""
_TRANSIENT = frozenset({408, 425})
"""Statuses below 500 by which a server asks for the same request again: Request Timeout, Too Early."""
_RANGE = re.compile(r"\s*bytes\s+0-(\d+)/(?:(\d+)|\*)\s*", re.IGNORECASE)
_MAX_VALIDATOR = 200
"""Characters of the longest ETag or Last-Modified that a ledger keeps."""
_MAX_DRAINED = 64 * 1024
"""Error pages of at most this many bytes are read, so that the connection can be reused."""


@dataclass
class Response:
    """The result of fetching one URL. Treated as frozen; `frozen=True` would cost microseconds per photo."""

    kind: Kind
    """`ok` is a complete response with status 200, 203 or 206; whether it is a photo is checked elsewhere."""
    body: bytes = b""
    reason: str = ""
    http: int = 0
    attempts: int = 1
    """Requests sent."""
    retry_after: float = 0.0
    """Seconds that the server asks to wait."""
    target: URL | None = None
    """Location of a redirect to follow."""
    etag: str = ""
    """Validator for a later conditional request."""
    last_modified: str = ""
    """Another one."""
    final: bool = False
    """Whether a retry cannot succeed."""
    reached: bool = True
    """Whether there was a connection to the host."""
    refused: tuple[str, int] | None = None
    """If the host refused: the name of its rate limit, and the version under which the request was sent."""
    codings: tuple[str, ...] = ()
    """Compressions of a body that was not decompressed."""


@dataclass(frozen=True, kw_only=True)
class ResponseLimits:
    """Which responses are accepted, and how much of them."""

    deadline: float
    """Seconds for one request with its redirects; enforced by the session's or the request's timeout."""
    max_bytes: int
    min_speed: int
    """Bytes per second on average, once `speed_after` seconds have passed."""
    speed_after: float
    opt_outs: bool = True
    """Whether to obey opt-outs in the headers."""
    raw: bool = False
    """Whether to accept any 2xx without decompression, and the beginning of a body that is too long."""
    conditions: Mapping[str, str] = field(default_factory=dict)
    """Headers of a conditional request; then status 304 is `ok`, without a body."""


async def send_request(
    session: aiohttp.ClientSession,
    url: URL,
    limits: ResponseLimits,
    timeout: aiohttp.ClientTimeout | None = None,
    headers: Mapping[str, str] | None = None,
    **options: Any,
) -> Response:
    """Send one GET. Never raises for what a server does; a redirect is not followed.

    The timeout replaces the session's, the headers are sent with the session's; `options` are further ones of aiohttp.

    Raises:
        BlockedAddress: The host has an address that is not public.
    """
    if timeout is not None:
        options["timeout"] = timeout
    if limits.conditions:
        headers = {**(headers or {}), **limits.conditions}
    try:
        async with session.get(url, allow_redirects=False, headers=headers, **options) as response:
            return await _read(response, url, limits)
    except aiohttp.ClientHttpProxyError as error:
        return Response("connect", reason=f"the proxy answers {error.status} {error.message}"[:200], reached=False)
    except aiohttp.ClientProxyConnectionError as error:
        return Response("connect", reason=f"the proxy: {_message(error)}", reached=False)
    except aiohttp.ConnectionTimeoutError as error:
        return Response("connect", reason=_message(error), reached=False)
    except (asyncio.TimeoutError, TimeoutError):
        return Response("timeout", reason=f"no complete response within {limits.deadline:g} s")
    except aiohttp.ClientConnectorDNSError as error:
        if "proxy" in options:
            return Response("connect", reason=f"the proxy's name is not known: {error.os_error}", reached=False)
        # A name that does not exist will not exist in a second.
        unknown = getattr(error.os_error, "errno", None) == socket.EAI_NONAME
        return Response("dns", reason=str(error.os_error), final=unknown, reached=False)
    except (aiohttp.ClientSSLError, ssl.SSLError) as error:
        return Response("tls", reason=_message(error), reached=False)
    except aiohttp.ClientPayloadError as error:
        return Response("truncated", reason=f"the response ended early: {_message(error)}")
    except aiohttp.InvalidURL:
        return Response("bad_url", reason="the link is not one that can be requested")
    except aiohttp.ClientResponseError as error:
        return Response("http_error", reason=f"not HTTP: {_message(error)}")
    except aiohttp.ClientConnectorError as error:
        return Response("connect", reason=_message(error), reached=False)
    except (aiohttp.ClientError, OSError) as error:
        return Response("connect", reason=_message(error))


def is_retryable(response: Response) -> bool:
    """Whether a retry may succeed."""
    if response.kind == "http_error":
        transient = not response.http or response.http >= 500 or response.http in _TRANSIENT
        return transient and not response.final
    return not response.final and response.kind in _RETRYABLE


async def _read(response: aiohttp.ClientResponse, url: URL, limits: ResponseLimits) -> Response:
    status, headers = response.status, response.headers
    accepted = status in _COMPLETE or (limits.raw and 200 < status < 300)
    if status == 206 and not limits.raw and not _is_complete(headers.get("Content-Range", "")):
        return Response("truncated", reason=f"only a part was sent: {headers['Content-Range'][:80]}", http=status)
    if status == 304 and limits.conditions:
        return Response("ok", http=status)
    if not accepted:
        await _drain(response)
        if status in _REDIRECTS and (target := headers.get("Location")):
            try:
                return Response("http_error", http=status, target=parse_url(target, url))
            except BadUrl as error:
                return Response("bad_url", reason=f"redirected: {error}", http=status)
        return Response(_kind_of(status), reason=f"HTTP {status}", http=status, retry_after=_retry_after(headers))
    if limits.opt_outs and (reason := opt_out(headers.getall("X-Robots-Tag", ()), headers.get("TDM-Reservation", ""))):
        return Response("opted_out", reason=reason, http=status)
    if (response.content_length or 0) > limits.max_bytes and not limits.raw:
        return _too_big(status, limits)
    chunks: list[bytes] = []
    size, began = 0, time.monotonic()
    try:
        while chunk := await response.content.readany():
            chunks.append(chunk)
            size += len(chunk)
            if size > limits.max_bytes:
                if limits.raw:
                    break
                return _too_big(status, limits)
            seconds = time.monotonic() - began
            if seconds > limits.speed_after and size < limits.min_speed * seconds:
                return _too_slow(size, seconds, limits)
    except (asyncio.TimeoutError, TimeoutError):
        seconds = time.monotonic() - began
        if seconds > limits.speed_after and size < limits.min_speed * seconds:
            return _too_slow(size, seconds, limits)
        raise
    body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
    if "Content-Encoding" in headers or "Transfer-Encoding" in headers:
        names = codings(headers.getall("Content-Encoding", ()), headers.getall("Transfer-Encoding", ()))
        if names and limits.raw:
            return Response("ok", body, http=status, codings=tuple(names))
        if names:
            return _decoded(body, names, status, limits)
    return Response(
        "ok", body, http=status, etag=_validator(headers, "ETag"), last_modified=_validator(headers, "Last-Modified")
    )


def _validator(headers: Mapping[str, str], name: str) -> str:
    """An ETag or Last-Modified; empty if it is missing or cannot be sent back."""
    value = headers.get(name, "").strip()
    return value if len(value) <= _MAX_VALIDATOR and value.isascii() and value.isprintable() else ""


def _is_complete(content_range: str) -> bool:
    """Whether a Content-Range spans the whole file; true where it does not give the length of the file."""
    match = _RANGE.fullmatch(content_range)
    return not content_range or (match is not None and (match[2] is None or int(match[1]) + 1 == int(match[2])))


async def _drain(response: aiohttp.ClientResponse) -> None:
    if (response.content_length or 0) <= _MAX_DRAINED:
        size = 0
        while size <= _MAX_DRAINED and (chunk := await response.content.readany()):
            size += len(chunk)


def _decoded(body: bytes, names: list[str], http: int, limits: ResponseLimits) -> Response:
    """The response with its body decompressed."""
    try:
        decoded = decode(body, names, limits.max_bytes)
    except UnsupportedEncoding as error:
        coding_names = ", ".join(names)[:40]
        return Response(
            "http_error", reason=f"compressed as {coding_names}, which was not requested: {error}", http=http
        )
    except CorruptBody as error:
        return Response("truncated", reason=str(error), http=http)
    if len(decoded) > limits.max_bytes:
        return Response("too_big", reason=f"more than {limits.max_bytes:,} bytes once decompressed", http=http)
    return Response("ok", decoded, http=http)


def _too_big(status: int, limits: ResponseLimits) -> Response:
    return Response("too_big", reason=f"more than {limits.max_bytes:,} bytes", http=status)


def _too_slow(size: int, seconds: float, limits: ResponseLimits) -> Response:
    return Response(
        "too_slow", reason=f"{size:,} bytes in {seconds:.1f} s, less than {limits.min_speed:,} per second", http=200
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
    # By the server's clock, if it sends it.
    until, now = _timestamp(value), _timestamp(headers.get("Date", ""))
    return 0.0 if until is None else max(0.0, until - (time.time() if now is None else now))


def _timestamp(date: str) -> float | None:
    try:
        return email.utils.parsedate_to_datetime(date).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None


def _message(error: BaseException) -> str:
    """The error in one short line: it may contain text from the server, and goes into the ledger."""
    return first_line(error)[:200]
