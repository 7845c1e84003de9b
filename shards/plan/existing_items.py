"""The items that a set has already, when it is extended."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from lavic.shards.plan.counts import Counts
from lavic.shards.plan.external_dedup import mark_of


class KnownItems:
    """The items that a set has already, by their marks."""

    def __init__(self, planned: Iterable[bytes] = (), photoless: Iterable[bytes] = ()) -> None:
        """Take them in.

        Args:
            planned: Marks of items with photos, eight bytes each, put together in any way.
            photoless: Marks of items that had no photo with a link.
        """
        self._planned, self._photoless = _sorted(planned), _sorted(photoless)
        self.new_photoless = bytearray()
        """Marks of items without a photo that are new."""

    def is_new(self, item_id: str, has_photo: bool, counts: Counts) -> bool:
        """Whether an item's photos are to be planned; counts it."""
        mark = mark_of(item_id)
        if _is_in(self._planned, mark) or (not has_photo and _is_in(self._photoless, mark)):
            counts.known += 1
            return False
        if _is_in(self._photoless, mark):
            counts.without_photo -= 1
            return True
        counts.items += 1
        if not has_photo:
            counts.without_photo += 1
            self.new_photoless += mark
        return True


def _sorted(marks: Iterable[bytes]) -> np.ndarray:
    """Marks as sorted numbers: uint64 [k]."""
    return np.unique(np.concatenate([np.empty(0, "<u8"), *(np.frombuffer(part, "<u8") for part in marks)]))


def _is_in(known: np.ndarray, mark: bytes) -> bool:
    if not len(known):
        return False
    value = np.frombuffer(mark, "<u8")[0]
    at = int(np.searchsorted(known, value))
    return at < len(known) and known[at] == value
