"""Settings of `lavic crawl` that say how photos are fetched."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lavic import __version__
from lavic.config import settings
from lavic.shards.http.robots import PRODUCT
from lavic.shards.ratelimit.host_limiter import UNLIMITED, Limits


@settings
class FetchSettings:
    """How photos are fetched."""

    concurrency: int = Field(default=32, ge=1)
    """Requests in flight for each shard that is being fetched; --ray.workers shards are fetched at once."""
    host_rate: float = Field(default=50.0, ge=0)
    """Requests per second to one host, by all workers together; 0: no limit. When a host answers 429 or 503, the rate
    is halved and raised slowly again."""
    host_connections: int = Field(default=32, ge=0)
    """Requests in flight to one host, by all workers together; 0: no limit."""
    deadline: float = Field(default=30.0, gt=0)
    """Seconds for one complete response, from name resolution to the last byte, redirects included; time that a
    request waits for its host's rate limit does not count."""
    min_speed: int = Field(default=2_000, ge=0)
    """Bytes per second of a response, on average after its first seconds; 0: no minimum."""
    max_bytes: int = Field(default=25_000_000, ge=1)
    """Maximum size of a response, bytes."""
    retries: int = Field(default=2, ge=0)
    """Retries of a photo after failures that may be transient: timeouts, broken connections, 408, 425, 429, 5xx."""
    backoff: float = Field(default=0.5, ge=0)
    """Seconds before the first retry, doubled for each further one. When a host answers 429 or 503, all workers pause
    requests to it for this time, or for its Retry-After."""
    patience: float = Field(default=60.0, ge=0)
    """Seconds that photos wait for a host that is down, asks for a pause, or whose robots.txt cannot be read. After
    that those that were not requested end as `unasked`, and the next run requests them. A host whose robots.txt asks
    for a longer pause between two requests (Crawl-delay) gets no requests at all."""
    redirects: int = Field(default=5, ge=0)
    """Redirects followed for one photo; each is checked like the first URL."""
    robots: bool = True
    """Obey robots.txt, and the opt-outs noai, noimageai, noindex, noimageindex and noml in X-Robots-Tag. Turn it off
    if the hosts are yours or their owners agree."""
    allow_private: bool = False
    """Also fetch from this machine and from private networks. The URLs of a catalogue are untrusted: leave this off
    unless the photos are on a server of your own. Link-local addresses, and those of clouds' metadata services, are
    always refused."""
    proxy: Literal["none", "env"] = "none"
    """`env`: send requests through the proxies in HTTP_PROXY, HTTPS_PROXY and ALL_PROXY, except to the hosts in
    NO_PROXY. Names are resolved and checked here before a proxy is used; the proxy may be in a private network."""
    headers: str | None = None
    """File of headers to send, one `Name: value` on a line; lines after `[host]` are sent to that host alone. Headers
    that may hold credentials do not follow a redirect to another site, and only the file's name is recorded."""
    contact: str = Field(default="", pattern=r"^[ -~]*$")
    """Who runs this crawl, as an e-mail or web address; sent in the User-Agent of every request."""

    @property
    def user_agent(self) -> str:
        """The User-Agent of every request."""
        return f"{PRODUCT}/{__version__} (product photo crawler{'; ' + self.contact if self.contact else ''})"

    @property
    def limits(self) -> Limits:
        """The rate limit of each host."""
        return Limits(
            rate=self.host_rate or UNLIMITED,
            connections=self.host_connections,
            backoff=self.backoff,
            patience=self.patience,
        )
