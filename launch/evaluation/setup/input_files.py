"""Test sets, and other systems' rankings of them, from their files."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lavic.data.conversations import file_stem
from lavic.errors import ConfigError
from lavic.evaluation.assessment import check_arms
from lavic.evaluation.other_runs import read_other_run
from lavic.evaluation.test_set import TestSet

if TYPE_CHECKING:
    from lavic.launch.evaluation.settings import EvaluateSettings
    from lavic.model.item_store import ItemStore
    from lavic.recommend.ranking.ranked_list import RankedList


@dataclass(frozen=True, kw_only=True)
class OtherRun:
    """Another system's file, from --run."""

    test_set: str
    file: Path
    rankings: list[RankedList | None]
    """A ranking of each conversation of the test set."""


def read_test_sets(chosen: EvaluateSettings, stores: Sequence[ItemStore]) -> list[TestSet]:
    """The test files, the main one first.

    Raises:
        ConfigError: Two have one name.
        DataError: One cannot be read.
    """
    test_sets: dict[str, TestSet] = {}
    for text in chosen.test:
        name, file = named(text)
        if is_taken(name, test_sets):
            raise ConfigError(f"--test {text}: two files have the name {name}: give them names, NAME=FILE")
        test_sets[name] = TestSet.read(
            name,
            Path(file),
            candidates=chosen.candidates,
            stores=stores,
            missing=chosen.missing,
            limit=chosen.limit,
            top=chosen.top,
        )
    if not test_sets:
        raise ConfigError("--test: name at least one conversation file")
    return list(test_sets.values())


def is_taken(name: str, names: Iterable[str]) -> bool:
    """Whether a name is in use, or differs from one in case alone: both would be one file on some file systems."""
    return name.casefold() in {other.casefold() for other in names}


def named(text: str) -> tuple[str, str]:
    """Splits NAME=PATH; the default name of a PATH is that of the file without its endings.

    Raises:
        ConfigError: The name has characters other than letters, digits, - and _.
    """
    name, equals, path = text.partition("=")
    if equals and re.fullmatch(r"[\w-]+", name):
        return name, path
    if equals and Path(path).exists() and not Path(text).exists():
        raise ConfigError(f"{text}: {name!r} is not a name: use letters, digits, - and _ before =")
    return file_stem(text), text


def run_files(chosen: EvaluateSettings, taken: Collection[str]) -> dict[str, tuple[str, Path, str | None]]:
    """Test set, file and key of each --run, NAME=FILE[@KEY] or NAME@SET=FILE[@KEY], by name.

    Raises:
        ConfigError: A setting is not of this form, or a name is in use.
    """
    sets = [named(text)[0] for text in chosen.test]
    runs: dict[str, tuple[str, Path, str | None]] = {}
    for text in chosen.run:
        name, equals, path = text.partition("=")
        name, _, test_set = name.partition("@")
        if not equals or not path or not re.fullmatch(r"[\w-]+", name):
            raise ConfigError(f"--run {text}: expected NAME=FILE, NAME of letters, digits, - and _")
        if is_taken(name, {*taken, *runs}):
            raise ConfigError(f"--run {text}: the name {name} is in use: choose another")
        if test_set and test_set not in sets:
            raise ConfigError(f"--run {text}: no test set {test_set}; there are: {', '.join(sets)}")
        file, separator, key = path.rpartition("@")
        if not separator or Path(path).is_file():
            file, key = path, ""
        runs[name] = (test_set or next(iter(sets), ""), Path(file), key or None)
    return runs


def read_run(name: str, test_set: TestSet, file: Path, key: str | None) -> OtherRun:
    rankings = read_other_run(file, test_set, key)
    check_arms({name: rankings})
    return OtherRun(test_set=test_set.name, file=file, rankings=rankings)
