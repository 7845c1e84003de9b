"""Reading and writing files: local or in an object store, compressed or plain, in any encoding."""

from __future__ import annotations


def format_bytes(count: float) -> str:
    """A number of bytes for people, in decimal units: 48.0 kB, 5.66 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.3g} {unit}" if count < 999.5 else f"{count:,.0f} {unit}"
        count /= 1000
    raise AssertionError
