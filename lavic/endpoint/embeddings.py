"""Requests for embeddings, and their answers."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np

from lavic.endpoint.chat import clean
from lavic.endpoint.faults import Fault
from lavic.endpoint.settings import EndpointSettings

Vector = np.ndarray[Any, np.dtype[np.float32]]


def sent_text(text: str) -> str:
    """A text as it is sent: servers refuse empty ones, which become one space."""
    return clean(text) if text.strip() else " "


def embedding_body(texts: Sequence[str], settings: EndpointSettings) -> dict[str, Any]:
    """The JSON object that is sent."""
    body: dict[str, Any] = {"model": settings.model, "input": list(texts), "encoding_format": "float"}
    if settings.dimensions is not None:
        body["dimensions"] = settings.dimensions
    return body | settings.extra


def parse_embeddings(answer: Any, count: int, dimensions: int | None) -> list[Vector]:
    """The vectors in a server's JSON, in the order of the texts.

    Args:
        answer: Its `data` may be in any order; the `index` of each says which text it is of.
        count: Of the texts.
        dimensions: Their length, where it was chosen.

    Raises:
        Fault: Some are missing, or are not finite, or not of one length.
    """
    try:
        rows = answer["data"]
        indices = [row.get("index", n) for n, row in enumerate(rows)]
        if sorted(indices) != list(range(count)):
            raise Fault("shape", f"answers {len(rows)} embeddings for {count} texts, or not one for each")
        vectors: list[Any] = [None] * count
        for index, row in zip(indices, rows, strict=True):
            vectors[index] = np.asarray(row["embedding"], dtype=np.float32)
    except (LookupError, TypeError, ValueError, AttributeError):
        raise Fault("shape", "answers JSON without a list of embeddings") from None
    length = dimensions or (vectors[0].size if count else 0)
    if any(vector.shape != (length,) or not length for vector in vectors):
        raise Fault("shape", f"answers embeddings that are not of length {length}")
    if not all(np.isfinite(vector).all() for vector in vectors):
        raise Fault("shape", "answers embeddings that hold NaN or infinity")
    return vectors


def pack(vector: Vector) -> dict[str, Any]:
    """A vector as plain values, for the cache."""
    return {"embedding": base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")}


def unpack(cached: dict[str, Any]) -> Vector | None:
    """The vector of `pack`; None where it is damaged."""
    try:
        vector = np.frombuffer(base64.b64decode(cached["embedding"], validate=True), dtype="<f4").astype(np.float32)
    except (LookupError, TypeError, ValueError):
        return None
    return vector if vector.size and np.isfinite(vector).all() else None
