"""Numbers of items and photos that a reading of a catalogue has found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True)
class PlanCounts:
    """Numbers of one or more readings of a catalogue."""

    items: int = 0
    """Selected items that are new."""
    without_photo: int = 0
    """Items without a photo with a link. Negative if items that had none have one now."""
    unlinked: int = 0
    """Entries of the items' image lists without a link."""
    photos: int = 0
    repeated: int = 0
    """Photos left out since an earlier record has the same item and number."""
    shared: int = 0
    """Photos that show the picture of an earlier one, perhaps in another size; they are fetched with it."""
    rejected: int = 0
    """Records that could not be read."""
    known: int = 0
    """Items left out since the set has them."""
    ids_missing: int = 0
    """Selected item ids that the catalogue does not have."""


NOT_ADDED = ("rejected", "ids_missing")
"""Counts that hold for all of a catalogue: those of several readings are not added."""
