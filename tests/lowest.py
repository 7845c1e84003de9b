"""Prints the lowest release of each direct requirement that setup.py allows: `python tests/lowest.py crawl`."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from unittest import mock

import setuptools

_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+(?:\[[^\]]*\])?)\s*>=\s*([^,;\s]+)[^;]*(;.*)?")


def lowest(*extras: str) -> list[str]:
    """Pinned requirements of the package and of some extras, one per package."""
    script = Path(__file__).parents[1] / "setup.py"
    with mock.patch.object(setuptools, "setup") as setup:
        exec(compile(script.read_text("utf-8"), str(script), "exec"), {"__file__": str(script)})
    given = setup.call_args.kwargs
    lines = [*given["install_requires"], *(line for extra in extras for line in given["extras_require"][extra])]
    matches = [_REQUIREMENT.match(line) for line in lines]
    if wrong := [line for line, match in zip(lines, matches, strict=True) if match is None]:
        raise SystemExit(f"{script}: no lower bound: {', '.join(wrong)}")
    return sorted({f"{match[1]}=={match[2]}{match[3] or ''}" for match in matches if match})


if __name__ == "__main__":
    print("\n".join(lowest(*sys.argv[1:])))
