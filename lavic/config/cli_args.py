"""Settings as command-line arguments: a list of strings, never text for a shell to parse."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def to_args(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The arguments that set `values`: nested ones as `--loop.steps 5`, lists as `--items a b`, `--flag`, `--no-flag`.

    Keys are not checked here: the command reports an unknown one when it parses the arguments.
    """
    for key, value in values.items():
        name = f"{prefix}{str(key).replace('_', '-')}"
        if isinstance(value, Mapping):
            yield from to_args(value, f"{name}.")
        elif isinstance(value, bool):
            group, _, flag = name.rpartition(".")
            yield "--" + ".".join(part for part in (group, flag if value else f"no-{flag}") if part)
        elif isinstance(value, (list, tuple)):
            yield f"--{name}"
            yield from map(_to_arg, value)
        else:
            yield f"--{name}"
            yield _to_arg(value)


def absolute(path: Path) -> Path:
    """An absolute path. Symbolic links are kept, since another node may resolve them differently."""
    return path.expanduser().absolute()


def absolute_pattern(pattern: str) -> str:
    """A catalogue file or glob as an absolute one; URLs (`s3://`) are returned as they are."""
    return pattern if "://" in pattern else str(absolute(Path(pattern)))


def _to_arg(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (dict, list, tuple)) else str(value)
