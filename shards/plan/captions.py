"""What the txt members of a set hold: the catalogue's descriptions, or the items' titles."""

from __future__ import annotations

from typing import Literal

from lavic.data.schema import Item, Photo


class Captions:
    """What the txt members hold, decided on the way where the settings leave it open.

    `auto` gives the title until a description is met: a catalogue that has none keeps the titles, in any other the
    descriptions count and the titles that were given are taken back.
    """

    def __init__(self, text: Literal["auto", "catalogue", "title", "none"]) -> None:
        """Begin.

        Args:
            text: See `PlanSettings`.
        """
        self._open = text == "auto"
        self.text = "title" if text == "auto" else text
        self.given = 0
        """Photos so far."""
        self.taken_back = 0
        """How many of these, from the first, get an empty text instead of their title."""

    def meet(self, item: Item) -> None:
        """Look at an item, wanted or not."""
        if self._open and item.descriptions:
            self._open, self.text, self.taken_back = False, "catalogue", self.given

    def of(self, item: Item, photo: Photo) -> str:
        """The text of the next photo."""
        self.given += 1
        return {"catalogue": photo.description, "title": item.title}.get(self.text, "")
