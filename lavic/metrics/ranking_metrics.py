"""Every metric: the formulas, and the rules for ties and for conversations without an answer.

A metric is a ratio of two sums over conversations, so that one bootstrap serves all of them. `recall_micro` and
`valid_ratio_raw` are defined as in the released LaViC scripts, the others as usual in information retrieval. No metric
samples negatives.

**Ties.** Items with equal scores have no order: every metric is its expectation over all orders of the tied items. A
model that gives each candidate the same score thus gets what a random order gets, wherever the target stands in the
list.

**No answer.** A conversation without a ranking (an empty list, a text without an ID, a row that a file lacks) is a miss
in every metric and stays in the denominator.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RECALL_AT = (1, 3, 5, 10)
NDCG_AT = (3, 5, 10)
BINS = 10
"""Bins of equal width of the calibration error."""

LABELS: Mapping[str, str] = {
    "hit_rate": "HitRatio@1",
    "hit_rate_in_list": "HitRatio@1, target in list",
    "recall_micro": "Recall@1, micro",
    **{f"recall_at_{k}": f"Recall@{k}" for k in RECALL_AT},
    "mrr": "MRR",
    **{f"ndcg_at_{k}": f"NDCG@{k}" for k in NDCG_AT},
    "valid_ratio": "ValidRatio",
    "valid_ratio_raw": "ValidRatio, raw",
    "ece": "ECE",
}
"""Display names, by the keys of `compute_metrics`."""

HELP: Mapping[str, str] = {
    "hit_rate": "share of conversations whose first item is a target",
    "hit_rate_in_list": "HitRatio@1 over the conversations whose list contains a target: the ranker without the "
    "retriever",
    "recall_micro": "hits / all (conversation, target) pairs, as the released scripts compute Recall@1; a target that "
    "a row of the file repeats counts as often",
    **{
        f"recall_at_{k}": f"share of a conversation's targets in the top {k}, averaged over conversations"
        for k in RECALL_AT
    },
    "mrr": "mean of 1 / rank of the first target; 0 if the list contains none",
    **{
        f"ndcg_at_{k}": f"discounted cumulative gain of the top {k}, relative to the best order of all targets"
        for k in NDCG_AT
    },
    "valid_ratio": "share of conversations whose first item is one of the candidates; 1 where only the list can be "
    "answered (constrained)",
    "valid_ratio_raw": "share of conversations where the ID that the released scripts read from the generated text is "
    "one of the candidates",
    "ece": f"expected calibration error: the gap between the probability of the first item and its hit rate, averaged "
    f"over {BINS} bins of that probability",
}
"""A description of each metric."""


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


@dataclass(frozen=True)
class Ratio:
    """A metric before division: `sum(numerator) / sum(denominator)`, [n] each, one entry per conversation.

    `numerator` may have leading axes (repeated draws): [..., n].
    """

    numerator: Floats
    denominator: Floats
    bins: NDArray[np.int64] | None = None
    """[n] bin of each conversation. With bins, the absolute sums of the bins are added: `sum_b |sum_b(numerator)|`."""

    @property
    def value(self) -> float:
        """The metric over all conversations; nan where the denominator is 0."""
        total = float(self.denominator.sum())
        if not total:
            return float("nan")
        sums = [float(part.sum()) for part in self.parts]
        return (sum(sums) if self.bins is None else sum(map(abs, sums))) / total

    @property
    def parts(self) -> list[Floats]:
        """The numerator by bin: [n] each, 0 outside the bin."""
        if self.bins is None:
            return [self.numerator]
        return [np.where(self.bins == number, self.numerator, 0.0) for number in np.unique(self.bins)]


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
    num_candidates: NDArray[np.int64]
    """[n]: distinct candidates of the list."""


def judge(predictions: Sequence[Prediction]) -> Relevance:
    """Marks each ranked item as relevant or not.

    Args:
        predictions: One per conversation.

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
    counts = np.zeros((4, count), dtype=np.int64)
    for row, prediction in enumerate(predictions):
        targets, candidates = set(prediction.targets), set(prediction.candidates)
        if not targets:
            raise ValueError(f"prediction {row} has no targets and cannot be scored")
        counts[:, row] = len(targets), len(targets & candidates), len(candidates), len(prediction.targets)
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
        num_candidates=counts[2],
        num_pairs=counts[3],
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
    seen: set[str] = set()
    groups: list[list[str]] = []
    for _, tied in groupby(pairs, key=lambda pair: pair[1]):
        group = [item for item in dict.fromkeys(item for item, _ in tied) if item not in seen]
        seen.update(group)
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


def compute_metrics(judged: Relevance) -> dict[str, Ratio]:
    """The metrics of `LABELS`, in that order; those of generated text or of probabilities only where there are any.

    `recall_at_k` and `ndcg_at_k` count targets that are not in the list as misses; `hit_rate_in_list` leaves
    conversations without a listed target out.
    """
    relevance, targets = judged.relevance, judged.num_targets
    length = relevance.shape[-1]
    first = relevance[..., 0]
    ones = np.ones(len(targets))
    listed = (judged.num_listed > 0).astype(np.float64)

    def ndcg(k: int) -> Floats:
        best = np.cumsum(_discounts(k))[np.minimum(targets, k) - 1]
        return (relevance[..., :k] @ _discounts(min(k, length))) / best

    metrics = {
        "hit_rate": Ratio(first, ones),
        "hit_rate_in_list": Ratio(first * listed, listed),
        "recall_micro": Ratio(judged.pair_hits, judged.num_pairs.astype(np.float64)),
        **{f"recall_at_{k}": Ratio(relevance[..., :k].sum(-1) / targets, ones) for k in RECALL_AT},
        "mrr": Ratio(judged.reciprocal_rank, ones),
        **{f"ndcg_at_{k}": Ratio(ndcg(k), ones) for k in NDCG_AT},
        "valid_ratio": Ratio(np.broadcast_to(judged.valid, first.shape), ones),
    }
    generated, rated = ~np.isnan(judged.valid_answer), ~np.isnan(judged.confidence)
    if generated.any():
        # A conversation without an answer has no text; it stays in the denominator.
        metrics["valid_ratio_raw"] = Ratio(np.where(generated, judged.valid_answer, 0.0), ones)
    if rated.any():
        metrics["ece"] = calibration_error(first, judged.confidence)
    return metrics


def calibration_error(hits: Floats, confidence: Floats) -> Ratio:
    """The expected calibration error: sum over bins of |confidence - hits|, per conversation with a confidence.

    Args:
        hits: [n] probability that the first item is a target.
        confidence: [n] probability that the model gives to it; nan where unknown.
    """
    rated = ~np.isnan(confidence)
    gaps = np.where(rated, confidence - hits, 0.0)
    return Ratio(gaps, rated.astype(np.float64), bins=confidence_bins(confidence))


def confidence_bins(confidence: Floats) -> NDArray[np.int64]:
    """[n] bin of each confidence, from 0; the last bin includes 1."""
    return np.minimum(np.nan_to_num(confidence) * BINS, BINS - 1).astype(np.int64)


def ceilings(judged: Relevance) -> dict[str, Ratio]:
    """The best scores that one item per conversation can reach on these lists.

    Returns:
        `row`: the share of conversations whose list contains a target, the upper bound of `hit_rate`; `micro`: one hit
        for each of these over all (conversation, target) pairs, the upper bound of `recall_micro` on files that repeat
        no target in a row.
    """
    listed = (judged.num_listed > 0).astype(np.float64)
    return {
        "row": Ratio(listed, np.ones(len(listed))),
        "micro": Ratio(listed, judged.num_pairs.astype(np.float64)),
    }


def _discounts(length: int) -> Floats:
    """1 / log2(1 + rank) for ranks 1 to `length`."""
    return 1.0 / np.log2(np.arange(2, length + 2, dtype=np.float64))
