"""A query on its way through retrieval and ranking."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lavic.errors import LavicError
from lavic.recommend.ranking.ranked_list import RankedList
from lavic.recommend.ranking.ranker import Ranker
from lavic.recommend.ranking.request import EncodedRequest, Request
from lavic.recommend.ranking.tournament import Tournament
from lavic.recommend.recommendation import CheckedQuery, Recommendation, RecommendedItem

if TYPE_CHECKING:
    from lavic.model.item_store import ItemStore
    from lavic.recommend.candidates import Scores


_CUT_TITLE = 1000
"""Characters of a title that are shown, at most, where two titles do not fit into a prompt."""


@dataclass
class Job:
    """A query with its candidates, as far as they are ranked."""

    query: CheckedQuery
    tournament: Tournament
    scores: Scores
    max_title: int | None = None
    """See `Request`."""

    def encode(self, ranker: Ranker) -> list[EncodedRequest]:
        """The prompts of its groups. Retrieved candidates whose prompt is too long are ranked in smaller groups, then
        with shorter titles: the client did not choose them."""
        while True:
            try:
                return [
                    ranker.encode(
                        Request(conversation=self.query.conversation, candidates=group, max_title=self.max_title)
                    )
                    for group in self.tournament.groups
                ]
            except LavicError:
                if self.query.candidates is not None:
                    raise
                if self.tournament.halve():
                    continue
                self.max_title = _CUT_TITLE if self.max_title is None else self.max_title // 2
                if not self.max_title:
                    raise

    def result(self, store: ItemStore) -> Recommendation:
        """The answer, when all groups are ranked."""
        ranking: RankedList = self.tournament.ranking
        rows = list(zip(ranking.ids, ranking.probabilities, ranking.logprobs, strict=True))
        items = tuple(
            RecommendedItem(
                id=item,
                title=store.title(item),
                probability=probability,
                logprob=logprob,
                scores={method: scores[item] for method, scores in self.scores.items() if item in scores},
                photo=store.key(item),
            )
            for item, probability, logprob in rows[: self.query.k]
        )
        return Recommendation(items=items, candidates=len(rows), none=ranking.none)
