"""Settings of a client of OpenAI-compatible servers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from lavic.config import Reference, settings
from lavic.config.secrets import is_reference, reveal_key
from lavic.errors import ConfigError

NO_EFFECT = (
    *("url", "api_key", "concurrency", "requests_per_minute", "timeout_s", "startup_s", "retries", "backoff_s"),
    *("max_wait_s", "give_up_after", "input_price", "output_price", "cache", "batch_size", "proxy"),
)
"""Settings that change how a model is asked, and not what it answers."""
_PATHS = re.compile(r"/(?:chat/completions|completions|embeddings|models)/*$")


@settings
class EndpointSettings:
    """One model behind one or many OpenAI-compatible servers (OpenAI, vLLM, SGLang, TGI, TEI and others)."""

    url: tuple[str, ...] = ()
    """Base address, such as http://node1:8000/v1. Several servers of the same model take the requests in turn."""
    model: str = ""
    """The model's name as the servers know it."""
    api_key: Annotated[str, Reference] = ""
    """The API key: env:NAME (a variable) or @FILE (a file that holds nothing else). It is never recorded."""
    concurrency: PositiveInt = 16
    """Requests in flight, of each process, to all servers together."""
    requests_per_minute: PositiveFloat | None = None
    """Maximum number of requests per minute, of each process, retries included; none: no limit."""
    timeout_s: PositiveFloat = 300.0
    """Seconds for one complete answer."""
    startup_s: NonNegativeFloat = 0.0
    """Seconds to wait at the start until every server answers, for those that still load their model."""
    retries: NonNegativeInt = 5
    """Further tries of a request after a fault that may pass: 429, 408, 5xx, no or a broken connection, a timeout, an
    answer that is not JSON or lacks what it should hold."""
    backoff_s: NonNegativeFloat = 1.0
    """Seconds before the first retry, doubled for each further one up to a minute, with jitter. A Retry-After of the
    server takes precedence."""
    max_wait_s: NonNegativeFloat = 300.0
    """Maximum Retry-After that is waited for; the request fails if the server asks for more."""
    give_up_after: PositiveInt = 20
    """Failed requests in a row, after all their retries, at which the command stops."""
    input_price: NonNegativeFloat | None = None
    """Price of a million input tokens, for the cost that is reported."""
    output_price: NonNegativeFloat | None = None
    """Price of a million output tokens."""
    cache: Path | None = None
    """Folder of answers by the digest of their request, without key and URL: a request that is in it is not sent.
    Several processes may share it."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """Further fields of every request, as '{reasoning_effort: low, max_completion_tokens: 64}'; the latter replaces
    max_tokens, which some models refuse."""
    batch_size: PositiveInt = 64
    """Texts in one request for embeddings."""
    dimensions: PositiveInt | None = None
    """Length of the embeddings, where the model lets a client choose."""
    proxy: Literal["none", "env"] = "none"
    """`env`: send requests through the proxies in HTTP_PROXY and HTTPS_PROXY, except to the hosts in NO_PROXY."""

    @field_validator("url")
    @classmethod
    def _bases(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(base_url(url) for url in urls))

    @field_validator("api_key")
    @classmethod
    def _reference(cls, value: str) -> str:
        if value and not is_reference(value):
            raise ValueError("should be env:NAME or @FILE, not the key itself")
        return value

    @property
    def key(self) -> str:
        """The API key; empty for none. Raises ConfigError where its variable or file is missing."""
        return reveal_key(self.api_key, "the API key") if self.api_key else ""

    @property
    def identity(self) -> dict[str, Any]:
        """What an answer depends on besides its request: for digests of results."""
        return {"model": self.model, "extra": self.extra, "dimensions": self.dimensions}


def require_endpoint(settings: EndpointSettings, flag: str) -> None:
    """Raises ConfigError for settings without an address or a model; `flag` is what they are called, for messages."""
    missing = [f"{flag}.{name}" for name in ("url", "model") if not getattr(settings, name)]
    if missing:
        raise ConfigError(f"missing {' and '.join(missing)}: the address of a server, and the name of its model")


def base_url(text: str) -> str:
    """The address that `/chat/completions` is appended to: of a bare host `/v1`, of a full address its beginning.

    Raises ValueError for what is no address of an HTTP server.
    """
    try:
        parts = urlsplit(text.strip())
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number, or too large
        valid = False
    if not valid:
        raise ValueError("should be the address of a server, such as http://node1:8000/v1")
    path = _PATHS.sub("", parts.path).rstrip("/") or "/v1"
    return parts._replace(path=path, fragment="").geturl()
