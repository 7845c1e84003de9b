"""Pools of connections, direct or through a proxy, to addresses that were checked."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import aiohttp
from yarl import URL

from lavic.shards.http.custom_headers import CustomHeaders
from lavic.shards.http.fetch_settings import FetchSettings
from lavic.shards.http.lenient_parser import LenientConnector
from lavic.shards.http.proxy import Proxies
from lavic.shards.http.request import Response, ResponseLimits, send_request
from lavic.shards.http.ssrf_guard import CheckedResolver, NameChecker

CONNECT_S = 10.0
"""Timeout of a connection in seconds, unless the deadline is shorter."""
_DNS_CACHE_S = 300


class ConnectionPool:
    """Connections of a fetcher: an async context manager.

    Raises:
        ConfigError: The environment has no usable proxy, or the file of headers is wrong.
    """

    def __init__(self, settings: FetchSettings) -> None:
        self._settings = settings
        self._connect = min(CONNECT_S, settings.deadline)
        self._proxies = Proxies.from_environment() if settings.proxy == "env" else None
        self._headers = CustomHeaders.read(settings.headers) if settings.headers else None

    async def __aenter__(self) -> ConnectionPool:
        resolver = CheckedResolver(allow_private=self._settings.allow_private)
        self._direct = self._session(resolver)
        # The user chose the proxy, so it may be in a private network. Hosts are checked before it is asked for them.
        self._proxied = self._session(None) if self._proxies else None
        self._names = NameChecker(allow_private=self._settings.allow_private, cache_s=_DNS_CACHE_S)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._names.close()
        await self._direct.close()
        if self._proxied:
            await self._proxied.close()

    async def get(
        self,
        url: URL,
        limits: ResponseLimits,
        *,
        remaining_s: float | None = None,
        headers: Mapping[str, str] | None = None,
        original: URL | None = None,
    ) -> Response:
        """Send one GET; see `send_request`.

        Args:
            url: The URL to request.
            limits: Limits of the response.
            remaining_s: Seconds that remain of the deadline; None for all of it.
            headers: More headers; they take precedence over those of the user's file.
            original: The catalogue's link that led to this request, see `CustomHeaders.for_url`.

        Raises:
            BlockedAddress: The host has an address that is not allowed.
        """
        timeout = None if remaining_s is None else aiohttp.ClientTimeout(total=remaining_s, sock_connect=self._connect)
        if self._headers:
            headers = {**self._headers.for_url(url, original), **(headers or {})}
            if "authorization" in map(str.lower, headers):
                # As in curl, the header takes precedence over a user in the link.
                url = url.with_user(None)
        proxy = self._proxies.for_url(url) if self._proxies else None
        if proxy is None:
            return await send_request(self._direct, url, limits, timeout, headers)
        try:
            await asyncio.wait_for(self._names.check(url.raw_host or ""), self._connect)
        except (asyncio.TimeoutError, TimeoutError):
            return Response("dns", reason=f"the name was not resolved within {self._connect:g} s", reached=False)
        except OSError as error:
            reason = f"{error.strerror or error}; names are resolved here before a proxy is used"
            return Response("dns", reason=reason, final=error.errno == socket.EAI_NONAME, reached=False)
        options: dict[str, Any] = {"proxy": proxy.url}
        if proxy.authorization and url.scheme == "http":
            headers = {**(headers or {}), "Proxy-Authorization": proxy.authorization}
        elif proxy.authorization:
            options["proxy_headers"] = {"Proxy-Authorization": proxy.authorization}
        assert self._proxied
        response = await send_request(self._proxied, url, limits, timeout, headers, **options)
        if response.http == 407:
            return Response("connect", reason="the proxy answers 407: it needs a user and password", http=407)
        return response

    def _session(self, resolver: CheckedResolver | None) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=LenientConnector(
                limit=self._settings.concurrency, resolver=resolver, ttl_dns_cache=_DNS_CACHE_S, ssl=ssl_context()
            ),
            headers={"User-Agent": self._settings.user_agent, "Accept": "image/*", "Accept-Encoding": "identity"},
            timeout=aiohttp.ClientTimeout(total=self._settings.deadline, sock_connect=self._connect),
            cookie_jar=aiohttp.DummyCookieJar(),
            # Responses that are compressed although not requested so are decompressed within `max_bytes`.
            auto_decompress=False,
        )


def check_connection_settings(settings: FetchSettings) -> None:
    """Raise ConfigError for wrong settings before any work."""
    ConnectionPool(settings)


@lru_cache(maxsize=1)
def ssl_context() -> Any:
    """The context, made once per process: reading every certificate of the machine takes tens of milliseconds."""
    return ssl.create_default_context()
