"""A test set: conversations with the candidate lists to rank, and which conversations depend on each other."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from lavic.data.conversations import read_conversations
from lavic.data.schema import Conversation
from lavic.errors import DataError, first_names
from lavic.evaluation.predictions import prediction
from lavic.metrics.bootstrap import connected_clusters
from lavic.metrics.relevance import Prediction
from lavic.recommend.ranking.ranked_list import RankedList

if TYPE_CHECKING:
    from lavic.model.item_store import ItemStore

ClusterBy = Literal["both", "submission", "target", "none"]
"""Which conversations are resampled together: those that share a submission or a target (both), a submission, a target,
or none."""


@dataclass(frozen=True, kw_only=True)
class TestSet:
    """A test file, ready to rank."""

    __test__ = False  # pytest collects classes by this name

    name: str
    file: Path
    sha256: str
    """Digest of the file."""
    conversations: tuple[Conversation, ...]
    """The file's conversations that have a target."""
    lists: tuple[tuple[str, ...], ...]
    """The candidates of each, without repeats, in the file's order."""
    other_ids: frozenset[str] = frozenset()
    """Ids of the file's conversations that are not here, without a target or behind a limit."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Counts of what is not ranked: conversations without a target, candidates that are not in the store, and empty
    lists, which count as misses."""

    @classmethod
    def read(
        cls,
        name: str,
        file: Path,
        *,
        candidates: str,
        stores: Sequence[ItemStore] = (),
        missing: Literal["refuse", "drop"] = "refuse",
        limit: int | None = None,
        top: int | None = None,
    ) -> TestSet:
        """Reads a conversation file and checks its candidate lists against item stores.

        Args:
            name: Its name in the results.
            file: A jsonl file in the LaViC format.
            candidates: Key of the list, such as `candidates_st`.
            stores: Item stores that must each hold every candidate, since all models rank the same lists; none where no
                arm needs one.
            missing: What to do with a candidate that is not in a store: refuse the file, or drop it from its list. A
                target that is dropped still counts as a target. A list that loses other items becomes easier, for all
                models alike.
            limit: Read only this many conversations.
            top: Rank only the first so many items of each list.

        Raises:
            DataError: The file cannot be read or has nothing to score.
        """
        all_rows = read_conversations(file, candidates=candidates, top=top)
        rows = all_rows[:limit]
        scored = tuple(row for row in rows if row.targets)
        if not scored:
            raise DataError(
                f"{file}: none of its {len(rows)} conversations has a target (`gt_items`): nothing to score"
            )
        lists, dropped = [], 0
        for row in scored:
            listed = tuple(dict.fromkeys(row.candidates[candidates]))
            stored = tuple(item for item in listed if all(item in store for store in stores))
            if missing == "refuse" and len(stored) < len(listed):
                raise DataError(_not_in_store(row, listed, stores))
            dropped += len(listed) - len(stored)
            lists.append(stored)
        if not any(lists):
            condition = " without the items that are not in the store" if dropped else ""
            raise DataError(f"{file}: every list `{candidates}` is empty{condition}")
        left_out = {"conversations_without_target": len(rows) - len(scored), "candidates_not_in_store": dropped}
        left_out["empty_lists"] = lists.count(())
        return cls(
            name=name,
            file=file,
            sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
            conversations=scored,
            lists=tuple(lists),
            other_ids=frozenset(row.id for row in all_rows) - {row.id for row in scored},
            left_out={kind: count for kind, count in left_out.items() if count},
        )

    def __len__(self) -> int:
        return len(self.conversations)

    @cached_property
    def items(self) -> list[str]:
        """The distinct candidates of all lists."""
        return list(dict.fromkeys(item for candidates in self.lists for item in candidates))

    @cached_property
    def digest(self) -> str:
        """Digest of the conversations and their lists, as they are ranked."""
        digest = hashlib.sha256(self.sha256.encode())
        for conversation, candidates in zip(self.conversations, self.lists, strict=True):
            digest.update(json.dumps([conversation.id, candidates]).encode())
        return digest.hexdigest()

    def predictions(self, rankings: Sequence[RankedList | None]) -> list[Prediction]:
        """Predictions from rankings, one per conversation; None, a conversation without a ranking, is a miss."""
        return [
            prediction(conversation.targets, candidates, ranking)
            for conversation, candidates, ranking in zip(self.conversations, self.lists, rankings, strict=True)
        ]

    def clusters(self, by: ClusterBy = "both") -> NDArray[np.int64]:
        """[n] cluster number of each conversation, for the bootstrap."""
        keys: list[set[tuple[str, str]]] = []
        for row, conversation in enumerate(self.conversations):
            row_keys: set[tuple[str, str]] = {("row", str(row))}
            if by in ("both", "submission") and conversation.turns:
                row_keys.add(("submission", " ".join(conversation.turns[0].text.lower().split())))
            if by in ("both", "target"):
                row_keys |= {("target", item) for item in conversation.targets}
            keys.append(row_keys)
        return connected_clusters(keys)

    def derangement(self, row: int, seed: int) -> dict[str, str]:
        """Maps each candidate to another candidate of its list, whose tokens it gets.

        A cycle through the list (Sattolo's algorithm), drawn from the seed and the conversation's id alone. A list of
        one candidate stays as it is.
        """
        items = list(self.lists[row])
        rng = random.Random(f"{seed}/{self.conversations[row].id}")
        for index in range(len(items) - 1, 0, -1):
            other = rng.randrange(index)
            items[index], items[other] = items[other], items[index]
        return dict(zip(self.lists[row], items, strict=True))


def _not_in_store(row: Conversation, candidates: Sequence[str], stores: Sequence[ItemStore]) -> str:
    store, absent = next(
        (store, ids) for store in stores if (ids := [item for item in candidates if item not in store])
    )
    return (
        f"{row.place}: candidate {first_names(absent)} of {len(candidates)} is not in the item store "
        f"{store.folder}: embed its photo, or drop such candidates with --missing drop"
    )
