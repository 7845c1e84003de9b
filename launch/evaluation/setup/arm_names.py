"""The arms of an evaluation by name: what each needs, and what a report calls it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, get_args

from lavic.errors import ConfigError
from lavic.evaluation.assessment import RANDOM

if TYPE_CHECKING:
    from lavic.launch.evaluation.settings import EvaluateSettings

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


def arm_names(chosen: EvaluateSettings) -> tuple[ArmName, ...]:
    """The arms that the settings name, each once.

    Raises:
        ConfigError: Arms need a bundle and there is none, or the bundle has no store.
    """
    if chosen.bundle is not None and chosen.store is None:
        raise ConfigError("--bundle needs --store STORE, the item store that it was tuned on")
    names = chosen.arms or (DEFAULT_ARMS if chosen.bundle else DEFAULT_TEXT_ARMS)
    if chosen.bundle is None:
        needs_bundle = [f"--arms {name}" for name in names if name in get_args(ModelArm)]
        needs_bundle += [f"--compare {text}" for text in chosen.compare]
        needs_bundle += ["--shards"] * bool(chosen.shards and not chosen.chat.photos)
        if needs_bundle:
            raise ConfigError(f"{needs_bundle[0]} needs --bundle and --store")
    return tuple(dict.fromkeys(names))
