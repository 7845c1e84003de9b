"""Fetches photos: redirects, retries, robots.txt, and a rate-limit permit for every request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import NamedTuple

from yarl import URL

from lavic.shards.http import robots
from lavic.shards.http.connections import ConnectionPool
from lavic.shards.http.fetch_settings import FetchSettings
from lavic.shards.http.request import Response, ResponseLimits, is_retryable
from lavic.shards.http.robots import Robots, Rules
from lavic.shards.http.ssrf_guard import BlockedAddress, check_url
from lavic.shards.http.url import BadUrl, host_name, parse_url
from lavic.shards.pack.outcomes import Kind
from lavic.shards.ratelimit.client import CoordinatorHandle, RateLimitClient
from lavic.shards.ratelimit.coordinator import Coordinator
from lavic.shards.ratelimit.host_client import HostUnavailable, Verdict

_SPEED_AFTER_S = 5.0
"""Seconds before the speed of a response is checked, or half the deadline if that is shorter."""
_ROBOTS_REDIRECTS = 5
_ROBOTS_HEADERS = {"Accept": robots.ACCEPT}
_MAX_SITES = 10_000
_UNREADABLE_S = 5.0
"""Seconds after which a robots.txt that could not be read is looked up again."""
_HOST_FAILS: frozenset[Kind] = frozenset({"timeout", "dns", "connect", "tls"})


_CANCELLED = Response("ok")
"""Stands for the response to a request that was cancelled."""


class _Attempt(NamedTuple):
    """One of the attempts to fetch a photo."""

    fresh: bool
    """Whether it is the first one, and no earlier run has failed to fetch the photo."""
    retry: bool = False
    refused: tuple[str, int] | None = None
    """See `Response.refused`."""


@dataclass(frozen=True)
class _Site:
    """What is known of a scheme, host and port."""

    host: str
    """The name of its rate limit."""
    rules: Rules | None
    valid_until: float


class Fetcher:
    """Fetches URLs: an async context manager, for one event loop.

    Without a coordinator the rate limits hold for this fetcher alone.
    """

    def __init__(self, settings: FetchSettings, coordinator: CoordinatorHandle | None = None) -> None:
        self.settings = settings
        self._limits = RateLimitClient(coordinator or Coordinator(settings.limits), settings.concurrency)
        self._sites: dict[tuple[str, str | None, int | None], _Site] = {}
        self._loading_sites: dict[tuple[str, str | None, int | None], asyncio.Task[_Site]] = {}
        self._photos = ResponseLimits(
            deadline=settings.deadline,
            max_bytes=settings.max_bytes,
            min_speed=settings.min_speed,
            speed_after=min(_SPEED_AFTER_S, settings.deadline / 2),
            opt_outs=settings.robots,
        )
        self._robots = replace(self._photos, max_bytes=robots.MAX_BYTES, opt_outs=False, raw=True)
        self._connections = ConnectionPool(settings)

    async def __aenter__(self) -> Fetcher:
        await self._connections.__aenter__()
        await self._limits.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        for loading in self._loading_sites.values():
            loading.cancel()
        await self._limits.__aexit__()
        await self._connections.__aexit__()

    async def fetch(self, url: str, conditions: Mapping[str, str] | None = None, *, fresh: bool = True) -> Response:
        """Fetch a photo, with retries. Never raises for what a server does.

        Args:
            url: Of the photo.
            conditions: Headers such as If-None-Match; a response with status 304 is then `ok` and has no body.
            fresh: Whether no earlier run has failed to fetch it.
        """
        limits = replace(self._photos, conditions=conditions) if conditions else self._photos
        attempts = 0
        last: Response | None = None
        while True:
            response = await self._follow(
                url, limits, _Attempt(fresh and last is None, last is not None, last.refused if last else None)
            )
            if response.kind == "ok" and not attempts:
                return response
            attempts += response.attempts
            if last is not None and not response.attempts and last.reached:
                # The host was given up between two attempts: only the first one says something about this photo.
                return replace(last, attempts=attempts)
            if not is_retryable(response) or attempts > self.settings.retries:
                return replace(response, attempts=attempts)
            last = response
            await asyncio.sleep(self.settings.backoff * 2 ** (attempts - 1))

    @property
    def only_slow_hosts(self) -> bool:
        """Whether all open requests wait for hosts that are slow or paused."""
        if self._limits.in_flight.processing:
            return False
        return self._limits.slow or (bool(self._loading_sites) and not self._limits.busy)

    def hold(self) -> AbstractContextManager[None]:
        """Count a response as in flight while it is processed outside the event loop."""
        return self._limits.in_flight.hold()

    async def _follow(self, link: str, limits: ResponseLimits, attempt: _Attempt) -> Response:
        """One attempt: a request and its redirects."""
        photo = limits is not self._robots
        redirects, remaining_s = (self.settings.redirects if photo else _ROBOTS_REDIRECTS), limits.deadline
        try:
            url = original = parse_url(link)
            for hop in range(redirects + 1):
                site = await self._site(url, photo)
                if site.rules and (refusal := self._refusal(site.rules, url)):
                    return refusal
                response, seconds = await self._request(
                    url, site.host, limits, remaining_s if hop else None, original if photo else None, attempt
                )
                if response.target is None:
                    return response
                remaining_s = max(0.001, remaining_s - seconds)
                if photo and url.scheme == "https" and response.target.scheme == "http":
                    raise BlockedAddress(f"redirected from https to http, to {response.target.raw_host}")
                url = response.target
            return Response("http_error", reason=f"more than {redirects} redirects", http=response.http)
        except HostUnavailable as error:
            return Response(error.kind, reason=f"the host is paused: {error.reason}", attempts=0, final=True)
        except BlockedAddress as error:
            return Response("blocked_address", reason=str(error))
        except BadUrl as error:
            return Response("bad_url", reason=str(error), attempts=0)

    async def _request(
        self,
        url: URL,
        host: str,
        limits: ResponseLimits,
        remaining_s: float | None,
        original: URL | None,
        attempt: _Attempt,
    ) -> tuple[Response, float]:
        """Send one request when the host's rate limit permits; returns the response and the seconds it took.

        For `remaining_s` and `original` see `ConnectionPool.get`.
        """
        permits = self._limits.host(host)
        version = await permits.acquire(attempt.fresh, attempt.retry)
        verdict: Verdict = "unknown"
        response = _CANCELLED
        began = time.monotonic()
        try:
            headers = None if original else _ROBOTS_HEADERS
            response = await self._connections.get(
                url, limits, remaining_s=remaining_s, headers=headers, original=original
            )
            if response.kind == "throttled":
                verdict = "throttled"
                response = replace(response, refused=(host, version))
            elif response.kind in _HOST_FAILS or response.http >= 500:
                verdict = "failed" if response.reached else "unreachable"
            else:
                verdict = "success"
            down = verdict == "unreachable" and response.kind in ("connect", "dns") and not response.final
            if down and permits.answered:
                reason = f"the host is down since it last answered: {response.reason}"
                return replace(response, kind="unasked", reason=reason), 0.0
            return response, time.monotonic() - began
        finally:
            refused = attempt.refused[1] if attempt.refused and attempt.refused[0] == host else -1
            permits.release(
                version, verdict, response.kind, response.reason, response.retry_after, attempt.fresh, refused
            )

    async def _site(self, url: URL, photo: bool) -> _Site:
        """The site of a URL.

        Raises:
            BlockedAddress: Requests to it are not allowed.
        """
        key = (url.scheme, url.raw_host, url.port)
        if not photo:
            check_url(url, allow_private=self.settings.allow_private)
            return _Site(host_name(url), None, 0.0)
        site = self._sites.get(key)
        if site is not None and time.monotonic() < site.valid_until:
            return site
        loading = self._loading_sites.get(key)
        if loading is None:
            check_url(url, allow_private=self.settings.allow_private)
            loading = self._loading_sites[key] = asyncio.create_task(self._load_site(url))
            loading.add_done_callback(lambda _: self._loading_sites.pop(key, None))
        site = await asyncio.shield(loading)
        if len(self._sites) >= _MAX_SITES:
            self._sites.clear()
        self._sites[key] = site
        return site

    async def _load_site(self, url: URL) -> _Site:
        """A site with its robots.txt, which one worker fetches for all."""
        host = host_name(url)
        if not self.settings.robots:
            return _Site(host, None, time.monotonic() + robots.MAX_AGE_S)
        name = str(url.origin())
        coordinator = self._limits.coordinator
        while (known := await coordinator.get_robots(name, self._limits.worker)) is None:
            known = await coordinator.put_robots(name, await self._fetch_robots(f"{name}/robots.txt"))
            if known is not None:
                break
        rules = Rules(known)
        if rules.delay:
            await coordinator.limit_rate(host, 1 / rules.delay)
            self._limits.host(host).pause()
        return _Site(host, rules, time.monotonic() + (robots.MAX_AGE_S if known.kind == "ok" else _UNREADABLE_S))

    async def _fetch_robots(self, link: str) -> Robots:
        """RFC 9309, 2.3.1: present, unavailable (everything is allowed) or unreachable (nothing is)."""
        response = await self._follow(link, self._robots, _Attempt(False))
        if response.kind == "ok":
            return Robots.read(response.body, response.codings)
        if response.kind in ("gone", "forbidden") or (response.kind == "http_error" and 200 <= response.http < 500):
            return Robots()
        final = response.kind in ("tls", "blocked_address") or (response.kind == "dns" and response.final)
        return Robots(kind=response.kind, reason=response.reason, final=final)

    def _refusal(self, rules: Rules, url: URL) -> Response | None:
        kind, reason = rules.robots.kind, rules.robots.reason
        if kind != "ok":
            return Response(kind, reason=f"robots.txt cannot be read: {reason}", attempts=0, final=True)
        if not rules.allow(url):
            return Response("opted_out", reason="robots.txt", attempts=0)
        if rules.delay > self.settings.patience:
            reason = (
                f"robots.txt asks for {rules.delay:,.0f} s between two requests (Crawl-delay), "
                f"more than --fetch.patience {self.settings.patience:g}"
            )
            return Response("throttled", reason=reason, attempts=0, final=True)
        return None
