"""Predictions as arrays: which ranks hold a target, and the rules for ties and for conversations without an answer.

**Ties.** Items with equal scores have no order: every metric is its expectation over all orders of the tied items. A
model that gives each candidate the same score thus gets what a random order gets, wherever the target stands in the
list.

**No answer.** A conversation without a ranking (an empty list, a text without an ID, a row that a file lacks) is a miss
in every metric and stays in the denominator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The output of a model for one conversation."""

    targets: tuple[str, ...]
    """The relevant items. Repeated ids count once, but in `recall_micro`."""
    candidates: tuple[str, ...]
    """The list that was ranked."""
    ranking: tuple[str, ...]
    """Item ids, best first: the whole list, or one id or none for generated text."""
    scores: tuple[float, ...] = ()
    """The score of each, highest first; equal scores are ties. Empty: the order has no ties."""
    confidence: float | None = None
    """Probability that the model gives to its first item."""
    answer: tuple[str, ...] | None = None
    """The ID that the released scripts read from the generated text, or none; None where no text was generated."""


@dataclass(frozen=True, kw_only=True)
class Relevance:
    """Predictions as arrays; n conversations, rankings of at most L items."""

    relevance: Floats
    """[..., n, L]: the probability that the item at this rank is a target: 0 or 1 without ties. 0 beyond the end of a
    ranking."""
    reciprocal_rank: Floats
    """[..., n]: expected 1 / rank of the first target; 0 if none is ranked."""
    pair_hits: Floats
    """[..., n]: how often the first item is among the targets, in which an item may repeat; expected, where tied."""
    valid: Floats
    """[n]: the probability that the first item is one of the candidates."""
    valid_answer: Floats
    """[n]: 1 if `Prediction.answer` is one of the candidates, 0 if not; nan where no text was generated."""
    confidence: Floats
    """[n]: of the first item; nan where unknown."""
    num_pairs: NDArray[np.int64]
    """[n]: targets of the conversation with their repeats."""
    num_targets: NDArray[np.int64]
    """[n]: distinct targets of the conversation."""
    num_listed: NDArray[np.int64]
    """[n]: those of them that are in the list."""


def judge(predictions: Sequence[Prediction]) -> Relevance:
    """Marks each ranked item as relevant or not; takes one prediction per conversation.

    Raises:
        ValueError: There are no predictions, one has no targets, or scores do not fall along a ranking.
    """
    if not predictions:
        raise ValueError("there is no prediction to score")
    count = len(predictions)
    length = max(1, max(max(len(set(p.candidates)), len(set(p.ranking))) for p in predictions))
    relevance = np.zeros((count, length))
    reciprocal_rank, pair_hits, valid = np.zeros(count), np.zeros(count), np.zeros(count)
    valid_answer, confidence = np.full(count, np.nan), np.full(count, np.nan)
    counts = np.zeros((3, count), dtype=np.int64)
    for row, prediction in enumerate(predictions):
        targets, candidates = set(prediction.targets), set(prediction.candidates)
        if not targets:
            raise ValueError(f"prediction {row} has no targets and cannot be scored")
        counts[:, row] = len(targets), len(targets & candidates), len(prediction.targets)
        if prediction.answer is not None:
            valid_answer[row] = float(any(item in candidates for item in prediction.answer))
        if prediction.confidence is not None:
            confidence[row] = prediction.confidence
        start = 0
        for number, group in enumerate(_tied_groups(prediction, row)):
            end, hits = start + len(group), len(targets.intersection(group))
            if number == 0:
                valid[row] = len(candidates.intersection(group)) / len(group)
                pair_hits[row] = sum(target in group for target in prediction.targets) / len(group)
            if hits:
                relevance[row, start:end] = hits / len(group)
                if not reciprocal_rank[row]:
                    reciprocal_rank[row] = expected_reciprocal_rank(start, len(group), hits)
            start = end
    return Relevance(
        relevance=relevance,
        reciprocal_rank=reciprocal_rank,
        pair_hits=pair_hits,
        valid=valid,
        valid_answer=valid_answer,
        confidence=confidence,
        num_targets=counts[0],
        num_listed=counts[1],
        num_pairs=counts[2],
    )


def _tied_groups(prediction: Prediction, row: int) -> list[list[str]]:
    """The ranking as groups of equal score, best first; a repeated id counts where it comes first."""
    ranking, scores = prediction.ranking, prediction.scores
    if not scores:
        return [[item] for item in dict.fromkeys(ranking)]
    pairs = list(zip(ranking, scores, strict=True))
    # A nan, which no comparison holds for, is refused too.
    if not all(score >= after for (_, score), (_, after) in pairwise(pairs)):
        raise ValueError(f"prediction {row}: the scores of a ranking must be numbers that do not rise")
    ranked: set[str] = set()
    groups: list[list[str]] = []
    for _, tied in groupby(pairs, key=lambda pair: pair[1]):
        group = [item for item in dict.fromkeys(item for item, _ in tied) if item not in ranked]
        ranked.update(group)
        if group:
            groups.append(group)
    return groups


def expected_reciprocal_rank(start: int, size: int, hits: int) -> float:
    """Expected 1 / rank of the first target, `hits` targets among `size` tied items behind `start` other items.

    The first target has place j of the tied items with probability C(size - j, hits - 1) / C(size, hits). 0 for no
    hits.
    """
    if not hits:
        return 0.0
    orders = math.comb(size, hits)
    return sum(math.comb(size - j, hits - 1) / orders / (start + j) for j in range(1, size - hits + 2))
