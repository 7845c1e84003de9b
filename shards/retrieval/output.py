"""What `lavic retrieve` writes: conversations with lists, counts, recall."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lavic.data.schema import Conversation
from lavic.metrics.bootstrap import Interval
from lavic.recommend.retrieval import Hits
from lavic.storage.atomic import atomic_open, to_utf8


def scores_key(key: str) -> str:
    """The key of a list's scores: `candidates_fused` -> `scores_fused`."""
    return f"scores{key.removeprefix('candidates')}"


def write_conversations(path: Path, rows: Sequence[Mapping[str, Any]], lists: Sequence[Hits], key: str) -> None:
    """Writes the rows of a conversation file with a list in each: ids under `key`, their scores beside it."""
    with atomic_open(path) as file:
        for row, hits in zip(rows, lists, strict=True):
            scores = [round(score, 6) for score in hits.scores]
            line = {**row, key: hits.ids, scores_key(key): scores}
            file.write(to_utf8(json.dumps(line, ensure_ascii=False)) + b"\n")


def falling(scores: Sequence[float]) -> list[float]:
    """Strictly falling scores of a sorted list: of equal ones each is a little lower than the one before."""
    result: list[float] = []
    for score in scores:
        result.append(min(score, math.nextafter(result[-1], -math.inf)) if result else score)
    return result


def count_targets(
    conversations: Sequence[Conversation],
    in_index: Mapping[str, bool],
    in_store: Mapping[str, bool] | None,
    excluded: Sequence[frozenset[str]],
) -> dict[str, int]:
    """Counts what a list cannot have, by reason.

    `in_index` and `in_store` (None without a store) tell whether they have a target. `excluded` are the ids that each
    conversation's list must not have.
    """
    counts: Counter[str] = Counter()
    for conversation, left_out in zip(conversations, excluded, strict=True):
        counts["conversations"] += 1
        counts["without_target"] += not conversation.targets
        counts["mentioned_items"] += len(left_out)
        for id in dict.fromkeys(conversation.targets):
            counts["targets"] += 1
            if not in_index[id]:
                reason = "unavailable" if in_store is not None and not in_store[id] else "unknown"
                counts[f"targets_{reason}"] += 1
            elif id in left_out:
                counts["targets_mentioned"] += 1
    return {reason: count for reason, count in counts.items() if count}


def recall_table(sets: Mapping[str, Mapping[str, Mapping[str, Interval]]]) -> str:
    """Recall with its interval, a line for each set and method."""
    lines = []
    for name, methods in sets.items():
        if not methods:
            lines.append(f"{name}: no conversation has a target")
            continue
        cutoffs = list(next(iter(methods.values())))
        width = max(map(len, ("method", *methods)))
        header = "".join(f"{cutoff.replace('recall_at_', 'recall@'):>24}" for cutoff in cutoffs)
        lines.append(f"{name}\n  {'method':<{width}}{header}")
        for method, intervals in methods.items():
            cells = (f"{v.value:.3f} [{v.low:.3f}, {v.high:.3f}]" for v in intervals.values())
            lines.append(f"  {method:<{width}}" + "".join(f"{cell:>24}" for cell in cells))
    return "\n".join(lines)
