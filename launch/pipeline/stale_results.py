"""Results that are rebuilt with other settings: moved to OUT/stale, never overwritten."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

from lavic.launch.pipeline.dag import Layout, Step


def updates_in_place(step: Step, settings: Any, differences: Sequence[str]) -> bool:
    """Whether a step's command can update its stale result: a crawl that retries photos, or extends its set."""
    retries = all(line.startswith(("retry ", "refresh ")) for line in differences)
    return step.stage == "crawl" and bool(settings.extend or retries)


def move_to_stale(step: Step, layout: Layout) -> Path | None:
    """Moves a step's result out of the way of the next one; returns where it is now, None if there was none."""
    if step.stage == "verify":
        step.output.unlink(missing_ok=True)
        return None
    if step.stage != "describe":
        return move_aside(step.output, layout, step.name)
    sidecars = sorted(step.output.glob("*.descriptions.jsonl"))
    if not sidecars:
        return None
    target = _new_folder(layout, step.name)
    target.mkdir(parents=True)
    for path in sidecars:
        path.rename(target / path.name)
    return target


def move_aside(folder: Path, layout: Layout, name: str) -> Path | None:
    """Moves a folder to OUT/stale, under a name with a number; returns where it is now, None if there was none."""
    if not folder.exists():
        return None
    target = _new_folder(layout, name)
    target.parent.mkdir(parents=True, exist_ok=True)
    folder.rename(target)
    return target


def _new_folder(layout: Layout, name: str) -> Path:
    numbered = (layout.stale / f"{name}-{number}" for number in count(1))
    return next(path for path in numbered if not path.exists())
