"""A server for each test of the client."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lavic.endpoint.client import Endpoint
from lavic.endpoint.settings import EndpointSettings
from tests.endpoint.openai_server import OpenAiServer, openai_server


@pytest.fixture
def server() -> Iterator[OpenAiServer]:
    with openai_server() as running:
        yield running


@pytest.fixture
def connect(server: OpenAiServer) -> Iterator[Callable[..., Endpoint]]:
    """Makes clients of the server, which end with the test."""
    clients: list[Endpoint] = []

    def make(**more: Any) -> Endpoint:
        chosen = {"url": (server.url,), "model": "drawn", "backoff_s": 0.0, "retries": 2, "timeout_s": 30.0, **more}
        clients.append(Endpoint(EndpointSettings(**chosen)))
        return clients[-1]

    yield make
    for client in clients:
        client.close()
