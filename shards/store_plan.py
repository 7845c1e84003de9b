"""What an item store is made of: which of its parts stand, and which are to be made.

STORE/plan.json            the settings that every token depends on; with another value of one the store is refused
STORE/part-<digest>.json   one shard's part is whole; digest of the settings, the shard and the photos taken of it

A set that has grown, or was packed anew, has shards that the store does not know. Their parts are made beside the
others, and until the new manifest is written the old one describes a whole store.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavic.errors import DataError
from lavic.storage.atomic import write_whole

if TYPE_CHECKING:
    from lavic.model.item_store import Part

FILE = "plan.json"
LOST = 0.1
"""Largest share of a store's items that the sets may have lost since: with more it is another catalogue's store."""
_NAMES = {
    "base": "base model",
    "geometry": "--model.views",
    "adapter": "--adapter",
    "precision": "--precision",
    "dtype": "--model.dtype",
    "prompt": "--model.prompt",
}


def recorded(out: Path) -> dict[str, Any]:
    """The settings that a store, whole or not, was begun with; empty where there is none."""
    try:
        plan = json.loads((out / FILE).read_text("utf-8"))
        if (manifest := out / "manifest.json").is_file():  # older plans did not know the views
            plan["geometry"] = json.loads(manifest.read_text("utf-8"))["geometry"]
        return dict(plan)
    except (OSError, ValueError, TypeError, KeyError):
        return {}


@dataclass(frozen=True, kw_only=True)
class StorePlan:
    """A store as it is to be."""

    out: Path
    settings: Mapping[str, Any]
    """Everything that a token depends on besides its photo."""
    shards: tuple[str, ...]
    """The sha256 of each shard of the sets."""
    keys: tuple[tuple[str, ...], ...]
    """Of each shard, the photos that the store takes."""

    @cached_property
    def names(self) -> list[str]:
        """The name of each shard's part."""
        return [
            hashlib.sha256(json.dumps([self.settings, shard, keys], sort_keys=True).encode()).hexdigest()[:16]
            for shard, keys in zip(self.shards, self.keys, strict=True)
        ]

    def is_whole(self) -> bool:
        """Whether the store is there as it is to be."""
        try:
            manifest = json.loads((self.out / "manifest.json").read_text("utf-8"))
            made = [part["name"] for part in manifest["parts"]]
        except (OSError, ValueError, TypeError, KeyError):
            return False
        if made == self.names:
            return True
        # older versions named a part by its number, and what it was made of stood in the plan
        items = hashlib.sha256("\n".join(key for keys in self.keys for key in keys).encode()).hexdigest()
        plan = recorded(self.out)
        return plan.get("shards") == list(self.shards) and plan.get("items") == items

    def begin(self) -> None:
        """Notes the settings in a new folder; in one that holds a store, compares them with its own.

        Raises:
            DataError: The store was made with other settings or of another catalogue, or the folder holds something
                else.
        """
        plan = recorded(self.out)
        whole = (self.out / "manifest.json").is_file()
        what = "an item store" if whole else "an unfinished item store"
        if not plan:
            if any(not entry.name.startswith(".") for entry in self.out.iterdir()):
                raise DataError(f"{self.out}: not empty, and not an item store: choose another --out, or remove it")
        elif other := [key for key, value in self.settings.items() if plan.get(key, value) != value]:
            names = ", ".join(_NAMES.get(key, key) for key in other)
            raise DataError(f"{self.out}: {what} made with another {names}: choose another --out, or remove it")
        elif not self.is_whole():
            had = self._items()
            lost = had - {_item(key) for keys in self.keys for key in keys}
            if len(lost) > LOST * len(had):
                raise DataError(
                    f"{self.out}: {what} of another catalogue: {len(lost):,} of its {len(had):,} items are not in the "
                    f"sets (first: {min(lost)}): choose another --out, or remove it"
                )
        if not self.is_whole():
            write_whole(self.out / FILE, json.dumps(self.settings))

    def made(self, name: str) -> Part | None:
        """A part that stands."""
        from lavic.model.item_store import Part

        file = self.out / f"part-{name}.json"
        return Part(**json.loads(file.read_text("utf-8"))) if file.is_file() else None

    def note(self, part: Part) -> None:
        """Notes that a part is whole."""
        write_whole(self.out / f"part-{part.name}.json", json.dumps(asdict(part)))

    def sweep(self) -> None:
        """Removes the parts that the store is not made of any more."""
        names = set(self.names)
        for pattern in ("part-*.json", "items-*.jsonl", "tokens-*.safetensors"):
            for file in self.out.glob(pattern):
                if file.stem.partition("-")[2] not in names:
                    file.unlink(missing_ok=True)

    def _items(self) -> set[str]:
        """The items whose tokens are in the folder."""
        found: set[str] = set()
        for file in self.out.glob("items-*.jsonl"):
            with file.open("rb") as lines:
                found.update(_item(json.loads(line)["key"]) for line in lines)
        return found


def keys_of(photos: Sequence[Sequence[tuple[int, int, str]]]) -> tuple[tuple[str, ...], ...]:
    """The keys of the photos of each shard."""
    return tuple(tuple(key for _, _, key in part) for part in photos)


def _item(key: str) -> str:
    return key.rpartition("_")[0]
