"""The set-up of an evaluation: bundles, stores and test files, checked together before a model is loaded."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lavic.data.conversations import read_conversations
from lavic.data.item_attributes import read_looks
from lavic.errors import ConfigError, DataError
from lavic.evaluation.assessment import RANDOM
from lavic.evaluation.baselines import count_targets
from lavic.evaluation.controls import Arm
from lavic.evaluation.report.sections import readable
from lavic.evaluation.test_set import TestSet
from lavic.launch.evaluation.report_inputs import TrainingSections, read_runs, shelf

if TYPE_CHECKING:
    from lavic.launch.evaluate import EvaluateSettings
    from lavic.model.bundle import BundleInfo
    from lavic.model.item_store import ItemStore

ArmName = Literal[
    "lavic", "shuffled", "before_tuning", "words", "words_before_tuning", "popularity", "list_order", "random"
]

LABELS: Mapping[str, tuple[str, str]] = {
    "lavic": ("LaViC", "five tokens of each photo"),
    "titles": ("Titles only", "tuned without photo tokens"),
    "shuffled": ("Tokens shuffled", "each candidate has the tokens of another photo"),
    "before_tuning": ("Before stage 2", "the same tokens, the base language model"),
    "words": ("Photos as text", "a description instead of the tokens"),
    "words_before_tuning": ("Photos as text, before stage 2", "the base language model"),
    "popularity": ("Popularity", "the most frequent training target first"),
    "list_order": ("List order", "always the first candidate"),
    RANDOM: ("Random order", "exact expectation and interval"),
}
"""Arm -> its label and a note."""

COMPARED: Mapping[str, str] = {"text_only": "Titles only", "undistilled": "Without stage 1"}
"""Labels of common names of --compare; other names are their own labels."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSetup:
    """The checked inputs of an evaluation."""

    test_sets: list[TestSet]
    arms: list[Arm]
    labels: dict[str, dict[str, str]]
    """Arm -> label and note."""
    info: BundleInfo
    store: ItemStore
    target_counts: Counter[str] | None
    """How often each item is a training target; None without the popularity baseline."""
    photo: Callable[[str], bytes | None]
    """Item -> its encoded photo."""
    training: TrainingSections
    """The report's part on the training runs."""

    @classmethod
    def prepare(cls, chosen: EvaluateSettings) -> EvaluationSetup:
        """Opens the inputs that the settings name.

        Raises:
            ConfigError: A setting is missing or wrong.
            DataError: An input cannot be read, or inputs do not belong together.
        """
        from lavic.model.bundle import BundleInfo
        from lavic.model.item_store import ItemStore

        info, store = BundleInfo.read(chosen.bundle), ItemStore.open(chosen.store)
        info.check_store(store)
        base = chosen.model.name
        info.check_adapters(chosen.bundle)
        info.base_model(chosen.bundle, base)
        names = [arm for arm in chosen.arms if arm != "shuffled" or info.tokens == "items"]
        for name, flag in (("popularity", "train"), ("words", "words"), ("words_before_tuning", "words")):
            if name in names and getattr(chosen, flag) is None:
                raise ConfigError(f"--arms {name} needs --{flag} FILE")
        if info.language_adapter is None and {"lavic", "shuffled"} & set(names):
            raise ConfigError(
                f"--bundle {chosen.bundle}: a stage-1 bundle, it holds no language adapter: run `lavic tune` first, or "
                "evaluate without one: --arms before_tuning random"
            )
        words = read_looks(chosen.words) if chosen.words else None
        first = Arm(name="lavic", bundle=chosen.bundle, store=store, base=base, tokens_per_item=chosen.tokens_per_item)
        variants = {
            "lavic": first,
            "shuffled": replace(first, name="shuffled", shuffled=True),
            "words": replace(first, name="words", words=words),
            "before_tuning": replace(first, name="before_tuning", language=False),
            "words_before_tuning": replace(first, name="words_before_tuning", language=False, words=words),
        }
        # Arms with the same weights are consecutive, so that each model is loaded once.
        arms = [arm for name, arm in variants.items() if name in names]
        labels: dict[str, dict[str, str]] = {
            name: {"label": label, "note": note} for name, (label, note) in LABELS.items() if name in names
        }
        if info.tokens == "none" and "lavic" in labels:
            labels["lavic"] = dict(zip(("label", "note"), LABELS["titles"], strict=True))
        for text in chosen.compare:
            other, note = _read_compare(text, first, info, taken=labels)
            arms.append(other)
            labels[other.name] = {"label": COMPARED.get(other.name, readable(other.name)), "note": note}
        if not arms:
            raise ConfigError("--arms: name at least one that uses the model, such as lavic")
        stores = list({arm.store.folder: arm.store for arm in arms}.values())
        test_sets: dict[str, TestSet] = {}
        for text in chosen.test:
            name, file = named(text)
            if name in test_sets:
                raise ConfigError(f"--test {text}: two files have the name {name}: give them names, NAME=FILE")
            test_sets[name] = TestSet.read(
                name,
                Path(file),
                candidates=chosen.candidates,
                stores=stores,
                missing=chosen.missing,
                limit=chosen.limit,
            )
        if not test_sets:
            raise ConfigError("--test: name at least one conversation file")
        if words is not None and {"words", "words_before_tuning"} & set(names):
            _check_words(words, chosen.words, test_sets.values())
        target_counts = None
        if chosen.train and "popularity" in names:
            target_counts = count_targets(c.targets for c in read_conversations(chosen.train))
        return cls(
            test_sets=list(test_sets.values()),
            arms=arms,
            labels=labels,
            info=info,
            store=store,
            target_counts=target_counts,
            photo=shelf(chosen.shards, store, chosen.cache),
            training=read_runs([named(text) for text in chosen.runs]),
        )


def named(text: str) -> tuple[str, str]:
    """Splits NAME=PATH; the default name of a PATH is its stem.

    Raises:
        ConfigError: The name has characters other than letters, digits, - and _.
    """
    name, equals, path = text.partition("=")
    if equals and re.fullmatch(r"[\w-]+", name):
        return name, path
    if equals and Path(path).exists() and not Path(text).exists():
        raise ConfigError(f"{text}: {name!r} is not a name: use letters, digits, - and _ before =")
    return Path(text).stem, text


def _read_compare(text: str, main: Arm, main_info: BundleInfo, *, taken: Mapping[str, Any]) -> tuple[Arm, str]:
    """NAME=BUNDLE[@STORE] as an arm, with a note that describes it."""
    from lavic.model.bundle import BundleInfo
    from lavic.model.item_store import ItemStore

    name, equals, path = text.partition("=")
    if not equals or not re.fullmatch(r"[\w-]+", name) or not path:
        raise ConfigError(f"--compare {text}: expected NAME=BUNDLE or NAME=BUNDLE@STORE, NAME of letters and digits")
    if name in taken or name in LABELS:
        raise ConfigError(f"--compare {text}: the name {name} is in use: choose another")
    folder, store_path = path, ""
    if "@" in path and not Path(path).is_dir():
        folder, _, store_path = path.rpartition("@")
    store = ItemStore.open(store_path) if store_path else main.store
    info = BundleInfo.read(Path(folder))
    info.check_store(store)
    info.check_adapters(Path(folder))
    # --model.name is the main bundle's base model; a bundle of another base records its own.
    base = main.base if info.fingerprint == main_info.fingerprint else None
    info.base_model(Path(folder), base)
    note = "five tokens of each photo"
    if info.tokens == "none":
        note = "tuned without photo tokens"
    elif info.vision_adapter is None:
        note = "tuned on the tokens of the base model"
    return Arm(name=name, bundle=Path(folder), store=store, base=base), note


def _check_words(words: Mapping[str, str], path: Path | None, test_sets: Iterable[TestSet]) -> None:
    """Refuses a file without the text of a listed target."""
    for test_set in test_sets:
        for conversation, listed in zip(test_set.conversations, test_set.lists, strict=True):
            if absent := [item for item in conversation.targets if item in listed and item not in words]:
                raise DataError(
                    f"{path}: no look of {absent[0]}, the target of {conversation.place}: add the looks of all "
                    "candidates, or omit the arms `words` and `words_before_tuning`"
                )
