"""What fsspec is told about an address, and what reading and writing one may raise."""

from __future__ import annotations

import sys
from typing import Any


def options(address: str) -> dict[str, Any]:
    """What fsspec is told about an address: others write beside us, so a remembered listing would be out of date."""
    return {"use_listings_cache": False} if "://" in address and "::" not in address else {}


def storage_errors(*more: type[Exception]) -> tuple[type[Exception], ...]:
    """What reading and writing a place may raise: OSError, what an object store's client raises beside it, and more."""
    client = sys.modules.get("botocore.exceptions")
    return (OSError, *((client.BotoCoreError, client.ClientError) if client else ()), *more)
