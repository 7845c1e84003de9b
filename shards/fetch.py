"""Fetching over HTTP: pooled connections, a deadline and a size limit for every answer, no private networks."""

from __future__ import annotations

import asyncio
import email.utils
import ipaddress
import socket
import ssl
import time
from dataclasses import dataclass
from functools import lru_cache
from types import TracebackType
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver
from pydantic import Field
from yarl import URL

from lavic import __version__
from lavic.config import settings
from lavic.shards.outcomes import PASSING, Kind

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_LONGEST_WAIT = 30.0


@settings
class FetchSettings:
    """How photos are fetched."""

    concurrency: int = Field(default=32, ge=1)
    """Requests in flight for each shard that is being fetched; there are --ray.workers of these at once."""
    deadline: float = Field(default=30.0, gt=0)
    """Seconds for one whole answer, from the look-up of the name to the last byte, redirects included."""
    max_bytes: int = Field(default=25_000_000, ge=1)
    """Longest answer taken."""
    retries: int = Field(default=2, ge=0)
    """Further tries of a photo after failures that may pass: timeouts, broken connections, 429, 5xx."""
    backoff: float = Field(default=0.5, ge=0)
    """Seconds before the first further try, doubled for each after it; a server's Retry-After counts if longer."""
    redirects: int = Field(default=5, ge=0)
    """Redirects followed for one photo; each is checked like the first address."""
    allow_private: bool = False
    """Also fetch from this machine and from private networks. Addresses in a catalogue are somebody else's words: leave
    this off unless the photos are on a server of your own."""
    contact: str = ""
    """Who runs this crawl, as an e-mail or web address; sent in the User-Agent with every request."""

    @property
    def user_agent(self) -> str:
        """What the crawler calls itself."""
        return f"lavic/{__version__} (product photo crawler{'; ' + self.contact if self.contact else ''})"


@dataclass(frozen=True)
class Answer:
    """What came of fetching one URL."""

    kind: Kind
    """`ok` means a whole answer with status 200; whether it is a photo is not looked at here."""
    body: bytes = b""
    reason: str = ""
    http: int = 0
    attempts: int = 1
    retry_after: float = 0.0
    """Seconds the server asks to wait."""


class BlockedAddress(Exception):
    """An address that a crawler has no business at."""


class Fetcher:
    """A pool of connections; use it as an async context, from one event loop."""

    def __init__(self, settings: FetchSettings) -> None:
        self.settings = settings

    async def __aenter__(self) -> Fetcher:
        connector = aiohttp.TCPConnector(
            limit=self.settings.concurrency,
            resolver=ThreadedResolver() if self.settings.allow_private else PublicResolver(),
            ttl_dns_cache=300,
            ssl=_tls(),
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            headers={"User-Agent": self.settings.user_agent, "Accept": "image/*", "Accept-Encoding": "identity"},
            timeout=aiohttp.ClientTimeout(total=None),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=True,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def fetch(self, url: str) -> Answer:
        """Fetch one URL, with further tries where the failure may pass. Never raises for what a server does."""
        attempts = 0
        while True:
            attempts += 1
            answer = await self._once(url)
            if answer.kind not in PASSING or not _may_pass(answer) or attempts > self.settings.retries:
                return Answer(answer.kind, answer.body, answer.reason, answer.http, attempts)
            wait = max(self.settings.backoff * 2 ** (attempts - 1), answer.retry_after)
            await asyncio.sleep(min(wait, _LONGEST_WAIT))

    async def _once(self, url: str) -> Answer:
        try:
            return await asyncio.wait_for(self._follow(url), self.settings.deadline)
        except (asyncio.TimeoutError, TimeoutError):
            return Answer("timeout", reason=f"no whole answer within {self.settings.deadline:g} s")
        except BlockedAddress as error:
            return Answer("blocked_address", reason=str(error))
        except (aiohttp.InvalidURL, ValueError) as error:
            return Answer("blocked_address", reason=f"not an address: {error}")
        except aiohttp.ClientConnectorDNSError as error:
            return Answer("dns", reason=str(error.os_error))
        except (aiohttp.ClientSSLError, ssl.SSLError) as error:
            return Answer("tls", reason=str(error))
        except aiohttp.ClientPayloadError as error:
            return Answer("truncated", reason=f"the answer breaks off: {_first_line(error)}")
        except aiohttp.ClientResponseError as error:
            return Answer("http_error", reason=f"not HTTP: {_first_line(error)}", http=error.status)
        except (aiohttp.ClientError, OSError) as error:
            return Answer("connect", reason=_first_line(error))

    async def _follow(self, address: str) -> Answer:
        url = URL(address)
        for _ in range(self.settings.redirects + 1):
            self._check(url)
            async with self._session.get(url, allow_redirects=False) as response:
                target = response.headers.get("Location")
                if response.status not in _REDIRECTS or not target:
                    return await self._read(response)
                following = url.join(URL(target))
            if url.scheme == "https" and following.scheme == "http":
                raise BlockedAddress(f"redirected from https to http: {following}")
            url = following
        return Answer("http_error", reason=f"more than {self.settings.redirects} redirects", http=response.status)

    async def _read(self, response: aiohttp.ClientResponse) -> Answer:
        status = response.status
        if status != 200:
            return Answer(_kind_of(status), reason=f"HTTP {status}", http=status, retry_after=_retry_after(response))
        limit = self.settings.max_bytes
        too_big = Answer("too_big", reason=f"more than {limit:,} bytes", http=status)
        if (response.content_length or 0) > limit:
            return too_big
        body = bytearray()
        async for chunk in response.content.iter_any():
            body += chunk
            if len(body) > limit:
                return too_big
        return Answer("ok", bytes(body), http=status)

    def _check(self, url: URL) -> None:
        """Refuse what a name's look-up will not see: other schemes, and addresses written as numbers."""
        if url.scheme not in ("http", "https") or not url.host:
            raise BlockedAddress(f"not an http or https address: {url}")
        if not self.settings.allow_private:
            try:
                address = ipaddress.ip_address(url.host)
            except ValueError:
                return
            _refuse_private(address, url.host)


class PublicResolver(AbstractResolver):
    """Looks names up and refuses a name with any address that is not public; the address checked is the one used."""

    def __init__(self) -> None:
        self._inner = ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Addresses of a host. Raises BlockedAddress."""
        found = await self._inner.resolve(host, port, family)
        for result in found:
            _refuse_private(ipaddress.ip_address(result["host"].partition("%")[0]), host)
        return found

    async def close(self) -> None:
        """Nothing to close."""
        await self._inner.close()


def _refuse_private(address: ipaddress.IPv4Address | ipaddress.IPv6Address, host: str) -> None:
    inner = getattr(address, "ipv4_mapped", None) or getattr(address, "sixtofour", None) or address
    if not inner.is_global or inner.is_multicast:
        raise BlockedAddress(f"{host} is {address}, inside a private network; your own server needs allow_private")


def _kind_of(status: int) -> Kind:
    if status in (404, 410):
        return "gone"
    if status in (401, 403, 451):
        return "forbidden"
    return "throttled" if status in (429, 503) else "http_error"


def _may_pass(answer: Answer) -> bool:
    return answer.kind != "http_error" or answer.http >= 500


def _retry_after(response: aiohttp.ClientResponse) -> float:
    value = response.headers.get("Retry-After", "").strip()
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


@lru_cache(maxsize=1)
def _tls() -> Any:
    """One context a process: making it reads every certificate of the machine, tens of milliseconds."""
    return ssl.create_default_context()
