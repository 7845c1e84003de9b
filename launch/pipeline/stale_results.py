"""Results that are to be made again with other settings: moved to OUT/stale, where nothing is overwritten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from lavic.launch.pipeline.dag import Layout, Step


def goes_on(step: Step, known: Mapping[str, Any], differ: Sequence[str]) -> bool:
    """Whether a step's command changes the result that is there: a crawl that tries photos again, or takes more in.

    Args:
        step: A step whose result differs.
        known: Its settings.
        differ: In what.
    """
    again = all(why.startswith(("retry ", "refresh ")) for why in differ)
    return step.stage == "crawl" and bool(known.get("extend") or again)


def set_aside(step: Step, at: Layout) -> Path | None:
    """Moves what there is of a step's result out of the way of the next one.

    Args:
        step: To be made again.
        at: The pipeline's folders.

    Returns:
        Where it is now; None where there was nothing.
    """
    if step.stage == "verify":
        step.place.unlink(missing_ok=True)
        return None
    old = sorted(step.place.glob("*.descriptions.jsonl")) if step.stage == "describe" else [step.place]
    old = [path for path in old if path.exists()]
    if not old:
        return None
    numbered = (at.stale / f"{step.name}-{number}" for number in count(1))
    home = next(path for path in numbered if not path.exists())
    if step.stage == "describe":
        home.mkdir(parents=True)
        for path in old:
            path.rename(home / path.name)
    else:
        home.parent.mkdir(parents=True, exist_ok=True)
        step.place.rename(home)
    return home
