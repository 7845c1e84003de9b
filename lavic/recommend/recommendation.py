"""Questions to a recommender, and its answers."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, overload

from lavic.data.schema import Conversation
from lavic.recommend.conversation_forms import ConversationForm

if TYPE_CHECKING:
    from lavic.model.item_store import ItemStore


@dataclass(frozen=True, kw_only=True)
class Query:
    """A question to a recommender."""

    conversation: ConversationForm
    candidates: Sequence[str] | None = None
    """Item ids to rank; None: retrieved from the whole catalogue."""
    k: int = 10
    """Maximum number of items of the answer."""
    exclude: Collection[str] = ()
    """Item ids that are not recommended."""
    name: str = "conversation"
    """What error messages call the conversation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecommendedItem:
    """One recommended product."""

    id: str
    title: str
    probability: float
    """That the model names it, among all candidates of the list."""
    logprob: float
    """Log-probability (natural) of its id behind the prompt that it was last ranked in."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Retrieval method -> its score, of the methods that found the item (with given candidates: of all methods)."""
    photo: str = ""
    """Key of its photo in the shards."""


@dataclass(frozen=True, kw_only=True)
class Recommendation(Sequence[RecommendedItem]):
    """The answer to a query: its items, best first."""

    items: tuple[RecommendedItem, ...]
    candidates: int
    """How many items were ranked."""
    none: float | None = None
    """Probability of "none of these", if the bundle was tuned with this answer."""

    @overload
    def __getitem__(self, index: int) -> RecommendedItem: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[RecommendedItem, ...]: ...
    def __getitem__(self, index: int | slice) -> RecommendedItem | tuple[RecommendedItem, ...]:
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[RecommendedItem]:
        return iter(self.items)


@dataclass(frozen=True)
class CheckedQuery:
    """A query whose conversation is read and whose candidates are in the store."""

    conversation: Conversation
    candidates: tuple[str, ...] | None
    k: int
    exclude: frozenset[str]


def not_in_store(
    missing: Sequence[str], store: ItemStore, *, name: str = "the item store", remedy: str = "drop it from the list"
) -> str:
    """The error message for items that a store, called `name`, lacks; `remedy`: what to do besides embedding them."""
    suffix = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    if missing[0].upper() in store:
        hint = f"did you mean {missing[0].upper()}?"
    else:
        hint = f"embed its photo first, or {remedy}"
    return f"{shown_id(missing[0])}{suffix} {'are' if suffix else 'is'} not in {name}: {hint}"


def shown_id(item: str) -> str:
    """An id in a message: quoted and shortened where it is no plain word."""
    return item if re.fullmatch(r"[\w.:-]{1,80}", item) else repr(item[:80])
