"""Settings of `lavic serve`."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator

from lavic.config import ByteCount, Reference, settings
from lavic.config.secrets import reveal
from lavic.errors import ConfigError
from lavic.model.config import BaseModelSettings

_ORIGIN = re.compile(r"https?://[^\s/?#]+")


@settings
class ReplicaSettings:
    """Replicas on Ray Serve."""

    replicas: PositiveInt = 1
    """Replicas at first, and at least."""
    max_replicas: PositiveInt | None = None
    """Replicas at most: more of them as more requests run. Default: as many as `replicas`."""
    target_requests: PositiveInt = 32
    """Requests that run in a replica before another one is started."""
    cpus: NonNegativeFloat = 1.0
    """CPUs of a replica."""
    gpus: NonNegativeFloat = 0.0
    """GPUs of a replica."""
    nodes: PositiveInt = 1
    """Nodes of the cluster to wait for; those of a batch job join one after the other."""
    address: str | None = None
    """A running Ray cluster, as `auto` or HOST:PORT; by default RAY_ADDRESS, else Ray is started on this machine."""


@settings
class ServeSettings:
    """The recommender over HTTP."""

    bundle: Path
    """The bundle that `lavic tune` made: RUN/bundle."""
    store: Path
    """The item store that it was tuned on, from `lavic embed`."""
    index: Path | None = None
    """The retrieval index of the catalogue, from `lavic retrieve`. Without it, requests must name candidates."""
    shards: tuple[str, ...] = ()
    """Sets of shards with the items' photos, from `lavic crawl`. Without them, answers have no photos."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen on; 0: any that is free, which is printed."""
    token: Annotated[str | None, Reference] = None
    """Token that clients must send, as `Authorization: Bearer TOKEN` or as the password that a browser asks for:
    env:NAME or @FILE. Needed on any address but loopback."""
    hosts: tuple[str, ...] = ()
    """Further host names of a server without a token, besides localhost."""
    cors: tuple[str, ...] = ()
    """Origins of other sites whose pages may send requests, such as https://shop.example.org. Default: none."""
    record: Path | None = None
    """Append conversations, likes and dislikes to this file, in the LaViC format, to train with. Default: nothing is
    kept. The page shows this to its users."""
    retrieved: PositiveInt = 50
    """Candidates that are searched for, for a request that names none."""
    methods: tuple[str, ...] = ()
    """Methods of --index to search by. Default: all that take text."""
    weights: tuple[PositiveFloat, ...] = ()
    """Weight of each method's ranks in the fusion, in the order of `methods`; by default all count the same."""
    batch_size: PositiveInt = 64
    """Maximum number of prompts of a batch; a list that is ranked in groups counts as several."""
    batch_ms: Annotated[float, Field(ge=0, le=1000)] = 5.0
    """Maximum time that a request waits for others while the model is idle, milliseconds."""
    queue: PositiveInt = 256
    """Maximum number of requests that wait; further ones are answered with 429."""
    deadline: PositiveFloat = 30.0
    """Seconds after which a request is answered with 503."""
    max_body: ByteCount = Field(default="1MiB", validate_default=True, gt=0)
    """Maximum size of a request's body."""
    body_seconds: PositiveFloat = 10.0
    """Maximum time in which the body of a request arrives."""
    max_characters: PositiveInt = 50_000
    """Maximum number of characters of a conversation."""
    max_turns: PositiveInt = 200
    """Maximum number of turns of a conversation."""
    max_candidates: PositiveInt = 1000
    """Maximum number of candidates of a request."""
    max_k: PositiveInt = 100
    """Maximum number of items of an answer."""
    tokens_per_item: PositiveInt | None = None
    """Number of item tokens per candidate, the first ones; by default as in tuning."""
    model: BaseModelSettings = BaseModelSettings()
    """The base model of --bundle."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the weights. `auto`: bfloat16 on a GPU, float32 on a CPU."""
    ray: bool = False
    """Serve on Ray Serve, in replicas, on one machine or a cluster."""
    scale: ReplicaSettings = ReplicaSettings()
    """Replica settings for --ray."""

    @field_validator("hosts")
    @classmethod
    def _names(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        if not all(map(_is_name, hosts)):
            raise ValueError("should be names such as shop.example.org, without scheme and port")
        return hosts

    @field_validator("cors")
    @classmethod
    def _origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        if not all(origin == "*" or _ORIGIN.fullmatch(origin) for origin in origins):
            raise ValueError("should be origins such as https://shop.example.org, without a path")
        return origins


def _is_name(host: str) -> bool:
    """Whether a text is a host's name, or its address without brackets and port."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return re.fullmatch(r"[^\s/:]+", host) is not None
    return True


def check_settings(chosen: ServeSettings) -> None:
    """Refuses settings that contradict each other.

    Raises:
        ConfigError: The address needs a token, or replicas would write to one file.
    """
    if chosen.ray and chosen.record is not None:
        raise ConfigError("--record: not with --ray, whose replicas would write to one file: serve without --ray")
    if chosen.token is None and not is_loopback(chosen.host):
        raise ConfigError(
            f"--host {chosen.host}: other machines can reach this address: give a token with --token env:NAME or "
            "--token @FILE"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address to listen on."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def read_token(chosen: ServeSettings) -> str | None:
    """The token that the settings refer to; None without one.

    Raises:
        ConfigError: The token itself is on the command line, or it is too short.
    """
    reference = chosen.token
    if reference is None:
        return None
    if not reference.startswith(("env:", "@")):
        raise ConfigError("--token: never the token itself: use --token env:NAME or --token @FILE")
    token = reveal(reference, "--token")
    if len(token) < 16:
        raise ConfigError(f"--token {reference}: shorter than 16 characters; make one with `openssl rand -hex 32`")
    return token
