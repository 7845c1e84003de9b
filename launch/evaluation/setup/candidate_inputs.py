"""What arms need of every candidate: words for its photo, or the photo itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from lavic.data.sources.item_looks import read_looks
from lavic.errors import ConfigError, DataError
from lavic.evaluation.test_set import TestSet
from lavic.launch.evaluation.report_inputs import read_descriptions

if TYPE_CHECKING:
    from lavic.launch.evaluation.settings import EvaluateSettings
    from lavic.model.item_store import ItemStore


def read_words(chosen: EvaluateSettings, store: ItemStore, test_sets: Iterable[TestSet]) -> dict[str, str]:
    """Photos as text: those of --words, else the descriptions beside --shards.

    Raises:
        ConfigError: There is neither.
        DataError: A listed target has no text.
    """
    items = {item for test_set in test_sets for item in test_set.items}
    if chosen.words is not None:
        words, source, missing = read_looks(chosen.words), str(chosen.words), "look"
    elif chosen.shards:
        words = read_descriptions(chosen.shards, store, items, chosen.cache)
        source, missing = ", ".join(map(str, chosen.shards)), "description"
    else:
        raise ConfigError("--arms words needs --words FILE, or --shards with the descriptions of `lavic describe`")
    for test_set in test_sets:
        for conversation, candidates in zip(test_set.conversations, test_set.lists, strict=True):
            if absent := [item for item in conversation.targets if item in candidates and item not in words]:
                raise DataError(
                    f"{source}: no {missing} of {absent[0]}, the target of {conversation.place}: add the {missing}s of "
                    "all candidates, or omit the arms `words` and `words_before_tuning`"
                )
    return words


def check_photos(photo: Callable[[str], bytes | None], test_sets: Iterable[TestSet]) -> None:
    """Refuses a list with a candidate whose photo is in no set, before a model is loaded."""
    known: set[str] = set()
    for test_set in test_sets:
        for conversation, candidates in zip(test_set.conversations, test_set.lists, strict=True):
            for item in candidates:
                if item not in known and photo(item) is None:
                    raise DataError(
                        f"{conversation.place}: no photo of the candidate {item} is in --shards: name the sets that "
                        "the store was made of, or omit the arm `base_photos`"
                    )
                known.add(item)
