"""What `lavic tune-retriever` reads: the item store, and the conversations whose targets it holds."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lavic.data.conversations import read_conversations
from lavic.errors import DataError

if TYPE_CHECKING:
    from lavic.data.schema import Conversation
    from lavic.launch.tune_retriever import TuneRetrieverSettings
    from lavic.model.item_store import ItemStore


@dataclass(frozen=True)
class RetrieverData:
    """What a run reads."""

    store: ItemStore
    train: list[Conversation]
    valid: list[Conversation]
    items: list[str]
    """Ids of the items that are searched in validation, targets first."""

    @classmethod
    def read(cls, settings: TuneRetrieverSettings, *, verbose: bool) -> RetrieverData:
        """Opens the store and reads the conversations.

        Raises:
            DataError: The store is of another base model or lacks a target, or there is nothing to train on.
        """
        from lavic.model import hub
        from lavic.model.item_store import ItemStore

        store = ItemStore.open(settings.store)
        store.check_base(hub.fingerprint(hub.resolve(settings.model)))
        if settings.tokens == "items":
            store.check_adapter()
        train, valid = (
            _with_targets(read_conversations(file), store, drop=settings.missing == "drop", verbose=verbose)
            for file in (settings.train, settings.valid)
        )
        targets = dict.fromkeys(id for row in (*train, *valid) for id in row.targets)
        num_sampled = settings.valid_items - len(targets)
        if len(store) <= settings.valid_items:
            targets |= dict.fromkeys(store.ids)
        elif num_sampled > 0:
            rows = random.Random(settings.head.seed).sample(range(len(store)), settings.valid_items)
            sampled = (id for id in (store.ids[row] for row in sorted(rows)) if id not in targets)
            targets |= dict.fromkeys(id for id, _ in zip(sampled, range(num_sampled), strict=False))
        return cls(store, train, valid, list(targets))

    def digests(self, settings: TuneRetrieverSettings) -> dict[str, str]:
        """Digests of what it was read from, by name."""
        from lavic.train.run_folder import digest_files

        return {
            "item store": digest_files([self.store.folder / "manifest.json"]),
            "training set": digest_files([settings.train]),
            "validation set": digest_files([settings.valid]),
        }


def _with_targets(rows: Sequence[Conversation], store: ItemStore, *, drop: bool, verbose: bool) -> list[Conversation]:
    """The conversations with a target, and of their targets those that the store holds.

    Raises:
        DataError: The store lacks one and `drop` is false, or none is left.
    """
    kept, missing = [], 0
    for row in rows:
        targets = tuple(id for id in row.targets if id in store)
        if len(targets) < len(row.targets):
            if not drop:
                id = next(id for id in row.targets if id not in store)
                raise DataError(
                    f"{row.place}: {id} is not in the item store {store.folder}: embed its photo, or use --missing drop"
                )
            missing += len(row.targets) - len(targets)
        if targets:
            kept.append(replace(row, targets=targets))
    if not kept:
        raise DataError(f"{rows[0].file}: no conversation has a target in {store.folder}")
    if verbose and (missing or len(kept) < len(rows)):
        print(
            f"{rows[0].file}: {len(rows) - len(kept)} of {len(rows)} rows left out; {missing} targets not in the store"
        )
    return kept
