"""The plan of an item store: which parts exist, and which are missing.

STORE/plan.json            the settings that every token depends on; they cannot be changed
STORE/part-<digest>.json   a complete part; digest of the settings, its shard and the photos of that shard

New shards of a set that was extended or packed again are added as new parts. Until the new manifest is written, the old
one describes a complete store.
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
MAX_LOST = 0.1
"""Largest share of a store's items that may be missing in the sets; otherwise they are of another catalogue."""
_NAMES = {
    "base": "base model",
    "geometry": "--model.views",
    "adapter": "--adapter",
    "precision": "--precision",
    "dtype": "--model.dtype",
    "prompt": "--model.prompt",
}


def read_plan(out: Path) -> dict[str, Any]:
    """The settings of a store, complete or not; empty if there is none."""
    try:
        plan = json.loads((out / FILE).read_text("utf-8"))
        if (manifest := out / "manifest.json").is_file():  # plans of older versions lack the views
            plan["geometry"] = json.loads(manifest.read_text("utf-8"))["geometry"]
        return dict(plan)
    except (OSError, ValueError, TypeError, KeyError):
        return {}


@dataclass(frozen=True, kw_only=True)
class StorePlan:
    """A store that is to be built from sets of shards."""

    out: Path
    settings: Mapping[str, Any]
    """Everything that a token depends on besides its photo."""
    shards: tuple[str, ...]
    """The sha256 of each shard of the sets."""
    photos: StorePhotos
    """The photos of the store, by shard."""

    @property
    def names(self) -> list[str]:
        """The name of each shard's part."""
        return self.photos.names

    def is_complete(self) -> bool:
        """Whether the store exists with all parts and no others."""
        try:
            manifest = json.loads((self.out / "manifest.json").read_text("utf-8"))
            names = [part["name"] for part in manifest["parts"]]
        except (OSError, ValueError, TypeError, KeyError):
            return False
        if names == self.names:
            return True
        # Older versions named a part by its number, and recorded its shard and photos in the plan.
        plan = read_plan(self.out)
        return plan.get("shards") == list(self.shards) and plan.get("items") == self._digest_keys()

    def begin(self) -> None:
        """Records the settings in a new store, or compares them with those of an existing one.

        Raises:
            DataError: The store has other settings or is of another catalogue, or the folder has other content.
        """
        plan = read_plan(self.out)
        store = "an item store" if (self.out / "manifest.json").is_file() else "an unfinished item store"
        if not plan:
            if any(not entry.name.startswith(".") for entry in self.out.iterdir()):
                raise DataError(f"{self.out}: not empty, and not an item store: use another --out, or remove it")
        elif changed := [key for key, value in self.settings.items() if plan.get(key, value) != value]:
            names = ", ".join(_NAMES.get(key, key) for key in changed)
            raise DataError(f"{self.out}: {store} made with another {names}: use another --out, or remove it")
        elif not self.is_complete():
            self._check_catalogue(store)
        if not self.is_complete():
            atomic_write(self.out / FILE, json.dumps(self.settings))

    def read_part(self, name: str) -> Part | None:
        """A part by its name, or None if it is not complete."""
        from lavic.model.item_store import Part

        file = self.out / f"part-{name}.json"
        return Part(**json.loads(file.read_text("utf-8"))) if file.is_file() else None

    def record_part(self, part: Part) -> None:
        """Records that a part is complete."""
        atomic_write(self.out / f"part-{part.name}.json", json.dumps(asdict(part)))

    def remove_old(self, parts: Sequence[Part]) -> None:
        """Removes files of older parts, once the manifest lists only `parts`."""
        names = {*self.names, index_path(self.out, parts).stem.partition("-")[2]}
        for pattern in ("part-*.json", "items-*.jsonl", "items-*.safetensors", "tokens-*.safetensors"):
            for file in self.out.glob(pattern):
                if file.stem.partition("-")[2] not in names:
                    file.unlink(missing_ok=True)

    def _digest_keys(self) -> str:
        """Digest of the keys of all photos."""
        digest, separator = hashlib.sha256(), ""
        for number in range(len(self.photos)):
            for key in self.photos.keys(number):
                digest.update(f"{separator}{key}".encode())
                separator = "\n"
        return digest.hexdigest()

    def _existing_parts(self) -> Iterator[tuple[str, int]]:
        """Name and number of items of each part in the folder."""
        manifest = self.out / "manifest.json"
        if manifest.is_file():
            parts = json.loads(manifest.read_text("utf-8"))["parts"]
        else:
            parts = [json.loads(file.read_text("utf-8")) for file in self.out.glob("part-*.json")]
        yield from ((part["name"], part["items"]) for part in parts)

    def _check_catalogue(self, store: str) -> None:
        """Raises DataError if too many items of the store are missing in the sets."""
        parts, names = dict(self._existing_parts()), set(self.names)
        # Parts of this plan have no missing items.
        old = [path for name in parts if name not in names and (path := list_path(self.out, name)).is_file()]
        items = HashSet(np.concatenate([np.empty((0, 2), "<u8"), *(hash_texts(_items(path)) for path in old)]))
        missing = np.ones(len(items), bool)
        for number in range(len(self.photos)) if len(items) else ():
            positions = items.find(self.photos.items(number))
            missing[positions[positions >= 0]] = False
        total = sum(parts.values())
        if missing.sum() > MAX_LOST * total:
            first = min(id for path in old for id in _missing_items(path, items, missing))
            raise DataError(
                f"{self.out}: {store} of another catalogue: {missing.sum():,} of its {total:,} items are not in the "
                f"sets (first: {first}): use another --out, or remove it"
            )


def _items(path: Path) -> Iterator[str]:
    """The item ids in a list of a store."""
    with path.open("rb") as lines:
        yield from (item_of(json.loads(line)["key"]) for line in lines)


def _missing_items(path: Path, items: HashSet, missing: np.ndarray) -> Iterator[str]:
    ids = list(_items(path))
    yield from (id for id, position in zip(ids, items.find(hash_texts(ids)), strict=True) if missing[position])
