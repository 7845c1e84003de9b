"""Which samples share a forward pass: by length and to a budget of tokens, with little padding and even ranks.

Pure functions of the lengths: every rank works out the same plan for itself, and nothing needs to be sent.
"""

from __future__ import annotations

from collections.abc import Sequence

Groups = list[list[int]]
"""Indices of samples, in groups."""


def cut(lengths: Sequence[int], *, tokens: int | None = None, most: int | None = None, overhead: int = 0) -> Groups:
    """Groups of like length, as few as possible.

    Args:
        lengths: Tokens of each sample.
        tokens: Most tokens of a group with its padding; a longer sample is a group of its own. None: any number.
        most: Most samples of a group. None: any number.
        overhead: Tokens that a sample costs besides its own, such as its photo's worth in the vision tower.
    """
    groups: Groups = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        # in rising order the newest sample is the longest of its group
        cost = (len(groups[-1]) + 1) * (lengths[index] + overhead) if groups else 0
        full = (tokens is not None and cost > tokens) or (most is not None and groups and len(groups[-1]) >= most)
        if not groups or full:
            groups.append([])
        groups[-1].append(index)
    return groups


def deal(
    lengths: Sequence[int], ranks: int, *, tokens: int, most: int | None = None, overhead: int = 0
) -> list[Groups]:
    """The micro-batches of one step for every rank: as many on each, of about equal cost.

    The step is cut into ranks x micro steps groups of like length, with the fewest micro steps that keep every group
    within the budget, and such that the most expensive group is as cheap as can be: few long samples or many short
    ones. Groups of about equal cost then meet in the same micro step, the ranks taking turns at the dearer ones.

    Args:
        lengths: Tokens of each sample of the step; their number is a multiple of `ranks`.
        ranks: How many.
        tokens: Most tokens of a group with its padding, unless the step's longest sample alone has more.
        most: Most samples of a group.
        overhead: As for `cut`.

    Returns:
        For each rank its micro-batches, in order: indices into `lengths`.
    """
    if not lengths or len(lengths) % ranks:
        raise ValueError(f"{len(lengths)} samples cannot be dealt to {ranks} ranks")
    needed = len(cut(lengths, tokens=tokens, most=most, overhead=overhead))
    micro_steps = min(-(-needed // ranks), len(lengths) // ranks)
    wanted = micro_steps * ranks

    def count(limit: int) -> int:
        return len(cut(lengths, tokens=limit, most=most, overhead=overhead))

    low, high = max(lengths) + overhead, len(lengths) * (max(lengths) + overhead)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if count(middle) <= wanted else (middle + 1, high)
    groups = cut(lengths, tokens=low, most=most, overhead=overhead)

    def cost(group: list[int]) -> tuple[int, int]:
        return len(group) * (max(lengths[i] for i in group) + overhead), group[0]

    while len(groups) < wanted:
        dearest = max((group for group in groups if len(group) > 1), key=cost)
        groups.remove(dearest)
        groups += [dearest[: len(dearest) // 2], dearest[len(dearest) // 2 :]]
    groups.sort(key=cost, reverse=True)
    shares: list[Groups] = [[] for _ in range(ranks)]
    for start in range(0, wanted, ranks):
        turn = groups[start : start + ranks]
        for share, group in zip(shares, turn if start // ranks % 2 == 0 else reversed(turn), strict=True):
            share.append(group)
    return shares
