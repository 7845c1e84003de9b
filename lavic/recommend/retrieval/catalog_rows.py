"""The items of a catalogue as rows of an index: which of them, and which of their texts."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from lavic.config import settings
from lavic.data.catalog import find_files, read_items
from lavic.data.schema import Item
from lavic.data.sources.record import BadRecord
from lavic.errors import DataError
from lavic.recommend.retrieval.item_table import Row

Field = Literal["title", "categories", "features", "description", "photos"]
_SHOWN = 5
"""Records that cannot be read and are shown; the others are counted."""

log = logging.getLogger(__name__)


@settings
class TextSettings:
    """What an item's text is made of."""

    fields: Annotated[tuple[Field, ...], pydantic.Field(min_length=1)] = ("title",)
    """Fields of the catalogue, in this order; `photos` are the catalogue's descriptions of the item's photos."""


def item_text(item: Item, fields: Sequence[Field]) -> str:
    """An item's text: the fields that are not empty, each on a line."""
    values: Mapping[str, Sequence[str]] = {
        "title": (item.title,),
        "categories": (", ".join(item.categories),),
        "features": item.features,
        "description": item.description,
        "photos": tuple(item.descriptions.values()),
    }
    return "\n".join(text for field in fields for text in values[field] if text)


class CatalogRows:
    """Reads a catalogue, one pass at each call.

    Args:
        paths: As for `read_items`.
        text: What the items' texts are made of.
        available: Ids of the items that may be recommended; None for all.

    Attributes:
        left_out: Rows of the last pass that are not indexed, by reason: `unreadable`, `unavailable` (not in the item
            store); and `no_text`, which are indexed but not found by words or meaning.
    """

    def __init__(
        self, paths: Sequence[str | Path], text: TextSettings, available: Container[str] | None = None
    ) -> None:
        self._paths, self._text, self._available = paths, text, available
        self.left_out: Counter[str] = Counter()

    def __call__(self) -> Iterator[Row]:
        """The rows of one pass.

        Raises:
            DataError: There is none.
        """
        self.left_out = Counter()
        empty = True
        for item in read_items(self._paths, self._reject):
            if self._available is not None and item.id not in self._available:
                self.left_out["unavailable"] += 1
                continue
            text = item_text(item, self._text.fields)
            if not text.strip():
                self.left_out["no_text"] += 1
            empty = False
            yield Row(item.id, text)
        if empty:
            reasons = "".join(f"; {reason} {count:,}" for reason, count in self.left_out.items())
            hint = " (not in the item store)" if self.left_out["unavailable"] else ""
            raise DataError(f"{', '.join(map(str, self._paths))}: no item to index{reasons}{hint}")

    def counts(self) -> dict[str, int]:
        """What the last pass left out, by reason."""
        return dict(self.left_out)

    def _reject(self, record: BadRecord) -> None:
        self.left_out["unreadable"] += 1
        if self.left_out["unreadable"] <= _SHOWN:
            log.warning("%s", record)


def files_state(paths: Sequence[str | Path], store: Path | None) -> dict[str, Any]:
    """The state of a catalogue's local files and of the store's list of items, to see whether they have changed.

    Returns:
        Size and times of change by path (of content, and of the file itself, which a copy with the old time changes
        too); empty if a file is elsewhere.
    """
    state: dict[str, Any] = {}
    for path in [*find_files(paths), *([str(store / "manifest.json")] if store else [])]:
        if "://" in path:
            return {}
        status = Path(path).stat()
        state[str(Path(path).absolute())] = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    return state
