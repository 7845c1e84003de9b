"""The rankings of an unfinished evaluation, arm by arm: a run that is started again ranks only what is missing."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from lavic import __version__
from lavic.recommend.ranking.ranked_list import RankedList
from lavic.storage.atomic import atomic_open, remove_partial_files

FOLDER = "rankings"
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ArmRankings:
    """The rankings of a test set by one arm."""

    orders: list[list[RankedList]]
    """For each order of the lists a ranking per conversation."""
    group: dict[str, int | str] | None = None
    """How lists were ranked in groups; None where each was ranked whole."""


class SavedRankings:
    """One file for the rankings of each arm and test set, by the digest of all that they depend on.

    Args:
        folder: Where they are; None: nothing is saved.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        if folder is not None:
            remove_partial_files(folder)

    def get(self, inputs: Mapping[str, Any]) -> ArmRankings | None:
        """The rankings that were made from these inputs; None if there are none."""
        if self._folder is None:
            return None
        try:
            with self._path(self._folder, inputs).open(encoding="utf-8") as file:
                header = json.loads(next(file))
                ranked = [_ranking(line) for line in file]
                count, rows, group = header["orders"], header["rows"], header["group"]
        except (OSError, ValueError, TypeError, KeyError, AttributeError, StopIteration):
            return None  # absent or damaged: the arm is ranked again
        if len(ranked) != count * rows:
            return None
        return ArmRankings(orders=[ranked[number * rows : (number + 1) * rows] for number in range(count)], group=group)

    def put(self, inputs: Mapping[str, Any], arm_rankings: ArmRankings) -> None:
        """Saves an arm's rankings. If that fails, it logs a warning, and the evaluation continues."""
        if self._folder is None:
            return
        header = {"orders": len(arm_rankings.orders), "rows": len(arm_rankings.orders[0]), "group": arm_rankings.group}
        try:
            self._folder.mkdir(exist_ok=True)
            with atomic_open(self._path(self._folder, inputs)) as file:
                for line in chain([header], (asdict(ranking) for order in arm_rankings.orders for ranking in order)):
                    file.write(json.dumps(line).encode() + b"\n")
        except OSError as error:
            log.warning("%s: rankings are not saved (%s)", self._folder, error.strerror)

    def remove(self) -> None:
        """Removes all of them: the evaluation is finished."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    @staticmethod
    def _path(folder: Path, inputs: Mapping[str, Any]) -> Path:
        text = json.dumps({"version": __version__, **inputs}, sort_keys=True)
        return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.jsonl"


def _ranking(line: str) -> RankedList:
    fields: dict[str, Any] = json.loads(line)
    kwargs: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    return RankedList(**kwargs)
