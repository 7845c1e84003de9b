"""Texts to vectors by an OpenAI-compatible server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lavic.endpoint.client import Endpoint
from lavic.endpoint.settings import EndpointSettings
from lavic.recommend.retrieval.query import shorten


def endpoint_settings(chosen: EndpointSettings, max_characters: int) -> dict[str, Any]:
    """What the vectors depend on, as an index records it: the model, not where it is served."""
    return {**chosen.identity, "max_characters": max_characters}


class EndpointEncoder:
    """A model behind servers. Answers are cached where the settings name a folder for them.

    Args:
        chosen: Which servers and which model.
        max_characters: Longest text that is sent: servers refuse longer ones, or cut them at their end.

    Raises:
        ConfigError: A setting is missing.
    """

    def __init__(self, chosen: EndpointSettings, max_characters: int) -> None:
        self.endpoint = Endpoint(chosen)
        self._limit = max_characters

    def documents(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of items' texts: float32 [n, d]."""
        return self.endpoint.embed([text[: self._limit] for text in texts])

    def queries(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of queries (see `query_text`), of which each keeps its last turn: float32 [n, d]."""
        return self.endpoint.embed([shorten(text, self._limit, _cut) for text in texts])

    def close(self) -> None:
        """Closes the connections."""
        self.endpoint.close()


def _cut(text: str, limit: int, middle: bool) -> tuple[str, int]:
    """See `shorten`, counted in characters."""
    if len(text) <= limit:
        return text, len(text) + 1
    head = limit // 2 if middle else limit
    return text[:head] + text[len(text) - (limit - head) :], limit
