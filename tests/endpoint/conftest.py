"""A server, clients of it and requests, for each test of the endpoint client."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lavic.endpoint.chat import ChatRequest
from lavic.endpoint.client import Endpoint
from lavic.endpoint.settings import EndpointSettings
from tests.endpoint.openai_server import OpenAiServer, openai_server


def prompt(text: str, **options: Any) -> ChatRequest:
    """A chat request with one text."""
    return ChatRequest(parts=[text], **options)


@pytest.fixture
def server() -> Iterator[OpenAiServer]:
    with openai_server() as running:
        yield running


@pytest.fixture
def connect(server: OpenAiServer) -> Iterator[Callable[..., Endpoint]]:
    """Makes clients of the server, closed at the end of the test."""
    clients: list[Endpoint] = []

    def make(**changed: Any) -> Endpoint:
        settings = {"url": (server.url,), "model": "drawn", "backoff_s": 0.0, "retries": 2, "timeout_s": 30.0}
        clients.append(Endpoint(EndpointSettings(**settings | changed)))
        return clients[-1]

    yield make
    for client in clients:
        client.close()
