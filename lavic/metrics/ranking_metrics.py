"""Every metric's formula.

A metric is a ratio of two sums over conversations, so that one bootstrap serves all of them. `recall_micro` and
`valid_ratio_raw` are defined as in the released LaViC scripts, the others as usual in information retrieval. No metric
samples negatives.

What tied ranks and missing answers are worth is decided in `lavic.metrics.relevance`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lavic.metrics.relevance import Floats, Relevance

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
        part_sums = [float(part.sum()) for part in self.parts]
        return (sum(part_sums) if self.bins is None else sum(map(abs, part_sums))) / total

    @property
    def parts(self) -> list[Floats]:
        """The numerator by bin: [n] each, 0 outside the bin."""
        if self.bins is None:
            return [self.numerator]
        return [np.where(self.bins == number, self.numerator, 0.0) for number in np.unique(self.bins)]


def compute_metrics(judged: Relevance) -> dict[str, Ratio]:
    """The metrics of `LABELS`, in that order; those of generated text or of probabilities only where there are any.

    `recall_at_k` and `ndcg_at_k` count targets that are not in the list as misses; `hit_rate_in_list` leaves
    conversations without a listed target out.
    """
    relevance, targets = judged.relevance, judged.num_targets
    length = relevance.shape[-1]
    first = relevance[..., 0]
    ones = np.ones(len(targets))
    has_listed_target = (judged.num_listed > 0).astype(np.float64)

    def ndcg(k: int) -> Floats:
        best = np.cumsum(_discounts(k))[np.minimum(targets, k) - 1]
        return (relevance[..., :k] @ _discounts(min(k, length))) / best

    metrics = {
        "hit_rate": Ratio(first, ones),
        "hit_rate_in_list": Ratio(first * has_listed_target, has_listed_target),
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
    has_listed_target = (judged.num_listed > 0).astype(np.float64)
    return {
        "row": Ratio(has_listed_target, np.ones(len(has_listed_target))),
        "micro": Ratio(has_listed_target, judged.num_pairs.astype(np.float64)),
    }


def _discounts(length: int) -> Floats:
    """1 / log2(1 + rank) for ranks 1 to `length`."""
    return 1.0 / np.log2(np.arange(2, length + 2, dtype=np.float64))
