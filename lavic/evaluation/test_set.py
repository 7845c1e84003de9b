"""A trial: test conversations with the lists to rank, what was left out of them, and who depends on whom."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from lavic.data.conversations import read_conversations
from lavic.data.schema import Conversation
from lavic.errors import DataError
from lavic.metrics.ranking_metrics import Answer
from lavic.metrics.statistics import connect

if TYPE_CHECKING:
    from lavic.model.item_store import ItemStore

Clusters = Literal["both", "submission", "target", "none"]
"""Which conversations are resampled together: those with a submission or a target in common (both), with a submission,
with a target, or each for itself."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One test file, ready to rank."""

    name: str
    file: Path
    sha256: str
    """Of the file."""
    conversations: tuple[Conversation, ...]
    """Those that have a target."""
    lists: tuple[tuple[str, ...], ...]
    """Their candidates, each once, in the file's order."""
    left_out: dict[str, int] = field(default_factory=dict)
    """What was not asked, counted: conversations without a target, candidates that are not in the store, and lists
    without any item, which count as wrong answers."""

    @classmethod
    def read(
        cls,
        name: str,
        file: Path,
        *,
        candidates: str,
        stores: Sequence[ItemStore],
        missing: Literal["refuse", "drop"] = "refuse",
        limit: int | None = None,
    ) -> Trial:
        """Reads a conversation file and checks its lists against a store.

        Args:
            name: What results call it.
            file: A jsonl file in the released form.
            candidates: Key of the list, as `candidates_st`.
            stores: Where every candidate must be: in each of them, since all arms rank the same lists.
            missing: What to do with a candidate that is not in a store: refuse the file, or leave it out of its list. A
                target that is left out still counts as a target; but a list that loses others is easier, for every
                arm alike.
            limit: Only the first so many conversations.

        Raises:
            DataError: The file cannot be read or asked, in one line with its place.
        """
        rows = read_conversations(file, candidates=candidates)[:limit]
        asked = tuple(row for row in rows if row.targets)
        if not asked:
            raise DataError(
                f"{file}: none of its {len(rows)} conversations has a target (`gt_items`): nothing to score"
            )
        lists, dropped = [], 0
        for row in asked:
            listed = tuple(dict.fromkeys(row.candidates[candidates]))
            known = tuple(item for item in listed if all(item in store for store in stores))
            if missing == "refuse" and len(known) < len(listed):
                raise DataError(_missing(row, listed, stores))
            dropped += len(listed) - len(known)
            lists.append(known)
        if not any(lists):
            why = " without items that are not in the store" if dropped else ""
            raise DataError(f"{file}: every list `{candidates}` is empty{why}")
        left_out = {"conversations_without_target": len(rows) - len(asked), "candidates_not_in_store": dropped}
        left_out["empty_lists"] = lists.count(())
        return cls(
            name=name,
            file=file,
            sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
            conversations=asked,
            lists=tuple(lists),
            left_out={kind: count for kind, count in left_out.items() if count},
        )

    def __len__(self) -> int:
        return len(self.conversations)

    def answers(self, rankings: Sequence[Sequence[str]]) -> list[Answer]:
        """Rankings (ids, best first, one per conversation) as answers to judge."""
        return [
            Answer(targets=conversation.targets, candidates=listed, ranking=tuple(ids))
            for conversation, listed, ids in zip(self.conversations, self.lists, rankings, strict=True)
        ]

    def clusters(self, by: Clusters = "both") -> NDArray[np.int64]:
        """[n] group number of each conversation, for the bootstrap."""
        keys: list[set[tuple[str, str]]] = []
        for row, conversation in enumerate(self.conversations):
            own: set[tuple[str, str]] = {("row", str(row))}
            if by in ("both", "submission") and conversation.turns:
                own.add(("submission", " ".join(conversation.turns[0].text.lower().split())))
            if by in ("both", "target"):
                own |= {("target", item) for item in conversation.targets}
            keys.append(own)
        return connect(keys)

    def deranged(self, row: int, seed: int) -> dict[str, str]:
        """Candidate -> another candidate of the same list, whose tokens it is shown with; none keeps its own.

        One cycle through the whole list (Sattolo's algorithm), drawn from the seed and the conversation's id alone. A
        list of one candidate cannot be deranged and stays.
        """
        items = list(self.lists[row])
        rng = random.Random(f"{seed}/{self.conversations[row].id}")
        for place in range(len(items) - 1, 0, -1):
            other = rng.randrange(place)
            items[place], items[other] = items[other], items[place]
        return dict(zip(self.lists[row], items, strict=True))


def _missing(row: Conversation, listed: Sequence[str], stores: Sequence[ItemStore]) -> str:
    store, gone = next((store, gone) for store in stores if (gone := [item for item in listed if item not in store]))
    more = f" and {len(gone) - 1} more" if len(gone) > 1 else ""
    return (
        f"{row.place}: candidate {gone[0]}{more} of {len(listed)} is not in the item store "
        f"{store.folder}: embed its photo, or leave such candidates out with --missing drop"
    )
