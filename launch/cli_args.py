"""Values as the words of a command line: lists of them, never text for a shell to take apart."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def typed(values: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """The words that set `values`: nested mappings as `--loop.steps 5`, lists as `--items a b`, `--flag`, `--no-flag`.

    Which keys there are is the command's to say: an unknown one is found when it reads these words.
    """
    for key, value in values.items():
        name = f"{above}{str(key).replace('_', '-')}"
        if isinstance(value, Mapping):
            yield from typed(value, f"{name}.")
        elif isinstance(value, bool):
            head, _, last = name.rpartition(".")
            yield "--" + ".".join(part for part in (head, last if value else f"no-{last}") if part)
        elif isinstance(value, (list, tuple)):
            yield f"--{name}"
            yield from map(_word, value)
        else:
            yield f"--{name}"
            yield _word(value)


def absolute(path: Path) -> Path:
    """A path that means the same from any folder; symbolic links stay, since nodes may resolve them otherwise."""
    return path.expanduser().absolute()


def absolute_pattern(item: str) -> str:
    """A catalogue file or glob as a path that means the same from any folder; addresses (`s3://`) stay."""
    return item if "://" in item else str(absolute(Path(item)))


def _word(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (dict, list, tuple)) else str(value)
