"""What the order of a list does to a model's answer: the same list in several orders, compared and averaged."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

from lavic.evaluation.test_set import TestSet
from lavic.recommend.ranking.ranked_list import RankedList


def reordered(test_set: TestSet, row: int, number: int, seed: int) -> tuple[str, ...]:
    """A list in order `number`: 0 is the file's, the others are random, of the seed and the conversation's id."""
    candidates = list(test_set.lists[row])
    if number:
        random.Random(f"{seed}/order/{number}/{test_set.conversations[row].id}").shuffle(candidates)
    return tuple(candidates)


def average(rankings: Sequence[RankedList]) -> RankedList:
    """One ranking of a list from its rankings in several orders: by the mean probability of each candidate.

    Args:
        rankings: Each of the same candidates, with probabilities.
    """
    if len(rankings) == 1:
        return rankings[0]
    by_item: dict[str, list[tuple[float, float]]] = {}
    for ranking in rankings:
        for item, logprob, p in zip(ranking.ids, ranking.logprobs, ranking.probabilities, strict=True):
            by_item.setdefault(item, []).append((p, logprob))
    mean = {item: math.fsum(p for p, _ in values) / len(values) for item, values in by_item.items()}
    ids = tuple(sorted(mean, key=lambda item: -mean[item]))
    nones = [ranking.none for ranking in rankings if ranking.none is not None]
    return RankedList(
        ids=ids,
        logprobs=tuple(_log_mean([logprob for _, logprob in by_item[item]]) for item in ids),
        probabilities=tuple(mean[item] for item in ids),
        scores=tuple(mean[item] for item in ids),
        none=math.fsum(nones) / len(nones) if nones else None,
    )


def order_bias(test_set: TestSet, orders: Sequence[Sequence[RankedList]], seed: int) -> dict[str, Any]:
    """How much an arm's answers depend on the order of the list.

    Args:
        orders: For each order (`reordered`) a ranking per conversation.

    Returns:
        `orders`, their number; `hit_rate` of each, the file's order first, with their `mean`, the `spread` (highest
        less lowest) and the `deviation` (sample standard deviation); `same_first`, the share of lists whose first item
        is the same in all orders; and, over the random orders and the lists of the most frequent length, `positions`:
        the share of first items that stood at each place of the prompt, where a model that ignores the order has
        `uniform` at each, and `position_lists`, the rankings counted.
    """
    rates = []
    for ranked in orders:
        hits = [
            bool(ranking.ids) and ranking.ids[0] in conversation.targets
            for ranking, conversation in zip(ranked, test_set.conversations, strict=True)
        ]
        rates.append(sum(hits) / len(hits))
    mean = math.fsum(rates) / len(rates)
    deviation = math.sqrt(math.fsum((rate - mean) ** 2 for rate in rates) / (len(rates) - 1))
    first_items = [[ranking.ids[:1] for ranking in ranked] for ranked in orders]
    num_same_first = sum(all(first == rows[0] for first in rows) for rows in zip(*first_items, strict=True))
    lengths = [len(candidates) for candidates in test_set.lists if candidates]
    length = max(set(lengths), key=lambda size: (lengths.count(size), size))
    counts = [0] * length
    for number, ranked in enumerate(orders[1:], 1):
        for row, ranking in enumerate(ranked):
            reordered_list = reordered(test_set, row, number, seed)
            if len(reordered_list) == length and ranking.ids and ranking.ids[0] in reordered_list:
                counts[reordered_list.index(ranking.ids[0])] += 1
    total = sum(counts)
    return {
        "orders": len(orders),
        "hit_rate": rates,
        "mean": mean,
        "spread": max(rates) - min(rates),
        "deviation": deviation,
        "same_first": num_same_first / len(test_set),
        "positions": [count / total for count in counts] if total else [],
        "uniform": 1 / length,
        "position_lists": total,
    }


def _log_mean(values: Sequence[float]) -> float:
    top = max(values)
    return top + math.log(math.fsum(math.exp(value - top) for value in values) / len(values))
