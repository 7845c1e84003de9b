"""Settings classes, filled from their defaults, yaml files and the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lavic.config.loader import dump, flatten, load, parse, parse_values
    from lavic.config.schema import ByteCount, Positional, Reference, Seed, settings

__all__ = [
    "ByteCount",
    "Positional",
    "Reference",
    "Seed",
    "dump",
    "flatten",
    "load",
    "parse",
    "parse_values",
    "settings",
]


def __getattr__(name: str) -> Any:
    # On demand: `lavic --help` and error messages need `lavic.config.secrets` alone, not pydantic.
    if name in __all__:
        from lavic.config import loader, schema

        return getattr(loader, name, None) or getattr(schema, name)
    raise AttributeError(f"module 'lavic.config' has no attribute {name!r}")
