"""What is measured: every metric as a ratio of two sums over conversations, so that one bootstrap serves them all.

Definitions follow the released LaViC scripts where they have one (`released_recall_at_1`, `valid_ratio`); the others
are the usual information-retrieval forms. No metric here samples negatives: a list is ranked as it was given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LABELS: Mapping[str, str] = {
    "hit_rate": "HitRatio@1",
    "hit_rate_in_list": "HitRatio@1, target in list",
    "released_recall_at_1": "Recall@1 as released",
    "recall_at_3": "Recall@3",
    "recall_at_5": "Recall@5",
    "mrr": "MRR",
    "ndcg_at_5": "NDCG@5",
    "ndcg_at_10": "NDCG@10",
    "valid_ratio": "ValidRatio",
}
"""Names for people, by the keys of `measure`."""

HELP: Mapping[str, str] = {
    "hit_rate": "share of conversations whose first answer is a target",
    "hit_rate_in_list": "the same, over the conversations whose list holds a target: the ranker without the retriever",
    "released_recall_at_1": "right answers / all (conversation, target) pairs, the number the released scripts print",
    "recall_at_3": "share of a conversation's targets among the first 3, averaged over conversations",
    "recall_at_5": "share of a conversation's targets among the first 5, averaged over conversations",
    "mrr": "1 / rank of the first target, 0 where the list holds none",
    "ndcg_at_5": "discounted gain of the first 5 against the best order of all targets",
    "ndcg_at_10": "discounted gain of the first 10 against the best order of all targets",
    "valid_ratio": "share of conversations whose answer is one of the candidates (1 by construction when ranking)",
}
"""One line for each metric."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one arm answered in one conversation."""

    targets: tuple[str, ...]
    """The right items. Repeated ids count once."""
    candidates: tuple[str, ...]
    """The list that was offered."""
    ranking: tuple[str, ...]
    """The answer, best first: the whole list when ranking, one id or none when the model wrote free text."""


@dataclass(frozen=True)
class Terms:
    """A metric before division: `sum(numerator) / sum(denominator)`, one entry per conversation.

    `numerator` may have leading axes (repeated draws): the last one is always the conversations.
    """

    numerator: Floats
    denominator: Floats

    @property
    def value(self) -> float:
        """The metric over all conversations; nan where nothing counts."""
        total = float(self.denominator.sum())
        return float(self.numerator.sum()) / total if total else float("nan")


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Answers as arrays; n conversations, lists of at most L."""

    relevance: NDArray[np.bool_]
    """[..., n, L]: is the item at this rank a target? False beyond the end of a ranking."""
    valid: NDArray[np.bool_]
    """[n]: is the first answer one of the candidates?"""
    targets: NDArray[np.int64]
    """[n]: how many distinct targets the conversation has."""
    reachable: NDArray[np.int64]
    """[n]: how many of them are in the list."""
    offered: NDArray[np.int64]
    """[n]: how many distinct candidates the list has."""


def judge(answers: Sequence[Answer]) -> Judged:
    """Mark every rank of every answer right or wrong.

    Args:
        answers: one per conversation; a conversation without targets is refused, it cannot be scored.

    Raises:
        ValueError: there are no answers, or one has no targets.
    """
    if not answers:
        raise ValueError("there is no answer to judge")
    width = max(1, max(max(len(set(a.candidates)), len(set(a.ranking))) for a in answers))
    relevance = np.zeros((len(answers), width), dtype=bool)
    valid = np.zeros(len(answers), dtype=bool)
    counts = np.zeros((3, len(answers)), dtype=np.int64)
    for row, answer in enumerate(answers):
        targets, candidates = set(answer.targets), set(answer.candidates)
        if not targets:
            raise ValueError(f"answer {row} has no targets: there is nothing to score it against")
        ranking = tuple(dict.fromkeys(answer.ranking))
        relevance[row, : len(ranking)] = [item in targets for item in ranking]
        valid[row] = bool(ranking) and ranking[0] in candidates
        counts[:, row] = len(targets), len(targets & candidates), len(candidates)
    return Judged(relevance=relevance, valid=valid, targets=counts[0], reachable=counts[1], offered=counts[2])


def discounts(width: int) -> Floats:
    """1 / log2(1 + rank) for ranks 1 to `width`."""
    return 1.0 / np.log2(np.arange(2, width + 2, dtype=np.float64))


def ideal_gain(targets: NDArray[np.int64], k: int) -> Floats:
    """[n] discounted gain of the best order: min(k, number of targets) targets on top."""
    cumulative = np.cumsum(discounts(k))
    return cumulative[np.minimum(targets, k) - 1]


def measure(judged: Judged) -> dict[str, Terms]:
    """All metrics of `LABELS`, in that order, as terms that a bootstrap can resample.

    `recall_at_k` and `ndcg_at_k` count targets that are not in the list against the system (they bound what any ranker
    can reach); `hit_rate_in_list` leaves those conversations out.
    """
    relevance = judged.relevance.astype(np.float64)
    width = relevance.shape[-1]
    ones = np.ones(relevance.shape[-2])
    first = relevance[..., 0]
    ranks = np.arange(1, width + 1, dtype=np.float64)
    in_list = (judged.reachable > 0).astype(np.float64)
    valid = np.broadcast_to(judged.valid.astype(np.float64), first.shape)

    def recall(k: int) -> Floats:
        return relevance[..., :k].sum(-1) / judged.targets

    def ndcg(k: int) -> Floats:
        gain = relevance[..., :k] @ discounts(min(k, width))
        return gain / ideal_gain(judged.targets, k)

    return {
        "hit_rate": Terms(first, ones),
        "hit_rate_in_list": Terms(first * in_list, in_list),
        "released_recall_at_1": Terms(first, judged.targets.astype(np.float64)),
        "recall_at_3": Terms(recall(3), ones),
        "recall_at_5": Terms(recall(5), ones),
        "mrr": Terms((relevance / ranks).max(-1), ones),
        "ndcg_at_5": Terms(ndcg(5), ones),
        "ndcg_at_10": Terms(ndcg(10), ones),
        "valid_ratio": Terms(valid, ones),
    }


def ceiling(judged: Judged) -> Terms:
    """Share of conversations whose list holds a target: the best `hit_rate` any ranker of these lists can reach."""
    return Terms((judged.reachable > 0).astype(np.float64), np.ones(len(judged.reachable)))
