"""Whether lists from the synthetic catalogue have the look that a conversation asks for.

Many synthetic items look alike: no search can distinguish them. look@k counts a list as right if one of its first k
items has the kind, colour and pattern of the target.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from lavic.errors import DataError

CUTS = (1, 10)
"""Lengths of lists at which looks are counted."""

Look = tuple[str, str, str]
"""Colour, pattern, kind."""

_DESCRIPTION = re.compile(r"The photo shows a (\w+) (\w+) (\w+)\.")


def read_looks(catalogue: Path) -> dict[str, Look]:
    """The look of every item, by id, of a folder of `lavic mini catalog`.

    Raises:
        DataError: It is not such a folder.
    """
    try:
        meta = json.loads((catalogue / "item2meta_train.json").read_text("utf-8"))
        texts = {id: text for id, row in meta.items() for text in row["image_descriptions_llava_cleaned"].values()}
        for line in (catalogue / "item2meta_valid.jsonl").read_text("utf-8").splitlines():
            row = json.loads(line)
            texts[row["image_name"].rpartition("_")[0]] = row["image_description_llava_cleaned"]
        looks = {id: match.groups() for id, text in texts.items() if (match := _DESCRIPTION.fullmatch(text))}
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise DataError(f"{catalogue}: not a synthetic catalogue ({error})") from None
    if len(looks) < len(meta):
        raise DataError(f"{catalogue}: {len(meta) - len(looks)} items lack the description of a synthetic item")
    return looks  # type: ignore[return-value]


def look_recall(
    lists: Sequence[Sequence[str]], targets: Sequence[str], looks: Mapping[str, Look], cutoffs: Sequence[int] = CUTS
) -> dict[str, float]:
    """The share of lists (ids, best first) with the look of the target among their first k items: `look_at_<k>`."""
    return {
        f"look_at_{cutoff}": sum(
            any(looks[id] == looks[target] for id in ids[:cutoff]) for ids, target in zip(lists, targets, strict=True)
        )
        / len(targets)
        for cutoff in cutoffs
    }


def chance(targets: Sequence[str], looks: Mapping[str, Look], cutoffs: Sequence[int] = CUTS) -> dict[str, float]:
    """look@k of random lists of the right kind, which titles name; `looks` has all items of the catalogue."""
    by_kind, by_look = Counter(look[2] for look in looks.values()), Counter(looks.values())

    def missed(target: str, cutoff: int) -> float:
        """The probability that none of `cut` items of the kind has the look."""
        num_of_kind, num_of_look = by_kind[looks[target][2]], by_look[looks[target]]
        return (
            math.comb(num_of_kind - num_of_look, cutoff) / math.comb(num_of_kind, cutoff)
            if cutoff <= num_of_kind
            else 0.0
        )

    return {
        f"look_at_{cutoff}": 1 - sum(missed(target, cutoff) for target in targets) / len(targets) for cutoff in cutoffs
    }
