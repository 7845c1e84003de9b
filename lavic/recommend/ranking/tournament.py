"""Ranking of a list that is longer than those a model was tuned on: in groups, then the winners of the groups.

The items are assigned round-robin to groups of at most the size that the model knows. If the groups are few, the top
items of each, as many as fit, are re-ranked in one final group. If they are too many for that, the first of each group
advances, and these winners are assigned to groups again. Eliminated candidates are placed by Luce's choice axiom (Luce
1959): the ratio of two candidates' probabilities is taken to be the same in every list, so one that was half as
probable as its group's winners is half as probable as they are in the end. The result is one distribution over the
whole list. n candidates in groups of m take about n / (m - 1) prompts instead of one that is too long.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lavic.recommend.ranking.ranked_list import RankedList


@dataclass(frozen=True)
class _Group:
    """One list that was ranked."""

    logprobs: dict[str, float]
    """Candidate -> the model's log-probability, best first."""
    winners: tuple[str, ...]
    """Candidates that advanced; none in the last group."""


class Tournament:
    """One list on its way through the rounds.

    Args:
        ids: The candidates, without repeats.
        size: Maximum number of candidates of a group.
    """

    def __init__(self, ids: Sequence[str], size: int) -> None:
        self.size = size
        self.prompts = 0
        """Groups ranked so far."""
        self.groups: list[tuple[str, ...]] = self._deal(ids) if ids else []
        """The lists to rank next; none when it is over."""
        self._ranked: list[_Group] = []
        self._none: float | None = None

    def advance(self, rankings: Sequence[RankedList]) -> None:
        """Takes the rankings of `groups`, in order, and sets the next groups."""
        last = len(rankings) == 1
        num_winners = 0 if last else max(1, self.size // len(rankings))
        self.prompts += len(rankings)
        for ranking in rankings:
            logprobs = dict(zip(ranking.ids, ranking.logprobs, strict=True))
            self._ranked.append(_Group(logprobs, ranking.ids[:num_winners]))
        self._none = rankings[0].none if last else None
        # The winners in turns too, so that each round deals neighbours to different groups.
        winner_lists = [group.winners for group in self._ranked[-len(rankings) :]]
        best = [ids[rank] for rank in range(num_winners) for ids in winner_lists if rank < len(ids)]
        self.groups = self._deal(best) if best else []

    def halve(self) -> bool:
        """Deals the candidates of `groups` to groups of half the size; False where they cannot be smaller."""
        if self.size <= 2:
            return False
        longest = max(map(len, self.groups))
        ids = [group[rank] for rank in range(longest) for group in self.groups if rank < len(group)]
        self.size = max(2, min(self.size, longest) // 2)
        self.groups = self._deal(ids)
        return True

    @property
    def ranking(self) -> RankedList:
        """The whole list, best first. `logprobs` are of the group that a candidate was last ranked in, `scores` are the
        logarithms of `probabilities`, which may be too small for a float."""
        weights: dict[str, float] = {}
        logprobs: dict[str, float] = {}
        for group in reversed(self._ranked):
            shift = 0.0
            if group.winners:
                winner_weights = [weights[item] for item in group.winners]
                shift = _log_sum(winner_weights) - _log_sum(group.logprobs[item] for item in group.winners)
            for item, logprob in group.logprobs.items():
                if item not in weights:
                    weights[item], logprobs[item] = logprob + shift, logprob
        total = _log_sum(weights.values()) if weights else 0.0
        order = sorted(weights, key=lambda item: -weights[item])  # stable: the last group's candidates come first
        return RankedList(
            ids=tuple(order),
            logprobs=tuple(logprobs[item] for item in order),
            probabilities=tuple(math.exp(weights[item] - total) for item in order),
            scores=tuple(weights[item] - total for item in order),
            none=self._none,
        )

    def _deal(self, ids: Sequence[str]) -> list[tuple[str, ...]]:
        number = -(-len(ids) // self.size)
        return [tuple(ids[first::number]) for first in range(number)]


def _log_sum(values: Iterable[float]) -> float:
    """log(sum(exp(values))), without overflow."""
    values = list(values)
    top = max(values)
    return top + math.log(math.fsum(math.exp(value - top) for value in values))
