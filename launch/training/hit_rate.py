"""HitRatio@1 on validation lists, by the model in training: what stage 2 is for, beside its loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lavic.data.schema import Conversation
from lavic.distributed.context import DistributedContext

if TYPE_CHECKING:
    from lavic.recommend.ranking.ranked_list import RankedList
    from lavic.recommend.ranking.ranker import Ranker

HIT_RATE = "hit_rate"
"""Name of the score."""

GROUP = 8
"""Lists that a rank ranks together. Groups are the same for any number of ranks: the composition of a batch changes the
last digits of probabilities, and with them the order of near-ties."""


@dataclass(frozen=True)
class HitRateScorer:
    """Ranks the same validation lists each time; a `lavic.train.evaluation.Scorer`."""

    ranker: Ranker
    """Ranks with the model in training and the item store."""
    conversations: Sequence[Conversation]
    """Each list holds a target, see `listed_subset`."""
    candidates: str
    """Key of the lists."""
    world: DistributedContext
    """The ranks; each ranks every size-th group."""

    def __call__(self, check_stop: Callable[[], None]) -> Mapping[str, float]:
        """The hit rate; on all ranks."""
        from lavic.recommend.ranking.request import Request

        world = self.world
        starts = range(0, len(self.conversations), GROUP)
        hits: dict[int, float] = {}
        for first in range(0, len(starts), world.size):
            check_stop()
            if first + world.rank >= len(starts):  # it has called check_stop as often as the others
                continue
            start = starts[first + world.rank]
            group = self.conversations[start : start + GROUP]
            requests = [Request(conversation=c, candidates=c.candidates[self.candidates]) for c in group]
            for row, ranking in enumerate(self.ranker.rank(requests)):
                hits[start + row] = expected_hit(ranking, group[row].targets)
        # summed in the order of lists: on any number of ranks the same number to the last digit
        hit_by_row = {row: hit for hits_of_rank in world.all_gather_object(hits) for row, hit in hits_of_rank.items()}
        return {HIT_RATE: math.fsum(hit_by_row.values()) / len(hit_by_row)}


def expected_hit(ranking: RankedList, targets: Sequence[str]) -> float:
    """1 where the first item is a target, 0 where it is not; of a tie for first place the share of targets in it."""
    tied = [item for item, value in zip(ranking.ids, ranking.logprobs, strict=True) if value == ranking.logprobs[0]]
    return len(set(tied) & set(targets)) / len(tied)


def listed_subset(conversations: Sequence[Conversation], candidates: str, count: int) -> list[Conversation]:
    """Conversations whose list holds a target, at most `count`, evenly spread over the file.

    A list without a target can only be missed, by every model: it would cost time and tell nothing.
    """
    answerable = [c for c in conversations if set(c.candidates[candidates]) & set(c.targets)]
    count = min(count, len(answerable))
    return [answerable[number * len(answerable) // count] for number in range(count)]
