"""The report's example conversations."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from lavic.evaluation.report.blocks import Candidate, Case, Gallery, Section
from lavic.evaluation.test_set import TestSet

if TYPE_CHECKING:
    from lavic.recommend.ranking.ranked_list import RankedList

MAX_TILES = 10
"""Candidates shown of a case, and any target behind them."""


def gallery(
    test_set: TestSet,
    rankings: Sequence[RankedList | None],
    *,
    title: Callable[[str], str],
    photo: Callable[[str], bytes | None],
    others: Mapping[str, Sequence[RankedList | None]],
    count: int = 24,
    seed: int = 0,
) -> Section | None:
    """Example conversations: hits and misses of the main model, in equal numbers where possible.

    Args:
        test_set: The conversations.
        rankings: The main model's ranking of each conversation; one without probabilities is not shown.
        title: The title of an item.
        photo: The encoded photo of an item, or None.
        others: Label of another model -> its ranking of each conversation.
        count: Maximum number of examples.
        seed: Seed of the sample.

    Returns:
        None if there is nothing to show.
    """
    rankable = {
        row: ranking for row, ranking in enumerate(rankings) if ranking and ranking.ids and ranking.probabilities
    }
    rows = list(rankable)
    hit = {row: ranking.ids[0] in test_set.conversations[row].targets for row, ranking in rankable.items()}
    rng = random.Random(seed)
    pools = [[row for row in rows if hit[row] is is_hit] for is_hit in (False, True)]
    for pool in pools:
        rng.shuffle(pool)
    miss_rows, hit_rows = pools
    half = max(count // 2, count - len(hit_rows))
    sample = miss_rows[:half]
    sample += hit_rows[: count - len(sample)]
    rng.shuffle(sample)
    if not sample:
        return None
    cases = tuple(_case(test_set, row, rankable[row], title, photo, others) for row in sample)
    num_hits = sum(hit.values())
    num_misses = len(rows) - num_hits
    lead = (
        f"{len(sample)} of {len(rows):,} conversations, sampled from {num_hits:,} hits and {num_misses:,} misses in "
        "equal numbers where possible, not in their true proportion. Candidates are sorted by probability."
    )
    return Section(title="Conversations", lead=lead, blocks=(Gallery(cases=cases),))


def _case(
    test_set: TestSet,
    row: int,
    ranking: RankedList,
    title: Callable[[str], str],
    photo: Callable[[str], bytes | None],
    others: Mapping[str, Sequence[RankedList | None]],
) -> Case:
    conversation = test_set.conversations[row]
    targets = set(conversation.targets)
    scored = list(zip(ranking.ids, ranking.probabilities, strict=True))
    tiles = [pair for index, pair in enumerate(scored) if index < MAX_TILES or pair[0] in targets]
    return Case(
        name=f"{test_set.file.name}:{conversation.line}",
        anchor=f"row-{conversation.line}",
        turns=tuple((turn.role, turn.text) for turn in conversation.turns),
        candidates=tuple(
            Candidate(item=item, title=title(item), photo=photo(item), probability=p, target=item in targets)
            for item, p in tiles
        ),
        others={
            name: (other := ranked[row]) is not None and bool(other.ids) and other.ids[0] in targets
            for name, ranked in others.items()
        },
    )
