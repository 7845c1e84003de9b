"""The set-up of an evaluation: bundles, stores and test files, checked together before a model is loaded."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from lavic.data.conversations import read_conversations
from lavic.data.item_attributes import read_looks
from lavic.data.manifest import digest_manifest
from lavic.endpoint.settings import require_endpoint
from lavic.errors import ConfigError, DataError
from lavic.evaluation.assessment import RANDOM, check_arms
from lavic.evaluation.baselines import count_targets
from lavic.evaluation.model_arms.arms import Arm
from lavic.evaluation.other_runs import read_other_run
from lavic.evaluation.report.sections import readable
from lavic.evaluation.test_set import TestSet
from lavic.evaluation.text_arms import read_candidate_texts
from lavic.launch.evaluation.report_inputs import TrainingSections, described, read_runs, shelf

if TYPE_CHECKING:
    from lavic.launch.evaluate import EvaluateSettings
    from lavic.model.bundle import BundleInfo
    from lavic.model.item_store import ItemStore
    from lavic.recommend.ranked_list import RankedList

ModelArm = Literal[
    "lavic",
    "shuffled",
    "blank",
    "noise",
    "words",
    "before_tuning",
    "base_titles",
    "words_before_tuning",
    "base_photos",
]
"""An arm that ranks with the model of --bundle, or with its base model."""
CONTROLS: tuple[ModelArm, ...] = ("shuffled", "blank", "noise")
"""The tuned model with item tokens that carry no information about their candidate."""
TextArm = Literal["chat", "bm25", "dense", "popularity", "repeat_last", "list_order", "random"]
"""An arm that needs no bundle."""
ArmName = ModelArm | TextArm

DEFAULT_ARMS: tuple[ArmName, ...] = ("lavic", *CONTROLS, "before_tuning", "list_order", "random")
"""With a bundle."""
DEFAULT_TEXT_ARMS: tuple[ArmName, ...] = ("list_order", "random")
"""Without one."""

NEEDS: Mapping[str, str] = {
    "popularity": "train",
    "base_photos": "shards",
    "bm25": "items",
    "dense": "items",
    "chat": "items",
}
"""Arm -> the setting that it needs."""

LABELS: Mapping[str, tuple[str, str]] = {
    "lavic": ("LaViC", "five tokens of each photo"),
    "titles": ("Titles only", "tuned without photo tokens"),
    "shuffled": ("Tokens shuffled", "each candidate has the tokens of another photo"),
    "blank": ("Tokens blank", "each candidate has the mean tokens of all candidates"),
    "noise": ("Tokens noise", "each candidate has random tokens of the same mean and spread"),
    "before_tuning": ("Before stage 2", "the same tokens, the base language model"),
    "base_titles": ("Base model, titles", "the base language model without tokens"),
    "base_photos": ("Base model, photos", "all image tokens of each photo, no adapter"),
    "words": ("Photos as text", "a description instead of the tokens"),
    "words_before_tuning": ("Photos as text, before stage 2", "the base language model"),
    "bm25": ("BM25", "words of the conversation in the candidate's catalogue text"),
    "dense": ("Dense", "similarity of the conversation and the candidate's catalogue text"),
    "chat": ("Chat model", "a model behind an endpoint picks one candidate by its title"),
    "popularity": ("Popularity", "the most frequent training target first"),
    "repeat_last": ("Repeat", "the item that the conversation named last first"),
    "list_order": ("List order", "always the first candidate"),
    RANDOM: ("Random order", "exact expectation and interval"),
}
"""Arm -> its label and a note."""

WORDS = frozenset({"words", "words_before_tuning"})
"""Arms that read the photos as text."""

COMPARED: Mapping[str, str] = {"text_only": "Titles only", "undistilled": "Without stage 1"}
"""Labels of common names of --compare; other names are their own labels."""


@dataclass(frozen=True, kw_only=True)
class OtherRun:
    """Another system's file, from --run."""

    test_set: str
    file: Path
    rankings: list[RankedList | None]
    """Of each conversation of the test set."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSetup:
    """The checked inputs of an evaluation."""

    test_sets: list[TestSet]
    names: tuple[str, ...]
    """All arms by name, in the order of the results."""
    arms: list[Arm]
    """Those of them that rank with a bundle."""
    labels: dict[str, dict[str, str]]
    """Arm -> label and note."""
    runs: dict[str, OtherRun]
    """The arms that are read from files."""
    info: BundleInfo | None
    """The main bundle; None without one."""
    store: ItemStore | None
    """Its item store."""
    texts: Mapping[str, str]
    """The catalogue's texts of the candidates, from --items."""
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
        names = _arm_names(chosen)
        for name in names:
            if (flag := NEEDS.get(name)) and not getattr(chosen, flag):
                raise ConfigError(f"--arms {name} needs --{flag} FILE")
        if "chat" in names:
            require_endpoint(chosen.chat, "--chat")
            if chosen.chat.photos and not chosen.shards:
                raise ConfigError("--chat.photos needs --shards, the sets with the candidates' photos")
        bundles = _Bundles.open(chosen, names) if chosen.bundle else None
        arms = bundles.arms if bundles else []
        # First the models, in the order in which they are ranked; then the others, as they were named.
        text = tuple(name for name in names if name in get_args(TextArm))
        files = _run_files(chosen, {*(arm.name for arm in arms), *LABELS})
        ordered = (*(arm.name for arm in arms), *files, *text)
        if not ordered:
            raise ConfigError("--arms: name at least one arm")
        labels: dict[str, dict[str, str]] = {
            name: dict(zip(("label", "note"), LABELS[name], strict=True)) for name in ordered if name in LABELS
        }
        labels |= bundles.labels if bundles else {}
        if "chat" in labels:
            shown = "title and photo" if chosen.chat.photos else "title"
            labels["chat"]["note"] = f"{chosen.chat.model} picks one candidate by its {shown}"
        labels |= {
            name: {"label": readable(name), "note": f"rankings of {file.name}"} for name, (_, file, _) in files.items()
        }
        stores = list({arm.store.folder: arm.store for arm in arms}.values())
        test_sets = _read_test_sets(chosen, stores)
        by_name = {test_set.name: test_set for test_set in test_sets}
        store = bundles.store if bundles else None
        if store is not None and WORDS & set(names):
            words = _read_words(chosen, store, test_sets)
            arms = [replace(arm, texts=words) if arm.name in WORDS else arm for arm in arms]
        photo = shelf(chosen.shards, store, chosen.cache)
        if any(arm.shown == "photos" for arm in arms):
            _check_photos(photo, test_sets)
            photo_sets = tuple(digest_manifest(folder) for folder in chosen.shards)
            arms = [replace(arm, photo=photo, photo_sets=photo_sets) if arm.shown == "photos" else arm for arm in arms]
        target_counts = None
        if chosen.train and "popularity" in names:
            target_counts = count_targets(c.targets for c in read_conversations(chosen.train))
        return cls(
            test_sets=test_sets,
            names=ordered,
            arms=arms,
            labels={name: labels[name] for name in ordered},
            runs={name: _read_run(name, by_name[test_set], file, key) for name, (test_set, file, key) in files.items()},
            info=bundles.info if bundles else None,
            store=store,
            texts=read_candidate_texts(chosen.items, test_sets, chosen.text.fields) if chosen.items else {},
            target_counts=target_counts,
            photo=photo,
            training=read_runs([named(text) for text in chosen.runs]),
        )

    @property
    def main(self) -> str:
        """The arm that the others are compared with: the first, and the random one only where it is alone."""
        first = self.test_sets[0].name
        elsewhere = {name for name, run in self.runs.items() if run.test_set != first}
        return next((name for name in self.names if name not in (RANDOM, *elsewhere)), RANDOM)

    def title(self, item: str) -> str:
        """The title of an item as the store has it, or empty."""
        return self.store.title(item) if self.store is not None and item in self.store else ""

    def text(self, item: str) -> str:
        """The catalogue's text of an item, or empty."""
        return self.texts.get(item, "")

    @property
    def text_arms(self) -> tuple[str, ...]:
        """The arms that rank without a bundle, but the random one, which is computed; `chat`, which may fail, last."""
        arms = [name for name in self.names if name in get_args(TextArm) and name != RANDOM]
        return tuple(sorted(arms, key=lambda name: name == "chat"))

    def without(self, arms: Collection[str]) -> EvaluationSetup:
        """The setup of an evaluation that lacks some arms."""
        names = tuple(name for name in self.names if name not in arms)
        return replace(self, names=names, labels={name: self.labels[name] for name in names})


def _run_files(chosen: EvaluateSettings, taken: Collection[str]) -> dict[str, tuple[str, Path, str | None]]:
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
        file, at, key = path.rpartition("@")
        if not at or Path(path).is_file():
            file, key = path, ""
        runs[name] = (test_set or next(iter(sets), ""), Path(file), key or None)
    return runs


def _read_run(name: str, test_set: TestSet, file: Path, key: str | None) -> OtherRun:
    rankings = read_other_run(file, test_set, key)
    check_arms({name: rankings})
    return OtherRun(test_set=test_set.name, file=file, rankings=rankings)


def _arm_names(chosen: EvaluateSettings) -> tuple[ArmName, ...]:
    """The arms that the settings name, each once.

    Raises:
        ConfigError: Arms need a bundle and there is none, or the bundle has no store.
    """
    if chosen.bundle is not None and chosen.store is None:
        raise ConfigError("--bundle needs --store STORE, the item store that it was tuned on")
    names = chosen.arms or (DEFAULT_ARMS if chosen.bundle else DEFAULT_TEXT_ARMS)
    if chosen.bundle is None:
        needy = [f"--arms {name}" for name in names if name in get_args(ModelArm)]
        needy += [f"--compare {text}" for text in chosen.compare]
        needy += ["--shards"] * bool(chosen.shards and not chosen.chat.photos)
        if needy:
            raise ConfigError(f"{needy[0]} needs --bundle and --store")
    return tuple(dict.fromkeys(names))


@dataclass(frozen=True, kw_only=True)
class _Bundles:
    """The arms that rank with bundles."""

    arms: list[Arm]
    labels: dict[str, dict[str, str]]
    info: BundleInfo
    store: ItemStore

    @classmethod
    def open(cls, chosen: EvaluateSettings, names: Sequence[str]) -> _Bundles:
        """Opens the main bundle and those of --compare."""
        from lavic.model.bundle import BundleInfo
        from lavic.model.item_store import ItemStore

        assert chosen.bundle is not None and chosen.store is not None
        info, store = BundleInfo.read(chosen.bundle), ItemStore.open(chosen.store)
        info.check_store(store)
        base = chosen.model.name
        info.check_adapters(chosen.bundle)
        info.base_model(chosen.bundle, base)
        names = [arm for arm in names if arm not in CONTROLS or info.tokens == "items"]
        if info.language_adapter is None and {"lavic", *CONTROLS} & set(names):
            raise ConfigError(
                f"--bundle {chosen.bundle}: a stage-1 bundle, it holds no language adapter: run `lavic tune` first, or "
                "evaluate without one: --arms before_tuning random"
            )
        first = Arm(name="lavic", bundle=chosen.bundle, store=store, base=base, tokens_per_item=chosen.tokens_per_item)
        variants = {
            "lavic": first,
            "shuffled": replace(first, name="shuffled", shown="shuffled"),
            "blank": replace(first, name="blank", shown="blank"),
            "noise": replace(first, name="noise", shown="noise"),
            "words": replace(first, name="words", shown="text"),
            "before_tuning": replace(first, name="before_tuning", language=False),
            "base_titles": replace(first, name="base_titles", language=False, shown="text"),
            "words_before_tuning": replace(first, name="words_before_tuning", language=False, shown="text"),
            "base_photos": replace(
                first, name="base_photos", language=False, shown="photos", context=chosen.photo_context
            ),
        }
        # Arms with the same weights are consecutive, so that each model is loaded once.
        arms = [arm for name, arm in variants.items() if name in names]
        labels: dict[str, dict[str, str]] = {}
        if info.tokens == "none" and "lavic" in names:
            labels["lavic"] = dict(zip(("label", "note"), LABELS["titles"], strict=True))
        taken = {arm.name for arm in arms}
        for text in chosen.compare:
            other, note = _read_compare(text, first, info, taken=taken)
            arms.append(other)
            taken.add(other.name)
            labels[other.name] = {"label": COMPARED.get(other.name, readable(other.name)), "note": note}
        return cls(arms=arms, labels=labels, info=info, store=store)


def _read_test_sets(chosen: EvaluateSettings, stores: Sequence[ItemStore]) -> list[TestSet]:
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


def _read_compare(text: str, main: Arm, main_info: BundleInfo, *, taken: Collection[str]) -> tuple[Arm, str]:
    """NAME=BUNDLE[@STORE] as an arm, with a note that describes it."""
    from lavic.model.bundle import BundleInfo
    from lavic.model.item_store import ItemStore

    name, equals, path = text.partition("=")
    if not equals or not re.fullmatch(r"[\w-]+", name) or not path:
        raise ConfigError(f"--compare {text}: expected NAME=BUNDLE or NAME=BUNDLE@STORE, NAME of letters and digits")
    if is_taken(name, {*taken, *LABELS}):
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


def _read_words(chosen: EvaluateSettings, store: ItemStore, test_sets: Iterable[TestSet]) -> dict[str, str]:
    """Photos as text: those of --words, else the descriptions beside --shards.

    Raises:
        ConfigError: There is neither.
        DataError: A listed target has no text.
    """
    items = {item for test_set in test_sets for listed in test_set.lists for item in listed}
    if chosen.words is not None:
        words, place, missing = read_looks(chosen.words), str(chosen.words), "look"
    elif chosen.shards:
        words = described(chosen.shards, store, items, chosen.cache)
        place, missing = ", ".join(map(str, chosen.shards)), "description"
    else:
        raise ConfigError("--arms words needs --words FILE, or --shards with the descriptions of `lavic describe`")
    for test_set in test_sets:
        for conversation, listed in zip(test_set.conversations, test_set.lists, strict=True):
            if absent := [item for item in conversation.targets if item in listed and item not in words]:
                raise DataError(
                    f"{place}: no {missing} of {absent[0]}, the target of {conversation.place}: add the {missing}s of "
                    "all candidates, or omit the arms `words` and `words_before_tuning`"
                )
    return words


def _check_photos(photo: Callable[[str], bytes | None], test_sets: Iterable[TestSet]) -> None:
    """Refuses a list with a candidate whose photo is in no set, before a model is loaded."""
    known: set[str] = set()
    for test_set in test_sets:
        for conversation, listed in zip(test_set.conversations, test_set.lists, strict=True):
            for item in listed:
                if item not in known and photo(item) is None:
                    raise DataError(
                        f"{conversation.place}: no photo of the candidate {item} is in --shards: name the sets that "
                        "the store was made of, or omit the arm `base_photos`"
                    )
                known.add(item)
