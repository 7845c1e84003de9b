"""The items that a set has, when it is extended."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from lavic.shards.plan.counts import PlanCounts
from lavic.shards.plan.external_dedup import hash64


class ExistingItems:
    """The items that a set has, by their hashes."""

    def __init__(self, planned: Iterable[bytes] = (), photoless: Iterable[bytes] = ()) -> None:
        """Load concatenated hashes of eight bytes: of the items with photos, and of those without one."""
        self._planned, self._photoless = _sorted(planned), _sorted(photoless)
        self.new_photoless = bytearray()
        """Hashes of new items without a photo."""

    def is_new(self, item_id: str, has_photo: bool, counts: PlanCounts) -> bool:
        """Whether an item's photos must be planned; counts it."""
        hash = hash64(item_id)
        if _contains(self._planned, hash) or (not has_photo and _contains(self._photoless, hash)):
            counts.known += 1
            return False
        if _contains(self._photoless, hash):
            counts.without_photo -= 1
            return True
        counts.items += 1
        if not has_photo:
            counts.without_photo += 1
            self.new_photoless += hash
        return True


def _sorted(hashes: Iterable[bytes]) -> np.ndarray:
    """Sorted hashes as uint64 [k]."""
    return np.unique(np.concatenate([np.empty(0, "<u8"), *(np.frombuffer(part, "<u8") for part in hashes)]))


def _contains(hashes: np.ndarray, hash: bytes) -> bool:
    if not len(hashes):
        return False
    value = np.frombuffer(hash, "<u8")[0]
    index = int(np.searchsorted(hashes, value))
    return index < len(hashes) and hashes[index] == value
