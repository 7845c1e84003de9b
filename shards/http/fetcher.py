"""Fetching photos: pooled connections, redirects and further tries, each request with its host's leave."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Literal, NamedTuple

from pydantic import Field
from yarl import URL

from lavic import __version__
from lavic.config.loader import settings
from lavic.shards.http import robots
from lavic.shards.http.connections import Transport
from lavic.shards.http.request import Answer, Bounds, may_pass
from lavic.shards.http.robots import Robots, Rules
from lavic.shards.http.ssrf_guard import BlockedAddress, check_url
from lavic.shards.http.url import BadUrl, read_link
from lavic.shards.pack.outcomes import Kind
from lavic.shards.ratelimit.client import HostClosed, Lanes, Office, Verdict
from lavic.shards.ratelimit.coordinator import Broker
from lavic.shards.ratelimit.host_limiter import FREE, Limits

_SPEED_AFTER_S = 5.0
"""Seconds of an answer before its speed is looked at, where half the deadline is not shorter."""
_ROBOTS_REDIRECTS = 5
_ROBOTS_HEADERS = {"Accept": robots.ACCEPT}
_SITES = 10_000
_UNREAD_S = 5.0
"""After so long it is asked whether a site's robots.txt can be read by now."""
_HOST_FAILS: frozenset[Kind] = frozenset({"timeout", "dns", "connect", "tls"})


@settings
class FetchSettings:
    """How photos are fetched."""

    concurrency: int = Field(default=32, ge=1)
    """Requests in flight for each shard that is being fetched; there are --ray.workers of these at once."""
    host_rate: float = Field(default=50.0, ge=0)
    """Requests a second to one host, by all workers together; 0: as many as it takes. When a host answers 429 or 503,
    the rate is halved and raised slowly again."""
    host_connections: int = Field(default=32, ge=0)
    """Requests in flight to one host, by all workers together; 0: as many as there are."""
    deadline: float = Field(default=30.0, gt=0)
    """Seconds for one whole answer, from the look-up of the name to the last byte, redirects included; waiting for a
    host's budget does not count."""
    min_speed: int = Field(default=2_000, ge=0)
    """Bytes a second that an answer must bring on average after its first seconds; 0: any."""
    max_bytes: int = Field(default=25_000_000, ge=1)
    """Longest answer taken."""
    retries: int = Field(default=2, ge=0)
    """Further tries of a photo after failures that may pass: timeouts, broken connections, 429, 5xx."""
    backoff: float = Field(default=0.5, ge=0)
    """Seconds before the first further try, doubled for each after it. A host that answers 429 or 503 is left alone by
    all workers for so long, or for its Retry-After."""
    patience: float = Field(default=60.0, ge=0)
    """Seconds that photos wait for a host that is down, asks for a rest, or whose robots.txt cannot be read. After that
    those that were not asked for end as `unasked`, and the next run asks for them. A host whose robots.txt wants a
    longer pause between two requests (Crawl-delay) is not asked at all."""
    redirects: int = Field(default=5, ge=0)
    """Redirects followed for one photo; each is checked like the first address."""
    robots: bool = True
    """Heed robots.txt, and the opt-outs noai, noimageai, noindex, noimageindex and noml in X-Robots-Tag. Turn it off
    where the hosts are yours, or their owners agree."""
    allow_private: bool = False
    """Also fetch from this machine and from private networks. Addresses in a catalogue are somebody else's words: leave
    this off unless the photos are on a server of your own. Link-local addresses, and those where clouds keep their
    machines' metadata, are refused all the same."""
    proxy: Literal["none", "env"] = "none"
    """`env`: send requests through the proxies that HTTP_PROXY, HTTPS_PROXY and ALL_PROXY name, except to the hosts in
    NO_PROXY. Names are looked up and checked here before a proxy is asked; the proxy may be in a private network."""
    headers: str | None = None
    """File of headers to send, one `Name: value` on a line; lines after `[host]` are sent to this host alone. Headers
    that may hold credentials do not follow a redirect to another site, and only the file's name is recorded."""
    contact: str = Field(default="", pattern=r"^[ -~]*$")
    """Who runs this crawl, as an e-mail or web address; sent in the User-Agent with every request."""

    @property
    def user_agent(self) -> str:
        """What the crawler calls itself."""
        return f"{robots.PRODUCT}/{__version__} (product photo crawler{'; ' + self.contact if self.contact else ''})"

    @property
    def limits(self) -> Limits:
        """The budget of each host."""
        return Limits(
            rate=self.host_rate or FREE,
            connections=self.host_connections,
            backoff=self.backoff,
            patience=self.patience,
        )


_NO_ANSWER = Answer("ok")
"""Stands for the answer to a request that was given up."""


class _Try(NamedTuple):
    """One of the requests for a photo."""

    fresh: bool
    """The first, and no earlier run has failed to fetch it."""
    again: bool = False
    refused: tuple[str, int] | None = None
    """How it was refused before, see `Answer.refused`."""


@dataclass(frozen=True)
class _Site:
    """What is known of a scheme, host and port."""

    host: str
    """The name of its budget."""
    rules: Rules | None
    until: float
    """The rules hold."""


class Fetcher:
    """A pool of connections; use it as an async context, from one event loop.

    Args:
        settings: How to fetch.
        office: Where the hosts' budgets are kept; by default here, for this pool alone.
    """

    def __init__(self, settings: FetchSettings, office: Office | None = None) -> None:
        self.settings = settings
        self._lanes = Lanes(office or Broker(settings.limits), settings.concurrency)
        self._sites: dict[tuple[str, str | None, int | None], _Site] = {}
        self._meetings: dict[tuple[str, str | None, int | None], asyncio.Task[_Site]] = {}
        self._photos = Bounds(
            deadline=settings.deadline,
            max_bytes=settings.max_bytes,
            min_speed=settings.min_speed,
            speed_after=min(_SPEED_AFTER_S, settings.deadline / 2),
            opt_outs=settings.robots,
        )
        self._robots = replace(self._photos, max_bytes=robots.MAX_BYTES, opt_outs=False, raw=True)
        self._transport = Transport(settings)

    async def __aenter__(self) -> Fetcher:
        await self._transport.__aenter__()
        await self._lanes.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for meeting in self._meetings.values():
            meeting.cancel()
        await self._lanes.__aexit__()
        await self._transport.__aexit__()

    async def fetch(self, url: str, conditions: Mapping[str, str] | None = None, *, fresh: bool = True) -> Answer:
        """Fetch one URL, with further tries where the failure may pass. Never raises for what a server does.

        Args:
            url: Of a photo.
            conditions: Headers such as If-None-Match; an answer with status 304 is then `ok` and has no body.
            fresh: No earlier run has failed to fetch it.
        """
        bounds = replace(self._photos, conditions=conditions) if conditions else self._photos
        attempts = 0
        last: Answer | None = None
        while True:
            answer = await self._follow(
                url, bounds, _Try(fresh and last is None, last is not None, last.refused if last else None)
            )
            if answer.kind == "ok" and not attempts:
                return answer
            attempts += answer.attempts
            if last is not None and not answer.attempts and last.reached:
                # The host was given up between two tries: it is the first of them that tells of this photo.
                return replace(last, attempts=attempts)
            if not may_pass(answer) or attempts > self.settings.retries:
                return replace(answer, attempts=attempts)
            last = answer
            await asyncio.sleep(self.settings.backoff * 2 ** (attempts - 1))

    @property
    def waiting(self) -> bool:
        """All that was asked for waits for hosts that let seconds pass between two requests, or that are left alone."""
        if self._lanes.room.kept:
            return False
        return self._lanes.slow or (bool(self._meetings) and not self._lanes.busy)

    def held(self) -> AbstractContextManager[None]:
        """Keep the place of a request while its answer is worked on elsewhere than in the event loop."""
        return self._lanes.room.held()

    async def _follow(self, address: str, bounds: Bounds, attempt: _Try) -> Answer:
        """One try: a request and its redirects."""
        photo = bounds is not self._robots
        redirects, left = (self.settings.redirects if photo else _ROBOTS_REDIRECTS), bounds.deadline
        try:
            url = first = read_link(address)
            for hop in range(redirects + 1):
                site = await self._site(url, photo)
                if site.rules and (refusal := self._refusal(site.rules, url)):
                    return refusal
                answer, seconds = await self._ask(
                    url, site.host, bounds, left if hop else None, first if photo else None, attempt
                )
                if answer.target is None:
                    return answer
                left = max(0.001, left - seconds)
                if photo and url.scheme == "https" and answer.target.scheme == "http":
                    raise BlockedAddress(f"redirected from https to http, to {answer.target.raw_host}")
                url = answer.target
            return Answer("http_error", reason=f"more than {redirects} redirects", http=answer.http)
        except HostClosed as closed:
            return Answer(closed.kind, reason=f"the host is left alone: {closed.reason}", attempts=0, final=True)
        except BlockedAddress as error:
            return Answer("blocked_address", reason=str(error))
        except BadUrl as error:
            return Answer("bad_url", reason=str(error), attempts=0)

    async def _ask(
        self,
        url: URL,
        host: str,
        bounds: Bounds,
        left: float | None,
        first: URL | None,
        attempt: _Try,
    ) -> tuple[Answer, float]:
        """One request, with the host's leave, and its seconds.

        Args:
            url: What is requested.
            host: Its budget.
            bounds: What is taken of the answer.
            left: What remains of the deadline, None for all.
            first: The catalogue's link that led to it, None for robots.txt.
            attempt: What came before.
        """
        lane = self._lanes.to(host)
        version = await lane.enter(attempt.fresh, attempt.again)
        verdict: Verdict = "void"
        answer = _NO_ANSWER
        began = time.monotonic()
        try:
            headers = None if first else _ROBOTS_HEADERS
            answer = await self._transport.get(url, bounds, left=left, headers=headers, first=first)
            if answer.kind == "throttled":
                verdict = "throttled"
                answer = replace(answer, refused=(host, version))
            elif answer.kind in _HOST_FAILS or answer.http >= 500:
                verdict = "failed" if answer.reached else "unreached"
            else:
                verdict = "well"
            if verdict == "unreached" and answer.kind in ("connect", "dns") and lane.answered and not answer.final:
                reason = f"the host is down since it last answered: {answer.reason}"
                return replace(answer, kind="unasked", reason=reason), 0.0
            return answer, time.monotonic() - began
        finally:
            before = attempt.refused[1] if attempt.refused and attempt.refused[0] == host else -1
            lane.leave(version, verdict, answer.kind, answer.reason, answer.retry_after, attempt.fresh, before)

    async def _site(self, url: URL, photo: bool) -> _Site:
        """What is known of an address's site.

        Raises:
            BlockedAddress: It is not to be asked.
        """
        key = (url.scheme, url.raw_host, url.port)
        if not photo:
            check_url(url, allow_private=self.settings.allow_private)
            return _Site(_budget(url), None, 0.0)
        site = self._sites.get(key)
        if site is not None and time.monotonic() < site.until:
            return site
        meeting = self._meetings.get(key)
        if meeting is None:
            check_url(url, allow_private=self.settings.allow_private)
            meeting = self._meetings[key] = asyncio.create_task(self._meet(url))
            meeting.add_done_callback(lambda _: self._meetings.pop(key, None))
        site = await asyncio.shield(meeting)
        if len(self._sites) >= _SITES:
            self._sites.clear()
        self._sites[key] = site
        return site

    async def _meet(self, url: URL) -> _Site:
        """Get to know a site: its robots.txt, which one worker fetches for all."""
        host = _budget(url)
        if not self.settings.robots:
            return _Site(host, None, time.monotonic() + robots.KEPT_S)
        name = str(url.origin())
        office = self._lanes.office
        while (found := await office.robots(name, self._lanes.worker)) is None:
            found = await office.keep_robots(name, await self._read_robots(f"{name}/robots.txt"))
            if found is not None:
                break
        rules = Rules(found)
        if rules.delay:
            await office.cap(host, 1 / rules.delay)
            self._lanes.to(host).wait()
        return _Site(host, rules, time.monotonic() + (robots.KEPT_S if found.kind == "ok" else _UNREAD_S))

    async def _read_robots(self, address: str) -> Robots:
        """RFC 9309, 2.3.1: there, away (all is allowed), or out of reach (nothing is)."""
        answer = await self._follow(address, self._robots, _Try(False))
        if answer.kind == "ok":
            return Robots.read(answer.body, answer.codings)
        if answer.kind in ("gone", "forbidden") or (answer.kind == "http_error" and 200 <= answer.http < 500):
            return Robots()
        final = answer.kind in ("tls", "blocked_address") or (answer.kind == "dns" and answer.final)
        return Robots(kind=answer.kind, reason=answer.reason, final=final)

    def _refusal(self, rules: Rules, url: URL) -> Answer | None:
        found = rules.robots
        if found.kind != "ok":
            return Answer(found.kind, reason=f"robots.txt cannot be read: {found.reason}", attempts=0, final=True)
        if not rules.allow(url):
            return Answer("opted_out", reason="robots.txt", attempts=0)
        if rules.delay > self.settings.patience:
            reason = (
                f"robots.txt asks for {rules.delay:,.0f} s between two requests (Crawl-delay), "
                f"more than --fetch.patience {self.settings.patience:g}"
            )
            return Answer("throttled", reason=reason, attempts=0, final=True)
        return None


def _budget(url: URL) -> str:
    """Ports that a scheme has by itself share one budget."""
    return url.raw_host or "" if url.is_default_port() else f"{url.raw_host}:{url.port}"
