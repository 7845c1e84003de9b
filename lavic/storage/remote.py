"""Options of fsspec for a URI, and the errors of object stores."""

from __future__ import annotations

import sys
from typing import Any


def options(address: str) -> dict[str, Any]:
    """Keyword arguments for fsspec: no cached listings, since other processes write to the same store."""
    return {"use_listings_cache": False} if "://" in address and "::" not in address else {}


def storage_errors(*more: type[Exception]) -> tuple[type[Exception], ...]:
    """The exceptions of reading and writing a path: OSError, those of the object store's client, and `more`."""
    client = sys.modules.get("botocore.exceptions")
    return (OSError, *((client.BotoCoreError, client.ClientError) if client else ()), *more)
