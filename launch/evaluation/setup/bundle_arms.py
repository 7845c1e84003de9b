"""The arms that rank with bundles: the main one, its controls, its base model, and those of --compare."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lavic.errors import ConfigError
from lavic.evaluation.model_arms.arms import Arm
from lavic.evaluation.report.sections import readable
from lavic.launch.evaluation.setup.arm_names import COMPARED, CONTROLS, LABELS
from lavic.launch.evaluation.setup.input_files import is_taken

if TYPE_CHECKING:
    from lavic.launch.evaluation.settings import EvaluateSettings
    from lavic.model.bundle import BundleInfo
    from lavic.model.item_store import ItemStore


@dataclass(frozen=True, kw_only=True)
class Bundles:
    """The arms that rank with bundles."""

    arms: list[Arm]
    labels: dict[str, dict[str, str]]
    info: BundleInfo
    store: ItemStore

    @classmethod
    def open(cls, chosen: EvaluateSettings, names: Sequence[str]) -> Bundles:
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
        main = Arm(name="lavic", bundle=chosen.bundle, store=store, base=base, tokens_per_item=chosen.tokens_per_item)
        variants = {
            "lavic": main,
            "shuffled": replace(main, name="shuffled", shown="shuffled"),
            "blank": replace(main, name="blank", shown="blank"),
            "noise": replace(main, name="noise", shown="noise"),
            "words": replace(main, name="words", shown="text"),
            "before_tuning": replace(main, name="before_tuning", language=False),
            "base_titles": replace(main, name="base_titles", language=False, shown="text"),
            "words_before_tuning": replace(main, name="words_before_tuning", language=False, shown="text"),
            "base_photos": replace(
                main, name="base_photos", language=False, shown="photos", context=chosen.photo_context
            ),
        }
        # Arms with the same weights are consecutive, so that each model is loaded once.
        arms = [arm for name, arm in variants.items() if name in names]
        labels: dict[str, dict[str, str]] = {}
        if info.tokens == "none" and "lavic" in names:
            labels["lavic"] = dict(zip(("label", "note"), LABELS["titles"], strict=True))
        taken = {arm.name for arm in arms}
        for text in chosen.compare:
            other, note = _read_compare(text, main, info, taken=taken)
            arms.append(other)
            taken.add(other.name)
            labels[other.name] = {"label": COMPARED.get(other.name, readable(other.name)), "note": note}
        return cls(arms=arms, labels=labels, info=info, store=store)


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
