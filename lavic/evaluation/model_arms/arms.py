"""The models that rank a test set: the tuned one, its controls (each lacks one of its inputs) and the base model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from lavic.model.item_store import ItemStore

Shown = Literal["items", "shuffled", "blank", "noise", "photos", "text"]
"""What follows a candidate's title: its item tokens (as in tuning), those of another candidate of the list, the
mean of all candidates' tokens, random ones, all image tokens of its photo, or words, which may be none."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A model that ranks: the tuned model, a control, the base model, or another bundle."""

    name: str
    bundle: Path
    store: ItemStore
    base: str | None = None
    """Folder or hub id of the base model; None: the one that the bundle records."""
    language: bool = True
    """False for the model without its language adapter, as before stage 2."""
    shown: Shown = "items"
    """What follows the titles."""
    texts: Mapping[str, str] = field(default_factory=dict)
    """Of `text`: item -> its words; an item that is not in it has its title alone."""
    photo: Callable[[str], bytes | None] | None = None
    """Of `photos`: item -> its encoded photo."""
    photo_sets: tuple[str, ...] = ()
    """Of `photos`: digests of the sets of shards that they are in."""
    context: int | None = None
    """Of `photos`: longest prompt, tokens; None: the base model's context."""
    tokens_per_item: int | None = None
    """Number of item tokens per candidate; None: as in tuning."""

    @property
    def weights(self) -> tuple[Any, ...]:
        """What is loaded for it: arms of equal weights share a model. With all image tokens no adapter is loaded."""
        return self.bundle, self.base, self.language, self.shown == "photos"

    def inputs(self) -> dict[str, Any]:
        """All that its rankings depend on besides the lists, as JSON."""
        from lavic.model.bundle import BundleInfo

        return {
            "bundle": asdict(BundleInfo.read(self.bundle)),
            "store": self.store.manifest.digest,
            "language": self.language,
            "shown": self.shown,
            "texts": dict(self.texts),
            "photo_sets": self.photo_sets,
            "context": self.context,
            "tokens_per_item": self.tokens_per_item,
        }
