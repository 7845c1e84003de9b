"""What an item store is made of: which of its parts stand, and which are to be made.

STORE/plan.json            the settings that every token depends on; with another value of one the store is refused
STORE/part-<digest>.json   one shard's part is whole; digest of the settings, the shard and the photos taken of it

A set that has grown, or was packed anew, has shards that the store does not know. Their parts are made beside the
others, and until the new manifest is written the old one describes a whole store.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lavic.data.index.item_index import index_path, list_path
from lavic.data.index.set_index import item_of
from lavic.errors import DataError
from lavic.shards.store_photos import StorePhotos
from lavic.storage.atomic import atomic_write
from lavic.storage.index.text_hash import HashSet, hash_texts

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
    photos: StorePhotos
    """Of each shard, those that the store takes."""

    @property
    def names(self) -> list[str]:
        """The name of each shard's part."""
        return self.photos.names

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
        plan = recorded(self.out)
        return plan.get("shards") == list(self.shards) and plan.get("items") == self._digest_keys()

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
            self._check_catalogue(what)
        if not self.is_whole():
            atomic_write(self.out / FILE, json.dumps(self.settings))

    def made(self, name: str) -> Part | None:
        """A part that stands."""
        from lavic.model.item_store import Part

        file = self.out / f"part-{name}.json"
        return Part(**json.loads(file.read_text("utf-8"))) if file.is_file() else None

    def note(self, part: Part) -> None:
        """Notes that a part is whole."""
        atomic_write(self.out / f"part-{part.name}.json", json.dumps(asdict(part)))

    def sweep(self, parts: Sequence[Part]) -> None:
        """Removes what the store is not made of any more, now that these are its parts."""
        names = {*self.names, index_path(self.out, parts).stem.partition("-")[2]}
        for pattern in ("part-*.json", "items-*.jsonl", "items-*.safetensors", "tokens-*.safetensors"):
            for file in self.out.glob(pattern):
                if file.stem.partition("-")[2] not in names:
                    file.unlink(missing_ok=True)

    def _digest_keys(self) -> str:
        """Of the keys of all photos."""
        digest, between = hashlib.sha256(), ""
        for number in range(len(self.photos)):
            for key in self.photos.keys(number):
                digest.update(f"{between}{key}".encode())
                between = "\n"
        return digest.hexdigest()

    def _parts(self) -> Iterator[tuple[str, int]]:
        """Name and items of each part that the store in the folder is made of, or an unfinished one has so far."""
        manifest = self.out / "manifest.json"
        if manifest.is_file():
            parts = json.loads(manifest.read_text("utf-8"))["parts"]
        else:
            parts = [json.loads(file.read_text("utf-8")) for file in self.out.glob("part-*.json")]
        yield from ((part["name"], part["items"]) for part in parts)

    def _check_catalogue(self, what: str) -> None:
        """Refuses a store of which the sets have lost too many items."""
        parts, names = dict(self._parts()), set(self.names)
        # the parts that this plan takes over hold none that is lost
        old = [path for name in parts if name not in names and (path := list_path(self.out, name)).is_file()]
        items = HashSet(np.concatenate([np.empty((0, 2), "<u8"), *(hash_texts(_items(path)) for path in old)]))
        lost = np.ones(len(items), bool)
        for number in range(len(self.photos)) if len(items) else ():
            places = items.find(self.photos.items(number))
            lost[places[places >= 0]] = False
        had = sum(parts.values())
        if lost.sum() > LOST * had:
            first = min(min(_those(path, items, lost), default="~") for path in old)
            raise DataError(
                f"{self.out}: {what} of another catalogue: {lost.sum():,} of its {had:,} items are not in the sets "
                f"(first: {first}): choose another --out, or remove it"
            )


def _items(path: Path) -> Iterator[str]:
    """The items in a list of a store."""
    with path.open("rb") as lines:
        yield from (item_of(json.loads(line)["key"]) for line in lines)


def _those(path: Path, items: HashSet, lost: np.ndarray) -> Iterator[str]:
    """The items in a list of a store that are lost."""
    texts = list(_items(path))
    places = items.find(hash_texts(texts))
    yield from (text for text, place in zip(texts, places.tolist(), strict=True) if lost[place])
