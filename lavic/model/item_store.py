"""The item store: the [CLS] vectors of every item, computed once and memory-mapped.

STORE/tokens-<part>.safetensors   "tokens" [n, views, d_vision], before the projector
STORE/items-<part>.jsonl          one line per row: id, photo key, title, and views if they are fewer (others are zeros)
STORE/vision_adapter/             a copy of the adapter of the tokens; absent for a store of the plain base model
STORE/items-<digest>.safetensors  the index of the lists, built again if it is missing
STORE/manifest.json               lists the parts; written last: a store without it is not complete

Files are mapped when a store is opened, so an open store remains readable when its files are replaced. Processes share
the memory of a mapped file, which needs no file descriptor. A server reads the files instead (`mapped=False`), because
truncating a mapped file kills the process.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from lavic.data.index.item_index import Item, ItemIds, ItemIndex, list_path, write_item_index
from lavic.errors import DataError, first_names
from lavic.model import lora, prompts
from lavic.model.loading import Backbone
from lavic.model.tiling import Geometry
from lavic.model.token_file import MappedTokens, ReadTokens
from lavic.storage.atomic import atomic_open, atomic_write
from lavic.storage.checksummed_json import digest_json
from lavic.tracking.run_metadata import versions

FORMAT = 1
MAX_OPEN = 512
"""Limit of parts that are read instead of mapped; each is an open file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One file of tokens with its list of items."""

    name: str
    items: int
    sha256: str
    """Digest of the tokens file."""
    items_sha256: str = ""
    """Digest of the list of items; empty in stores of older versions."""


@dataclass(frozen=True, kw_only=True)
class StoreManifest:
    """The parts of a store, and the model of its tokens."""

    base: str
    """Name of the base model."""
    fingerprint: str
    """Digest of the base model's weights."""
    vision_adapter: str | None
    """Digest of the vision adapter; None for the plain base model."""
    geometry: dict[str, object]
    """Geometry of the views."""
    width: int
    """d_vision"""
    parts: tuple[Part, ...]
    shards: tuple[str, ...] = ()
    """Digests of the sets of shards with the photos; empty in stores of older versions."""
    prompt_version: str = prompts.VERSION
    """Version of the prompts in the vision adapter's training."""
    dtype: str = ""
    """Precision of the vision tower; empty in stores of older versions."""
    format: int = FORMAT
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Digest of the manifest."""
        return digest_json(asdict(self))

    @property
    def part_digests(self) -> tuple[str, ...]:
        """A digest of the tokens and items of each part, 16 digits."""
        return tuple(digest_json({"tokens": part.sha256, "items": part.items_sha256})[:16] for part in self.parts)

    @property
    def views(self) -> int:
        """Rows of each item."""
        return int(self.geometry["views"])  # type: ignore[call-overload]

    @classmethod
    def read(cls, folder: Path) -> StoreManifest:
        path = folder / "manifest.json"
        if not path.is_file():
            raise DataError(f"{folder}: not a complete item store (no manifest.json): run `lavic embed` again")
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(raw["format"], int):  # of a retrieval index, of a set of shards
                raise DataError(f"{path}: not the manifest of an item store: name the --out of `lavic embed`")
            if raw["format"] != FORMAT:
                raise DataError(f"{path}: format {raw['format']}, this version reads {FORMAT}: run `lavic embed` again")
            raw["shards"] = tuple(raw.get("shards", ()))
            raw["parts"] = tuple(Part(**part) for part in raw["parts"])
            manifest = cls(**raw)
            _ = manifest.views
            return manifest
        except (KeyError, TypeError, json.JSONDecodeError) as e:
            raise DataError(f"{path}: not the manifest of an item store ({e})") from e


class ItemStore:
    """A complete store, opened for reading. Rows are read on demand."""

    def __init__(self, folder: Path, manifest: StoreManifest, *, mapped: bool = True) -> None:
        self.folder, self.manifest = folder, manifest
        kind = MappedTokens if mapped or len(manifest.parts) > MAX_OPEN else ReadTokens
        self._files = [
            kind(folder / f"tokens-{part.name}.safetensors", (part.items, manifest.views, manifest.width))
            for part in manifest.parts
        ]
        self._checked = bytearray(len(manifest.parts))
        self.items = ItemIndex.open(folder, manifest.parts)
        if not mapped:
            self.items.copy_to_memory()

    @classmethod
    def open(cls, folder: str | Path, *, mapped: bool = True) -> ItemStore:
        """Opens a store.

        Args:
            folder: The store.
            mapped: False reads its files instead of mapping them, and takes 20 bytes an item in memory. A store of more
                than `MAX_OPEN` parts is always mapped.

        Raises:
            DataError: It is missing or incomplete, or does not match its manifest.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise DataError(f"{folder}: no such item store: build it with `lavic embed`")
        manifest = StoreManifest.read(folder)
        while True:
            try:
                return cls(folder, manifest, mapped=mapped)
            except DataError:
                # `lavic embed` removes the files of older parts once the manifest lists the new ones.
                if (changed := StoreManifest.read(folder)) == manifest:
                    raise
                manifest = changed

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.folder, self.manifest.digest)

    @property
    def ids(self) -> ItemIds:
        """The ids of all items, read on demand."""
        return self.items.ids

    def __len__(self) -> int:
        return len(self.items)

    def __contains__(self, id: str) -> bool:
        return id in self.items

    def lookup(self, ids: Sequence[str]) -> torch.Tensor:
        """The tokens of items, [n, views, d_vision], in the store's precision; zeros for absent views.

        Raises:
            DataError: An item is not in the store; names the ids.
        """
        items = {id: self.items.find(id) for id in ids}
        if unknown := [id for id, item in items.items() if item is None]:
            names = first_names(unknown, 3)
            raise DataError(f"{self.folder}: not in the item store: {names}: embed their photos, or remove them")
        positions = {id: self.items.place_of(item.row) for id, item in items.items() if item}
        for number in {number for number, _ in positions.values()}:
            if not self._checked[number]:
                self._check(number)
        return torch.stack([self._files[number][row] for number, row in (positions[id] for id in ids)])

    def _check(self, number: int) -> None:
        """Compares a part with its digest when it is first read, so that opening a large store is fast."""
        part = self.manifest.parts[number]
        path = self.folder / f"tokens-{part.name}.safetensors"
        digest = self._files[number].digest()
        if digest != part.sha256:
            raise DataError(
                f"{path}: sha256 {digest[:12]}... differs from the manifest's ({part.sha256[:12]}...): the file was "
                "changed or is from another store; copy it again, or remove the store and run `lavic embed` again"
            )
        self._checked[number] = True

    def count(self, id: str, max_tokens: int | None = None) -> int:
        """The number of an item's tokens, at most `max_tokens`."""
        views = self._item(id).views or self.manifest.views
        return views if max_tokens is None else min(views, max_tokens)

    def tokens(self, ids: Sequence[str], max_tokens: int | None = None) -> torch.Tensor:
        """The concatenated tokens of items, of each at most the first `max_tokens`, [tokens, d_vision].

        Raises:
            DataError: An item is not in the store; names the ids.
        """
        rows = self.lookup(ids)[:, :max_tokens]
        counts = [self.count(id, max_tokens) for id in ids]
        if all(count == rows.shape[1] for count in counts):
            return rows.flatten(0, 1)
        return torch.cat([views[:count] for views, count in zip(rows, counts, strict=True)])

    def title(self, id: str) -> str:
        return self._item(id).title

    def key(self, id: str) -> str:
        """Key, in the shards, of the photo that the tokens were computed from."""
        return self._item(id).key

    def _item(self, id: str) -> Item:
        item = self.items.find(id)
        if item is None:
            raise KeyError(id)
        return item

    @property
    def vision_adapter(self) -> Path | None:
        """Folder of the adapter of the tokens."""
        return self.folder / "vision_adapter" if self.manifest.vision_adapter else None

    def check_adapter(self) -> None:
        """Compares the store's copy of the vision adapter with its digest.

        Raises:
            DataError: It differs.
        """
        if (folder := self.vision_adapter) and (digest := lora.digest(folder)) != self.manifest.vision_adapter:
            raise DataError(
                f"{folder}: its digest is {digest}, the store's manifest records {self.manifest.vision_adapter}: copy "
                "it again from the bundle that the store was built with"
            )

    def check_geometry(self, geometry: Geometry) -> None:
        """Compares the geometry of photos with the store's.

        Raises:
            DataError: It differs.
        """
        if geometry.as_dict() != self.manifest.geometry:
            views = "lavic" if "grids" in self.manifest.geometry else "five"
            raise DataError(f"{self.folder}: an item store with other views of the photos: use --model.views {views}")

    def check_base(self, fingerprint: str) -> None:
        """Compares the fingerprint of a base model with that of the store's.

        Raises:
            DataError: It differs.
        """
        if fingerprint != self.manifest.fingerprint:
            raise DataError(
                f"{self.folder}: an item store of another base model ({self.manifest.base}, "
                f"{self.manifest.fingerprint}) than the one loaded ({fingerprint}): embed the catalogue again"
            )


def write_part(folder: Path, name: str, items: Sequence[Mapping[str, Any]], tokens: torch.Tensor) -> Part:
    """Writes one part, the list of items last.

    Args:
        folder: The store.
        name: Of the part.
        items: id, key and title of each row, and views if they are fewer than the tokens' rows.
        tokens: [n, views, d_vision]
    """
    from safetensors.torch import save

    data = save({"tokens": tokens.contiguous()})
    with atomic_open(folder / f"tokens-{name}.safetensors") as file:
        file.write(data)
    lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    atomic_write(list_path(folder, name), lines)
    return Part(
        name=name,
        items=len(items),
        sha256=hashlib.sha256(data).hexdigest(),
        items_sha256=hashlib.sha256(lines.encode()).hexdigest(),
    )


def write_manifest(
    folder: Path, backbone: Backbone, adapter: Path | None, parts: Sequence[Part], *, shards: Sequence[str] = ()
) -> StoreManifest:
    """Completes a store: copies the adapter, builds the index, writes the manifest.

    Args:
        adapter: Folder of the vision adapter, if the model has one.
        shards: Digests of the sets of shards with its photos.
    """
    if adapter is not None:
        lora.copy_adapter(adapter, folder / "vision_adapter")
    manifest = StoreManifest(
        base=backbone.name,
        fingerprint=backbone.fingerprint,
        vision_adapter=lora.digest(adapter) if adapter else None,
        geometry=backbone.geometry.as_dict(),
        width=backbone.vision_width,
        parts=tuple(parts),
        shards=tuple(shards),
        prompt_version=backbone.encoder.version,
        dtype=str(backbone.model.dtype).removeprefix("torch."),
        versions=versions("lavic", "torch", "transformers"),
    )
    write_item_index(folder, manifest.parts)
    atomic_write(folder / "manifest.json", json.dumps(asdict(manifest), indent=2) + "\n")
    return manifest


def _reopen(folder: Path, digest: str) -> ItemStore:
    """A store in another process."""
    store = ItemStore.open(folder)
    if store.manifest.digest != digest:
        raise DataError(f"{folder}: the item store changed while in use; run the command again")
    return store
