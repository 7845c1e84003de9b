"""Checks before the routes: size and time of a body, the token, the host name; and headers of every answer."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lavic.recommend.serve_settings import ServeSettings
from lavic.recommend.serving.errors import ApiError
from lavic.recommend.serving.metrics import Metrics

OPEN = ("/healthz", "/readyz")
"""Paths of probes, which need no token."""
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
POLICY = (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'; base-uri 'none'")
"""Header of answers that are not pages; a page brings its own."""

MAX_REQUESTS = 1024
"""Maximum number of requests at a time, including those whose body is arriving; further ones are answered with 503."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""Host names of a server on loopback."""


class Guard:
    """An ASGI middleware. Answers what it refuses itself, in the form of all errors.

    Args:
        app: The app behind it.
        settings: Of the server.
        token: What clients must show. Without one, requests must name a host of `LOOPBACK`, the address that the server
            listens on, or a host of the settings, so that a web page cannot reach a local server under a name of its
            own.
        metrics: Of the server.
        max_requests: See `MAX_REQUESTS`.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: ServeSettings,
        token: str | None,
        metrics: Metrics,
        *,
        max_requests: int = MAX_REQUESTS,
    ) -> None:
        self.app, self.settings, self.token, self.metrics = app, settings, token, metrics
        self._max_requests = max_requests
        names = (settings.host.strip("[]"), *settings.hosts)
        self._hosts = None if token else {*LOOPBACK, *(name.lower().rstrip(".") for name in names)}
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}  # the server sends no body of its answer
        status = 0
        self._running += 1
        start = time.perf_counter()

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = _with_headers(message.get("headers", []))
            await send(message)

        try:
            self._check_head(scope)
            body = await self._read(scope, receive)
            start = time.perf_counter()
        except ApiError as error:
            # The rest of the body is not read, so the connection cannot be used again.
            error.headers.setdefault("Connection", "close")
            await error.response(scope, receive, counted)
        except _ClientLeft:
            return
        else:
            await self.app(scope, _Replay(body, receive), counted)
        finally:
            self._running -= 1
            route = getattr(scope.get("route"), "path", None) or "other"
            self.metrics.requests.labels(route, status or 499).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - start)

    def _check_head(self, scope: Scope) -> None:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        if self._running > self._max_requests and scope["path"] not in OPEN:
            raise ApiError(503, "too many requests at a time; try again later", headers={"Retry-After": "1"})
        hosts = [value for name, value in scope["headers"] if name == b"host"] or [b""]
        if self._hosts is not None and not self._hosts.issuperset(map(_host, hosts)):
            raise ApiError(403, "this server is not asked under that name; see --hosts")
        if self.token and scope["path"] not in OPEN and not _shows(headers.get(b"authorization", b""), self.token):
            raise ApiError(
                401,
                "a token is needed: send it as Authorization: Bearer TOKEN",
                headers={"WWW-Authenticate": 'Basic realm="lavic", charset="UTF-8"'},
            )
        if scope["method"] == "POST":
            kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
            if kind != b"application/json":
                # A form of another web page can be sent with any type but this.
                raise ApiError(415, "send the body with Content-Type: application/json")
            if headers.get(b"content-encoding", b"identity").strip().lower() != b"identity":
                raise ApiError(415, "send the body without Content-Encoding", headers={"Accept-Encoding": "identity"})
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self.settings.max_body:
            raise self._too_large()

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body."""
        chunks: list[bytes] = []
        size = 0
        deadline = asyncio.get_running_loop().time() + self.settings.body_seconds
        while True:
            try:
                remaining = deadline - asyncio.get_running_loop().time()
                message = await asyncio.wait_for(receive(), max(remaining, 0.0))
            except asyncio.TimeoutError:
                raise ApiError(408, f"the body did not arrive within {self.settings.body_seconds:g} s") from None
            if message["type"] == "http.disconnect":
                raise _ClientLeft
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > self.settings.max_body:
                raise self._too_large()
            chunks.append(chunk)
            if not message.get("more_body", False):
                return b"".join(chunks)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self.settings.max_body} bytes")


class _ClientLeft(Exception):
    """The connection was closed before the body was whole."""


class _Replay:
    """Gives the app the body that was read, and then what the server says."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self.body: bytes | None = body
        self.receive = receive

    async def __call__(self) -> Any:
        if self.body is not None:
            body, self.body = self.body, None
            return {"type": "http.request", "body": body, "more_body": False}
        return await self.receive()


def _host(header: bytes) -> str:
    """The name in a Host header, without the port."""
    try:
        return (urlsplit(f"//{header.decode('ascii')}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def _shows(header: bytes, token: str) -> bool:
    """Whether an Authorization header has the token: as Bearer, or as the password of Basic, as browsers send it."""
    scheme, _, value = header.partition(b" ")
    given_token = value.strip()
    if scheme.lower() == b"basic":
        try:
            given_token = base64.b64decode(given_token, validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            given_token = b""
    elif scheme.lower() != b"bearer":
        given_token = b""
    return hmac.compare_digest(given_token, token.encode())


def _with_headers(headers: Sequence[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    names = {name.lower() for name, _ in headers}
    return [*headers, *(pair for pair in (*HEADERS, POLICY) if pair[0] not in names)]
