"""What was met on the way through a catalogue, in numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True)
class Counts:
    """What was met on the way through a catalogue."""

    items: int = 0
    """Items that were wanted and new."""
    without_photo: int = 0
    """Of these, how many have no photo with a link. Less than none where items that had none have one now."""
    unlinked: int = 0
    """Entries of the items' lists of images that have no link."""
    photos: int = 0
    repeated: int = 0
    """Photos left out because an earlier record has the same item and number."""
    shared: int = 0
    """Photos that an earlier link shows too, maybe in another size; they are fetched with it."""
    rejected: int = 0
    """Records that could not be read."""
    known: int = 0
    """Items left out because the set has them already."""
    ids_missing: int = 0
    """Item ids asked for that the catalogue does not have."""


OF_LAST_READING = ("rejected", "ids_missing")
"""Counts that each reading of a catalogue makes anew: those of different readings are not added up."""
