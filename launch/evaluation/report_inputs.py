"""The report's inputs from files: candidates' photos from shards, curves and description scores from runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavic.data.remote_shards import CacheSettings
from lavic.data.shard_dataset import ShardDataset
from lavic.data.tar_shards import Sample, sample_key
from lavic.errors import DataError
from lavic.evaluation.report import training
from lavic.evaluation.report.blocks import Number, Section
from lavic.tracking.journal import read_journal

if TYPE_CHECKING:
    from lavic.model.item_store import ItemStore

_FIRST_PHOTOS = 10
"""Of an item, among which its first one in a set is looked for; the others could not be fetched."""
STAGES = {1: "Stage 1: descriptions from five tokens", 2: "Stage 2: the right candidate's ID"}
"""Titles of the charts."""


def photo_lookup(
    folders: Sequence[Path], store: ItemStore | None, cache: CacheSettings | None = None
) -> Callable[[str], bytes | None]:
    """Item -> its photo as stored in the sets, or None: the photo that its tokens were made of.

    Without a store it is the first photo of the catalogue that is in a set.

    Raises:
        DataError: A folder is not a whole set of shards.
    """
    sets = [ShardDataset(folder, descriptions=None, cache=cache) for folder in folders]

    def photo(item: str) -> bytes | None:
        keys = [store.key(item)] if store else [sample_key(item, n) for n in range(_FIRST_PHOTOS)]
        return next((sample.jpg for key in keys for sample in _samples(sets, key)), None)

    return photo


def read_descriptions(
    folders: Sequence[Path], store: ItemStore, items: Iterable[str], cache: CacheSettings | None = None
) -> dict[str, str]:
    """Item -> the description of the photo that its tokens were made of; an item without one is not in it.

    Raises:
        DataError: A folder is not a whole set of shards.
    """
    sets = [ShardDataset(folder, cache=cache) for folder in folders]
    texts = {}
    for item in items:
        word_lists = (sample.text.split() for sample in _samples(sets, store.key(item)))
        if text := " ".join(next(filter(None, word_lists), ())):
            texts[item] = text
    return texts


def _samples(sets: Sequence[ShardDataset], key: str) -> Iterator[Sample]:
    for data in sets:
        if (number := data.index.find_stored(key)) is not None:
            yield data[number]


@dataclass
class TrainingSections:
    """The report's part on the runs that made a bundle."""

    numbers: list[Number] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)


def read_runs(runs: Sequence[tuple[str, str]]) -> TrainingSections:
    """Validation curves by stage of (name, run folder) pairs, and the description perplexity of stage-1 runs.

    Raises:
        DataError: A folder has no journal.
    """
    parts = TrainingSections()
    charts: dict[str, dict[str, list[dict[str, Any]]]] = {title: {} for title in STAGES.values()}
    levels: dict[str, dict[str, float]] = {}
    for name, folder in runs:
        journal, captions = Path(folder) / "metrics.jsonl", Path(folder) / "captions.json"
        if not journal.is_file():
            raise DataError(f"{folder}: not a run folder (no metrics.jsonl)")
        title = STAGES[1 if captions.is_file() else 2]
        charts[title][name] = read_journal(journal)
        if captions.is_file():
            scores = json.loads(captions.read_text(encoding="utf-8"))
            if "full" in scores:
                levels.setdefault(title, {})["all tokens"] = scores["full"]["perplexity"]
            parts.sections.append(training.descriptions(scores))
            if "cls_after" in scores:
                parts.numbers.append(training.description_number(scores))
    curves = training.training({title: runs for title, runs in charts.items() if runs}, levels)
    if curves:
        parts.sections.append(curves)
    return parts
