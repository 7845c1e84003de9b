"""All inputs of an evaluation, checked together before a model is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, get_args

from lavic.data.conversations import read_conversations
from lavic.data.manifest import digest_manifest
from lavic.endpoint.settings import require_endpoint
from lavic.errors import ConfigError
from lavic.evaluation.assessment import RANDOM
from lavic.evaluation.baselines import count_targets
from lavic.evaluation.model_arms.arms import Arm
from lavic.evaluation.report.sections import readable
from lavic.evaluation.test_set import TestSet
from lavic.evaluation.text_arms import read_candidate_texts
from lavic.launch.evaluation.report_inputs import TrainingSections, photo_lookup, read_runs
from lavic.launch.evaluation.setup.arm_names import LABELS, NEEDS, WORDS, TextArm, arm_names
from lavic.launch.evaluation.setup.bundle_arms import Bundles
from lavic.launch.evaluation.setup.candidate_inputs import check_photos, read_words
from lavic.launch.evaluation.setup.input_files import OtherRun, named, read_run, read_test_sets, run_files

if TYPE_CHECKING:
    from lavic.launch.evaluation.settings import EvaluateSettings
    from lavic.model.bundle import BundleInfo
    from lavic.model.item_store import ItemStore


@dataclass(frozen=True, kw_only=True)
class EvaluationSetup:
    """The checked inputs of an evaluation."""

    test_sets: list[TestSet]
    names: tuple[str, ...]
    """All arms by name, in the order of the results."""
    arms: list[Arm]
    """The arms that rank with a bundle."""
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
        names = arm_names(chosen)
        for name in names:
            if (flag := NEEDS.get(name)) and not getattr(chosen, flag):
                raise ConfigError(f"--arms {name} needs --{flag} FILE")
        if "chat" in names:
            require_endpoint(chosen.chat, "--chat")
            if chosen.chat.photos and not chosen.shards:
                raise ConfigError("--chat.photos needs --shards, the sets with the candidates' photos")
        bundles = Bundles.open(chosen, names) if chosen.bundle else None
        arms = bundles.arms if bundles else []
        # First the models, in the order in which they are ranked; then the others, as they were named.
        text_arm_names = tuple(name for name in names if name in get_args(TextArm))
        files = run_files(chosen, {*(arm.name for arm in arms), *LABELS})
        ordered = (*(arm.name for arm in arms), *files, *text_arm_names)
        if not ordered:
            raise ConfigError("--arms: name at least one arm")
        labels: dict[str, dict[str, str]] = {
            name: dict(zip(("label", "note"), LABELS[name], strict=True)) for name in ordered if name in LABELS
        }
        labels |= bundles.labels if bundles else {}
        if "chat" in labels:
            chat_input = "title and photo" if chosen.chat.photos else "title"
            labels["chat"]["note"] = f"{chosen.chat.model} picks one candidate by its {chat_input}"
        labels |= {
            name: {"label": readable(name), "note": f"rankings of {file.name}"} for name, (_, file, _) in files.items()
        }
        stores = list({arm.store.folder: arm.store for arm in arms}.values())
        test_sets = read_test_sets(chosen, stores)
        by_name = {test_set.name: test_set for test_set in test_sets}
        store = bundles.store if bundles else None
        if store is not None and WORDS & set(names):
            words = read_words(chosen, store, test_sets)
            arms = [replace(arm, texts=words) if arm.name in WORDS else arm for arm in arms]
        photo = photo_lookup(chosen.shards, store, chosen.cache)
        if any(arm.shown == "photos" for arm in arms):
            check_photos(photo, test_sets)
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
            runs={name: read_run(name, by_name[test_set], file, key) for name, (test_set, file, key) in files.items()},
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
        runs_of_other_sets = {name for name, run in self.runs.items() if run.test_set != first}
        return next((name for name in self.names if name not in (RANDOM, *runs_of_other_sets)), RANDOM)

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
