"""`predictions.jsonl`: every ranking of an evaluation, from which its numbers can be computed again without a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lavic.errors import DataError
from lavic.metrics.relevance import Prediction
from lavic.recommend.ranking.ranked_list import RankedList
from lavic.storage.atomic import atomic_open, to_utf8
from lavic.storage.json_text import parse_json
from lavic.storage.text_files import read_lines

if TYPE_CHECKING:
    from lavic.evaluation.test_set import ClusterBy, TestSet

FILE = "predictions.jsonl"


@dataclass(frozen=True, kw_only=True)
class PredictionSet:
    """The rankings of one test set, as they were written."""

    name: str
    ids: list[str] = field(default_factory=list)
    """Ids of the conversations."""
    targets: list[tuple[str, ...]] = field(default_factory=list)
    lists: list[tuple[str, ...]] = field(default_factory=list)
    """The candidates of each conversation."""
    clusters: list[int] = field(default_factory=list)
    """Number of the cluster of each."""
    rankings: dict[str, list[RankedList | None]] = field(default_factory=dict)
    """Arm -> its ranking of each; None where it has none."""

    def predictions(self, arm: str) -> list[Prediction]:
        """An arm's rankings, for the metrics; of `random` every list is one tie."""
        rows = self.rankings.get(arm) or [
            RankedList(ids=candidates, scores=(0.0,) * len(candidates)) for candidates in self.lists
        ]
        return [prediction(*row) for row in zip(self.targets, self.lists, rows, strict=True)]

    def cluster_numbers(self) -> NDArray[np.int64]:
        """[n], for the bootstrap."""
        return np.array(self.clusters, dtype=np.int64)


def prediction(targets: Sequence[str], candidates: Sequence[str], ranking: RankedList | None) -> Prediction:
    """One conversation's ranking, for the metrics; None, a conversation without a ranking, is a miss."""
    ranking = ranking or RankedList(ids=())
    return Prediction(
        targets=tuple(targets),
        candidates=tuple(candidates),
        ranking=ranking.ids,
        scores=ranking.scores or ranking.logprobs,
        confidence=ranking.probabilities[0] if ranking.probabilities else None,
        answer=None if ranking.text is None else (ranking.answer,) if ranking.answer else (),
    )


def write_predictions(
    path: Path,
    test_sets: Sequence[TestSet],
    rankings: Mapping[str, Mapping[str, Sequence[RankedList | None]]],
    cluster: ClusterBy,
) -> None:
    """Writes a line for each test set, arm and conversation.

    Args:
        path: The file.
        test_sets: The conversations.
        rankings: Test set -> arm -> a ranking of each conversation; None is written as null.
        cluster: Which conversations are resampled together.
    """
    with atomic_open(path) as file:
        for test_set in test_sets:
            clusters = test_set.clusters(cluster).tolist()
            for arm, ranked in rankings[test_set.name].items():
                rows = zip(test_set.conversations, test_set.lists, clusters, ranked, strict=True)
                for conversation, candidates, number, ranking in rows:
                    line: dict[str, Any] = {
                        "set": test_set.name,
                        "arm": arm,
                        "id": conversation.id,
                        "cluster": number,
                        "targets": conversation.targets,
                        "candidates": candidates,
                        "ranking": None,
                        **({} if ranking is None else _fields(ranking)),
                    }
                    file.write(to_utf8(json.dumps(line, ensure_ascii=False)) + b"\n")


def _fields(ranking: RankedList) -> dict[str, Any]:
    return {
        "ranking": ranking.ids,
        # Nine digits keep apart what single precision keeps apart: rounding makes no ties.
        "logprobs": [round(value, 9) for value in ranking.logprobs],
        "probabilities": [round(value, 9) for value in ranking.probabilities],
        **({"scores": list(ranking.scores)} if ranking.scores else {}),
        **({} if ranking.text is None else {"text": ranking.text, "answer": ranking.answer}),
        **({} if ranking.none is None else {"none": round(ranking.none, 9)}),
    }


def read_predictions(folder: Path) -> dict[str, PredictionSet]:
    """The rankings of an evaluation's folder, by test set.

    Raises:
        DataError: There are none, or they are cut short or of another version.
    """
    path = folder / FILE
    sets: dict[str, PredictionSet] = {}
    row_of_id: dict[tuple[str, str], int] = {}
    for number, text in read_lines(path):
        if not text.strip():
            continue
        try:
            line = parse_json(text)
            group = sets.setdefault(line["set"], PredictionSet(name=line["set"]))
            row = row_of_id.setdefault((line["set"], line["id"]), len(group.ids))
            if row == len(group.ids):
                group.ids.append(line["id"])
                group.targets.append(tuple(line["targets"]))
                group.lists.append(tuple(line["candidates"]))
                group.clusters.append(line["cluster"])
            rows = group.rankings.setdefault(line["arm"], [])
            if len(rows) != row:
                raise ValueError(f"the arm {line['arm']} has no line for the conversations before {line['id']}")
            rows.append(None if line["ranking"] is None else _ranking(line))
        except (KeyError, TypeError, ValueError) as error:
            problem = f"no key {error}" if isinstance(error, KeyError) else str(error)
            raise DataError(f"{path}:{number}: not a line of an evaluation ({problem}): evaluate again") from None
    for group in sets.values():
        for arm, rows in group.rankings.items():
            if len(rows) != len(group.ids):
                raise DataError(f"{path}: {arm} has {len(rows)} of {len(group.ids)} conversations: evaluate again")
    return sets


def _ranking(line: Mapping[str, Any]) -> RankedList:
    return RankedList(
        ids=tuple(line["ranking"]),
        logprobs=tuple(line["logprobs"]),
        probabilities=tuple(line["probabilities"]),
        scores=tuple(line.get("scores", ())),
        text=line.get("text"),
        answer=line.get("answer"),
        none=line.get("none"),
    )
