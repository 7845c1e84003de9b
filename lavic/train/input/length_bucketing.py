"""Groups samples by length within a token budget, balanced over the ranks.

Pure functions of the lengths: every rank computes the same groups, without communication.
"""

from __future__ import annotations

from collections.abc import Sequence

Groups = list[list[int]]
"""Indices of samples, in groups."""


def bucket_by_length(
    lengths: Sequence[int], *, max_tokens: int | None = None, max_samples: int | None = None, overhead: int = 0
) -> Groups:
    """Groups samples of similar length, in as few groups as possible.

    Args:
        lengths: Tokens of each sample.
        max_tokens: Maximum tokens of a group with padding; a longer sample is a group by itself. None: any number.
        max_samples: Maximum samples of a group. None: any number.
        overhead: Cost of a sample besides its tokens, in tokens: its photo's pass through the vision tower.
    """
    groups: Groups = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        # In ascending order the newest sample is the longest of its group.
        cost = (len(groups[-1]) + 1) * (lengths[index] + overhead) if groups else 0
        full = (max_tokens is not None and cost > max_tokens) or (
            max_samples is not None and groups and len(groups[-1]) >= max_samples
        )
        if not groups or full:
            groups.append([])
        groups[-1].append(index)
    return groups


def balance_micro_batches(
    lengths: Sequence[int], ranks: int, *, max_tokens: int, max_samples: int | None = None, overhead: int = 0
) -> list[Groups]:
    """The micro-batches of one step for every rank: the same number on each, of about equal cost.

    The step is split into ranks x micro-steps groups of similar length, with the fewest micro-steps that keep every
    group within the budget, minimizing the cost of the most expensive group: few long samples or many short ones.
    Groups of about equal cost are then run in the same micro-step, and ranks alternate in taking the costlier one.

    Args:
        lengths: Tokens of each sample of the step; their number is a multiple of `ranks`.
        ranks: Number of ranks.
        max_tokens: Maximum tokens of a group with padding, unless a single sample has more.
        max_samples: Maximum samples of a group.
        overhead: See `bucket_by_length`.

    Returns:
        For each rank its micro-batches, in order: indices into `lengths`.
    """
    if not lengths or len(lengths) % ranks:
        raise ValueError(f"{len(lengths)} samples cannot be shared by {ranks} ranks")
    needed = len(bucket_by_length(lengths, max_tokens=max_tokens, max_samples=max_samples, overhead=overhead))
    micro_steps = min(-(-needed // ranks), len(lengths) // ranks)
    total = micro_steps * ranks

    def count(limit: int) -> int:
        return len(bucket_by_length(lengths, max_tokens=limit, max_samples=max_samples, overhead=overhead))

    low, high = max(lengths) + overhead, len(lengths) * (max(lengths) + overhead)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if count(middle) <= total else (middle + 1, high)
    groups = bucket_by_length(lengths, max_tokens=low, max_samples=max_samples, overhead=overhead)

    def cost(group: list[int]) -> tuple[int, int]:
        return len(group) * (max(lengths[i] for i in group) + overhead), group[0]

    while len(groups) < total:
        costliest = max((group for group in groups if len(group) > 1), key=cost)
        groups.remove(costliest)
        groups += [costliest[: len(costliest) // 2], costliest[len(costliest) // 2 :]]
    groups.sort(key=cost, reverse=True)
    shares: list[Groups] = [[] for _ in range(ranks)]
    for start in range(0, total, ranks):
        micro_step = groups[start : start + ranks]
        for share, group in zip(shares, micro_step if start // ranks % 2 == 0 else reversed(micro_step), strict=True):
            share.append(group)
    return shares
