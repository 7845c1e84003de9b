"""Connections to servers, direct or through a proxy, to addresses that were checked."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal, Protocol

import aiohttp
from yarl import URL

from lavic.shards.http.custom_headers import Headers
from lavic.shards.http.lenient_parser import LenientConnector
from lavic.shards.http.proxy import Proxies
from lavic.shards.http.request import Answer, Bounds, exchange
from lavic.shards.http.ssrf_guard import CheckedNames, CheckedResolver

CONNECT_S = 10.0
"""Seconds to a connection, where the deadline is not shorter."""
_DNS_KEPT_S = 300


class TransportSettings(Protocol):
    """What is needed of the settings."""

    @property
    def concurrency(self) -> int:
        """Connections in a pool."""

    @property
    def deadline(self) -> float:
        """Seconds for one whole answer."""

    @property
    def allow_private(self) -> bool:
        """Addresses of this machine and of private networks pass."""

    @property
    def proxy(self) -> Literal["none", "env"]:
        """Where proxies are named."""

    @property
    def headers(self) -> str | None:
        """File of headers."""

    @property
    def user_agent(self) -> str:
        """What the crawler calls itself."""


class Transport:
    """Pools of connections; use it as an async context.

    Args:
        settings: Of fetching.

    Raises:
        ConfigError: The environment names no proxy that can be used, or the file of headers is wrong.
    """

    def __init__(self, settings: TransportSettings) -> None:
        self._settings = settings
        self._connect = min(CONNECT_S, settings.deadline)
        self._proxies = Proxies.from_environment() if settings.proxy == "env" else None
        self._headers = Headers.read(settings.headers) if settings.headers else None

    async def __aenter__(self) -> Transport:
        resolver = CheckedResolver(allow_private=self._settings.allow_private)
        self._direct = self._session(resolver)
        # A proxy is the user's own word and may be in a private network; what it is asked for is checked before.
        self._proxied = self._session(None) if self._proxies else None
        self._names = CheckedNames(allow_private=self._settings.allow_private, kept=_DNS_KEPT_S)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._names.close()
        await self._direct.close()
        if self._proxied:
            await self._proxied.close()

    async def get(
        self,
        url: URL,
        bounds: Bounds,
        *,
        left: float | None = None,
        headers: Mapping[str, str] | None = None,
        first: URL | None = None,
    ) -> Answer:
        """Send one GET; see `exchange`.

        Args:
            url: What is requested.
            bounds: What is taken of the answer.
            left: Seconds that remain of the deadline; None for all of it.
            headers: Sent besides, and before those of the user's file.
            first: The catalogue's link that led to this request, see `Headers.of`.

        Raises:
            BlockedAddress: The host's name leads to an address that is not to be asked.
        """
        timeout = None if left is None else aiohttp.ClientTimeout(total=left, sock_connect=self._connect)
        if self._headers:
            headers = {**self._headers.of(url, first), **(headers or {})}
            if "authorization" in map(str.lower, headers):
                # As in curl, a header that is given takes the place of a user in the link.
                url = url.with_user(None)
        proxy = self._proxies.of(url) if self._proxies else None
        if proxy is None:
            return await exchange(self._direct, url, bounds, timeout, headers)
        try:
            await asyncio.wait_for(self._names.check(url.raw_host or ""), self._connect)
        except (asyncio.TimeoutError, TimeoutError):
            return Answer("dns", reason=f"no answer about the host's name within {self._connect:g} s", reached=False)
        except OSError as error:
            reason = f"{error.strerror or error}; names are looked up here before a proxy is asked"
            return Answer("dns", reason=reason, final=error.errno == socket.EAI_NONAME, reached=False)
        more: dict[str, Any] = {"proxy": proxy.url}
        if proxy.authorization and url.scheme == "http":
            headers = {**(headers or {}), "Proxy-Authorization": proxy.authorization}
        elif proxy.authorization:
            more["proxy_headers"] = {"Proxy-Authorization": proxy.authorization}
        assert self._proxied
        answer = await exchange(self._proxied, url, bounds, timeout, headers, **more)
        if answer.http == 407:
            return Answer("connect", reason="the proxy answers 407: it wants a user and password", http=407)
        return answer

    def _session(self, resolver: CheckedResolver | None) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=LenientConnector(
                limit=self._settings.concurrency, resolver=resolver, ttl_dns_cache=_DNS_KEPT_S, ssl=tls()
            ),
            headers={"User-Agent": self._settings.user_agent, "Accept": "image/*", "Accept-Encoding": "identity"},
            timeout=aiohttp.ClientTimeout(total=self._settings.deadline, sock_connect=self._connect),
            cookie_jar=aiohttp.DummyCookieJar(),
            # What comes compressed although that was not asked for is unpacked within the limit of size.
            auto_decompress=False,
        )


def check_transport(settings: TransportSettings) -> None:
    """Find wrong settings before any work. Raises ConfigError."""
    Transport(settings)


@lru_cache(maxsize=1)
def tls() -> Any:
    """One context a process: making it reads every certificate of the machine, tens of milliseconds."""
    return ssl.create_default_context()
