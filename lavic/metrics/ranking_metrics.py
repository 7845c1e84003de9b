"""Ranking metrics, and their exact expectation for a random order.

A metric is a ratio of two sums over conversations, so that one bootstrap serves all of them. `released_recall_at_1` and
`valid_ratio` are defined as in the released LaViC scripts, the others as usual in information retrieval. No metric
samples negatives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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
"""Display names, by the keys of `compute_metrics`."""

HELP: Mapping[str, str] = {
    "hit_rate": "share of conversations whose first item is a target",
    "hit_rate_in_list": "HitRatio@1 over the conversations whose list contains a target: the ranker without the "
    "retriever",
    "released_recall_at_1": "hits / all (conversation, target) pairs, as the released scripts compute it",
    "recall_at_3": "share of a conversation's targets in the top 3, averaged over conversations",
    "recall_at_5": "share of a conversation's targets in the top 5, averaged over conversations",
    "mrr": "mean of 1 / rank of the first target; 0 if the list contains none",
    "ndcg_at_5": "discounted cumulative gain of the top 5, relative to the best order of all targets",
    "ndcg_at_10": "discounted cumulative gain of the top 10, relative to the best order of all targets",
    "valid_ratio": "share of conversations whose first item is one of the candidates (always 1 when ranking)",
}
"""A description of each metric."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The output of a model for one conversation."""

    targets: tuple[str, ...]
    """The relevant items. Repeated ids count once."""
    candidates: tuple[str, ...]
    """The list that was ranked."""
    ranking: tuple[str, ...]
    """Item ids, best first: the whole list, or one id or none for generated text."""


@dataclass(frozen=True)
class Ratio:
    """A metric before division: `sum(numerator) / sum(denominator)`, [n] each, one entry per conversation.

    `numerator` may have leading axes (repeated draws): [..., n].
    """

    numerator: Floats
    denominator: Floats

    @property
    def value(self) -> float:
        """The metric over all conversations; nan where the denominator is 0."""
        total = float(self.denominator.sum())
        return float(self.numerator.sum()) / total if total else float("nan")


@dataclass(frozen=True, kw_only=True)
class Relevance:
    """Predictions as arrays; n conversations, lists of at most L."""

    relevance: NDArray[np.bool_]
    """[..., n, L]: whether the item at this rank is a target. False beyond the end of a ranking."""
    valid: NDArray[np.bool_]
    """[n]: whether the first item is one of the candidates."""
    num_targets: NDArray[np.int64]
    """[n]: distinct targets of the conversation."""
    num_listed: NDArray[np.int64]
    """[n]: those of them that are in the list."""
    num_candidates: NDArray[np.int64]
    """[n]: distinct candidates of the list."""


def judge(predictions: Sequence[Prediction]) -> Relevance:
    """Marks each ranked item as relevant or not.

    Args:
        predictions: One per conversation.

    Raises:
        ValueError: There are no predictions, or one has no targets.
    """
    if not predictions:
        raise ValueError("there is no prediction to score")
    length = max(1, max(max(len(set(p.candidates)), len(set(p.ranking))) for p in predictions))
    relevance = np.zeros((len(predictions), length), dtype=bool)
    valid = np.zeros(len(predictions), dtype=bool)
    counts = np.zeros((3, len(predictions)), dtype=np.int64)
    for row, prediction in enumerate(predictions):
        targets, candidates = set(prediction.targets), set(prediction.candidates)
        if not targets:
            raise ValueError(f"prediction {row} has no targets and cannot be scored")
        ranking = tuple(dict.fromkeys(prediction.ranking))
        relevance[row, : len(ranking)] = [item in targets for item in ranking]
        valid[row] = bool(ranking) and ranking[0] in candidates
        counts[:, row] = len(targets), len(targets & candidates), len(candidates)
    return Relevance(
        relevance=relevance, valid=valid, num_targets=counts[0], num_listed=counts[1], num_candidates=counts[2]
    )


def compute_metrics(judged: Relevance) -> dict[str, Ratio]:
    """All metrics of `LABELS`, in that order.

    `recall_at_k` and `ndcg_at_k` count targets that are not in the list as misses; `hit_rate_in_list` leaves
    conversations without a listed target out.
    """
    relevance = judged.relevance.astype(np.float64)
    length = relevance.shape[-1]
    first = relevance[..., 0]
    ranks = np.arange(1, length + 1, dtype=np.float64)
    return _ratios(
        judged,
        first=first,
        recall=lambda k: relevance[..., :k].sum(-1) / judged.num_targets,
        mrr=(relevance / ranks).max(-1),
        gain=lambda k: relevance[..., :k] @ _discounts(min(k, length)),
        valid=np.broadcast_to(judged.valid.astype(np.float64), first.shape),
    )


def expected_random(judged: Relevance) -> dict[str, Ratio]:
    """The exact expectation of every metric for a random order of each list.

    With n candidates of which m are targets, the first is a target with probability m / n, each rank is equally likely
    to hold a target, and the first target has rank j with probability C(n - j, m - 1) / C(n, m).
    """
    n = np.maximum(judged.num_candidates, 1).astype(np.float64)
    share = judged.num_listed / n

    def gain(k: int) -> Floats:
        cumulative = np.concatenate([[0.0], np.cumsum(_discounts(k))])
        return share * cumulative[np.minimum(k, judged.num_candidates)]

    def reciprocal_rank(n: int, m: int) -> float:
        if not m:
            return 0.0
        return sum(math.comb(n - j, m - 1) / math.comb(n, m) / j for j in range(1, n - m + 2))

    pairs = zip(judged.num_candidates.tolist(), judged.num_listed.tolist(), strict=True)
    return _ratios(
        judged,
        first=share,
        recall=lambda k: share * np.minimum(k, n) / judged.num_targets,
        mrr=np.array([reciprocal_rank(*pair) for pair in pairs]),
        gain=gain,
        valid=(judged.num_candidates > 0).astype(np.float64),
    )


def _ratios(
    judged: Relevance,
    *,
    first: Floats,
    recall: Callable[[int], Floats],
    mrr: Floats,
    gain: Callable[[int], Floats],
    valid: Floats,
) -> dict[str, Ratio]:
    """The metrics of `LABELS` from their numerators: whether the first item is a target, recall at k, and so on."""
    ones = np.ones(len(judged.num_targets))
    listed = (judged.num_listed > 0).astype(np.float64)

    def ndcg(k: int) -> Floats:
        best = np.cumsum(_discounts(k))[np.minimum(judged.num_targets, k) - 1]
        return gain(k) / best

    return {
        "hit_rate": Ratio(first, ones),
        "hit_rate_in_list": Ratio(first * listed, listed),
        "released_recall_at_1": Ratio(first, judged.num_targets.astype(np.float64)),
        "recall_at_3": Ratio(recall(3), ones),
        "recall_at_5": Ratio(recall(5), ones),
        "mrr": Ratio(mrr, ones),
        "ndcg_at_5": Ratio(ndcg(5), ones),
        "ndcg_at_10": Ratio(ndcg(10), ones),
        "valid_ratio": Ratio(valid, ones),
    }


def _discounts(length: int) -> Floats:
    """1 / log2(1 + rank) for ranks 1 to `length`."""
    return 1.0 / np.log2(np.arange(2, length + 2, dtype=np.float64))


def oracle_hit_rate(judged: Relevance) -> Ratio:
    """Share of conversations whose list contains a target: the upper bound of `hit_rate` on these lists."""
    return Ratio((judged.num_listed > 0).astype(np.float64), np.ones(len(judged.num_listed)))
