"""The answers to the requests of a batch, of which one that fails does not spoil the others'."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from lavic.errors import LavicError
from lavic.recommend.recommendation import CheckedQuery, Recommendation
from lavic.recommend.recommender import Recommender
from lavic.recommend.serving.errors import ApiError, from_lavic_error

log = logging.getLogger(__name__)


def answer_each(
    recommender: Recommender, queries: Sequence[CheckedQuery], wanted: Callable[[int], bool] = lambda row: True
) -> list[Recommendation | ApiError]:
    """The answer, or the error answer, to each query.

    Args:
        recommender: Answers them.
        queries: By its `check`.
        wanted: Whether somebody still waits for a query's answer, by its place.
    """
    try:
        answers = recommender.answer(queries)
    except Exception as error:
        if len(queries) > 1:
            log.warning("a batch of %d requests failed (%s); each is tried by itself", len(queries), error)
            left = ApiError(499, "nobody waits for the answer")
            return [answer_each(recommender, [query])[0] if wanted(row) else left for row, query in enumerate(queries)]
        if isinstance(error, LavicError):
            log.error("a request failed: %s", error)
            return [ApiError(503, "the item store or index cannot be read; the server's log says why")]
        log.exception("a request failed")
        return [ApiError(500, "the server failed; its log says why")]
    return [from_lavic_error(answer) if isinstance(answer, LavicError) else answer for answer in answers]
