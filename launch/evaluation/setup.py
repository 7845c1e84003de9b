"""Who ranks what in an evaluation: bundles, stores and test files, checked together before a model is loaded."""

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
from lavic.evaluation.arms import Arm
from lavic.evaluation.assessment import RANDOM
from lavic.evaluation.baselines import count_targets
from lavic.evaluation.report.sections import spoken
from lavic.evaluation.test_set import Trial
from lavic.launch.evaluation.report_inputs import Past, read_runs, shelf

if TYPE_CHECKING:
    from lavic.launch.evaluate import EvaluateSettings
    from lavic.model.bundle import BundleInfo
    from lavic.model.item_store import ItemStore

ArmName = Literal[
    "lavic", "shuffled", "before_tuning", "words", "words_before_tuning", "popularity", "list_order", "random"
]

LABELS: Mapping[str, tuple[str, str]] = {
    "lavic": ("LaViC", "five tokens of each photo"),
    "titles": ("Titles only", "this bundle was tuned without photo tokens"),
    "shuffled": ("Tokens shuffled", "each candidate shows another one's photo"),
    "before_tuning": ("Before stage 2", "the same tokens, the base language model"),
    "words": ("Looks in words", "written out in the place of the tokens"),
    "words_before_tuning": ("Looks in words, before stage 2", "the base language model"),
    "popularity": ("Popularity", "the most frequent training target"),
    "list_order": ("List order", "always the first candidate"),
    RANDOM: ("Random pick", "exact expectation; range of random pickers"),
}
"""Arm -> its name for people, and what it does."""

COMPARED: Mapping[str, str] = {"text_only": "Titles only", "undistilled": "Without stage 1"}
"""Names for people of arms that --compare often brings; others are written as they are called."""


@dataclass(frozen=True, kw_only=True)
class Contest:
    """Everything that is checked before a model is loaded."""

    trials: list[Trial]
    arms: list[Arm]
    labels: dict[str, dict[str, str]]
    """Arm -> label and note."""
    info: BundleInfo
    store: ItemStore
    popular: Counter[str] | None
    """How often each item is a training target."""
    photo: Callable[[str], bytes | None]
    """Item -> its encoded photo."""
    past: Past
    """What the report shows of the training runs."""

    @classmethod
    def prepare(cls, chosen: EvaluateSettings) -> Contest:
        """Opens what the settings name and refuses what does not belong together.

        Raises:
            ConfigError, DataError: One line.
        """
        from lavic.model.bundle import BundleInfo
        from lavic.model.item_store import ItemStore

        info, store = BundleInfo.read(chosen.bundle), ItemStore.open(chosen.store)
        info.check_store(store)
        base = chosen.model.name
        info.check_adapters(chosen.bundle)
        info.base_model(chosen.bundle, base)
        wanted = [arm for arm in chosen.arms if arm != "shuffled" or info.tokens == "items"]
        for name, needs in (("popularity", "train"), ("words", "words"), ("words_before_tuning", "words")):
            if name in wanted and getattr(chosen, needs) is None:
                raise ConfigError(f"--arms {name} needs --{needs} FILE")
        if info.language_adapter is None and {"lavic", "shuffled"} & set(wanted):
            raise ConfigError(
                f"--bundle {chosen.bundle}: of stage 1, it holds no language adapter: run `lavic tune` first, or "
                "measure what it can without one: --arms before_tuning random"
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
        # Arms of the same weights stand together, so that each model is loaded once.
        arms = [arm for name, arm in variants.items() if name in wanted]
        labels: dict[str, dict[str, str]] = {
            name: {"label": label, "note": note} for name, (label, note) in LABELS.items() if name in wanted
        }
        if info.tokens == "none" and "lavic" in labels:
            labels["lavic"] = dict(zip(("label", "note"), LABELS["titles"], strict=True))
        for text in chosen.compare:
            other, note = _read_compare(text, first, info, taken=labels)
            arms.append(other)
            labels[other.name] = {"label": COMPARED.get(other.name, spoken(other.name)), "note": note}
        if not arms:
            raise ConfigError("--arms: name at least one that uses the model, such as lavic")
        stores = list({arm.store.folder: arm.store for arm in arms}.values())
        trials: dict[str, Trial] = {}
        for text in chosen.test:
            name, file = named(text)
            if name in trials:
                raise ConfigError(f"--test {text}: two files are called {name}: give them names, NAME=FILE")
            trials[name] = Trial.read(
                name,
                Path(file),
                candidates=chosen.candidates,
                stores=stores,
                missing=chosen.missing,
                limit=chosen.limit,
            )
        if not trials:
            raise ConfigError("--test: name at least one conversation file")
        if words is not None and {"words", "words_before_tuning"} & set(wanted):
            _check_words(words, chosen.words, trials.values())
        popular = None
        if chosen.train and "popularity" in wanted:
            popular = count_targets(c.targets for c in read_conversations(chosen.train))
        return cls(
            trials=list(trials.values()),
            arms=arms,
            labels=labels,
            info=info,
            store=store,
            popular=popular,
            photo=shelf(chosen.shards, store),
            past=read_runs([named(text) for text in chosen.runs]),
        )


def named(text: str) -> tuple[str, str]:
    """NAME=PATH, or a PATH that is called by its own name.

    Raises:
        ConfigError: The name has other characters.
    """
    name, equals, path = text.partition("=")
    if equals and re.fullmatch(r"[\w-]+", name):
        return name, path
    if equals and Path(path).exists() and not Path(text).exists():
        raise ConfigError(f"{text}: a name before = has letters, digits, - and _ alone, not {name!r}")
    return Path(text).stem, text


def _read_compare(text: str, main: Arm, main_info: BundleInfo, *, taken: Mapping[str, Any]) -> tuple[Arm, str]:
    """NAME=BUNDLE[@STORE] as an arm, with a note on what it is."""
    from lavic.model.bundle import BundleInfo
    from lavic.model.item_store import ItemStore

    name, equals, place = text.partition("=")
    if not equals or not re.fullmatch(r"[\w-]+", name) or not place:
        raise ConfigError(f"--compare {text}: expected NAME=BUNDLE or NAME=BUNDLE@STORE, NAME of letters and digits")
    if name in taken or name in LABELS:
        raise ConfigError(f"--compare {text}: there is an arm {name} already: give it another name")
    folder, other = place, ""
    if "@" in place and not Path(place).is_dir():
        folder, _, other = place.rpartition("@")
    store = ItemStore.open(other) if other else main.store
    info = BundleInfo.read(Path(folder))
    info.check_store(store)
    info.check_adapters(Path(folder))
    # --model.name says where the main bundle's base model is; a bundle of another base has its own.
    base = main.base if info.fingerprint == main_info.fingerprint else None
    info.base_model(Path(folder), base)
    note = "five tokens of each photo"
    if info.tokens == "none":
        note = "tuned alike, without photo tokens"
    elif info.vision_adapter is None:
        note = "tuned alike, on the plain model's tokens"
    return Arm(name=name, bundle=Path(folder), store=store, base=base), note


def _check_words(words: Mapping[str, str], path: Path | None, trials: Iterable[Trial]) -> None:
    """Refuses looks that leave a target out: its list would be ranked without what it asks for."""
    for trial in trials:
        for conversation, listed in zip(trial.conversations, trial.lists, strict=True):
            if unsaid := [item for item in conversation.targets if item in listed and item not in words]:
                raise DataError(
                    f"{path}: no look of {unsaid[0]}, the target of {conversation.place}: "
                    "give the looks of all that is listed, or leave the arms `words` and `words_before_tuning` out"
                )
