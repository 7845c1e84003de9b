"""The item store: every item's [CLS] vectors, made once, read by memory map.

STORE/tokens-<part>.safetensors   "tokens" [n, views, d_vision], before the projector
STORE/items-<part>.jsonl          one line per row: id, photo key, title, and views where they are fewer (rest: zeros)
STORE/vision_adapter/             a copy of the adapter that made the tokens; absent for a store of the plain base model
STORE/manifest.json               names the parts, written last: a store without it is not whole

Files are mapped when a store is opened, so one that is open outlives their removal when the store grows.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from lavic.errors import DataError, first_line
from lavic.model import lora, prompts
from lavic.model.loading import Backbone
from lavic.model.tiling import Geometry
from lavic.storage.atomic import write_whole, written_aside
from lavic.tracking.run_metadata import versions

FORMAT = 1
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Part:
    """One file of tokens with its list of items."""

    name: str
    items: int
    sha256: str
    """Of the tokens file."""
    items_sha256: str = ""
    """Of the list of items; empty in stores that were made before it was recorded."""


@dataclass(frozen=True, kw_only=True)
class StoreManifest:
    """What a store holds and what made it."""

    base: str
    """Name of the base model."""
    fingerprint: str
    """Of the base model's weights."""
    vision_adapter: str | None
    """Digest of the vision adapter; None for the plain base model."""
    geometry: dict[str, object]
    """Of the views."""
    width: int
    """d_vision"""
    parts: tuple[Part, ...]
    prompt_version: str = prompts.VERSION
    """Of the words that the vision adapter was trained with."""
    dtype: str = ""
    """In which the vision tower computed; empty in stores that were made before it was recorded."""
    format: int = FORMAT
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def views(self) -> int:
        """Rows kept for each item."""
        return int(self.geometry["views"])  # type: ignore[call-overload]

    @classmethod
    def read(cls, folder: Path) -> StoreManifest:
        path = folder / "manifest.json"
        if not path.is_file():
            raise DataError(f"{folder}: not a whole item store (no manifest.json): run `lavic embed` again")
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            if raw["format"] != FORMAT:
                raise DataError(f"{path}: format {raw['format']}, this version reads {FORMAT}: run `lavic embed` again")
            raw["parts"] = tuple(Part(**part) for part in raw["parts"])
            manifest = cls(**raw)
            _ = manifest.views
            return manifest
        except (KeyError, TypeError, json.JSONDecodeError) as e:
            raise DataError(f"{path}: not the manifest of an item store ({e})") from e


class ItemStore:
    """A whole store, opened for reading. Rows are read when they are asked for."""

    def __init__(self, folder: Path, manifest: StoreManifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.ids: list[str] = []
        self._titles: list[str] = []
        self._keys: list[str] = []
        self._tensors: list[torch.Tensor] = []
        self._headers: list[bytes] = []
        self._unchecked = set(range(len(manifest.parts)))
        self._place: dict[str, tuple[int, int]] = {}
        self._views: dict[str, int] = {}  # of the items that have fewer
        for number, part in enumerate(manifest.parts):
            tensor, header = _map_tokens(folder / f"tokens-{part.name}.safetensors", part, manifest)
            self._tensors.append(tensor)
            self._headers.append(header)
            # not splitlines(): a title may hold one of Unicode's own line separators
            for row, line in enumerate(_read_items(folder / f"items-{part.name}.jsonl", part)):
                item = _parse_item(line, folder / f"items-{part.name}.jsonl", row)
                self._place[item["id"]] = (number, row)
                self.ids.append(item["id"])
                self._titles.append(item["title"])
                self._keys.append(item["key"])
                if "views" in item:
                    self._views[item["id"]] = item["views"]
        self._index = {id: i for i, id in enumerate(self.ids)}

    @classmethod
    def open(cls, folder: str | Path) -> ItemStore:
        """Opens a store.

        Raises:
            DataError: It is not there, not whole, or not what its manifest says.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise DataError(f"{folder}: no such item store: make it with `lavic embed`")
        return cls(folder, StoreManifest.read(folder))

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, id: str) -> bool:
        return id in self._index

    def lookup(self, ids: Sequence[str]) -> torch.Tensor:
        """The tokens of some items, [n, views, d_vision], in the store's own precision; of absent views zeros.

        Raises:
            DataError: Names the ids that are not in the store.
        """
        unknown = [id for id in ids if id not in self._place]
        if unknown:
            shown = ", ".join(unknown[:3]) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
            raise DataError(f"{self.folder}: not in the item store: {shown}: embed their photos, or drop them")
        rows = [self._place[id] for id in ids]
        for part in {part for part, _ in rows} & self._unchecked:
            self._check(part)
        return torch.stack([self._tensors[part][row] for part, row in rows])

    def _check(self, number: int) -> None:
        """Compares a part with its digest when it is first read: to open a large store stays quick."""
        part = self.manifest.parts[number]
        path = self.folder / f"tokens-{part.name}.safetensors"
        digest = hashlib.sha256(self._headers[number])
        if part.items:
            digest.update(self._tensors[number].view(torch.uint8).numpy().data)
        if (found := digest.hexdigest()) != part.sha256:
            raise DataError(
                f"{path}: sha256 {found[:12]}..., the manifest says {part.sha256[:12]}...: the file was changed or is "
                "another store's; copy it again, or remove the store and run `lavic embed` again"
            )
        self._unchecked.discard(number)

    def count(self, id: str, most: int | None = None) -> int:
        """Tokens of an item, or of its first `most`."""
        views = self._views.get(id, self.manifest.views)
        return views if most is None else min(views, most)

    def tokens(self, ids: Sequence[str], most: int | None = None) -> torch.Tensor:
        """The tokens of some items one after the other, or of each its first `most`, [tokens, d_vision].

        Raises:
            DataError: Names the ids that are not in the store.
        """
        whole = self.lookup(ids)[:, :most]
        if not self._views:
            return whole.flatten(0, 1)
        return torch.cat([rows[: self.count(id, most)] for id, rows in zip(ids, whole, strict=True)])

    def title(self, id: str) -> str:
        return self._titles[self._index[id]]

    def key(self, id: str) -> str:
        """Key of the photo, in the shards, that the tokens were made of."""
        return self._keys[self._index[id]]

    @property
    def vision_adapter(self) -> Path | None:
        """Folder of the adapter that made the tokens."""
        return self.folder / "vision_adapter" if self.manifest.vision_adapter else None

    def check_adapter(self) -> None:
        """Refuses a store whose copy of the vision adapter is not the one that made the tokens.

        Raises:
            DataError: One line.
        """
        if (folder := self.vision_adapter) and (found := lora.digest(folder)) != self.manifest.vision_adapter:
            raise DataError(
                f"{folder}: its digest is {found}, the store's manifest records {self.manifest.vision_adapter}: copy "
                "it again from the bundle that made the store"
            )

    def check_geometry(self, geometry: Geometry) -> None:
        """Refuses photos that are cut in another way than the store's.

        Raises:
            DataError: One line.
        """
        if geometry.as_dict() != self.manifest.geometry:
            views = "lavic" if "grids" in self.manifest.geometry else "five"
            raise DataError(f"{self.folder}: an item store of photos cut otherwise: use --model.views {views}")

    def check_base(self, fingerprint: str) -> None:
        """Refuses a base model that did not make this store.

        Raises:
            DataError: One line.
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
        name: `00000` and so on.
        items: id, key and title of each row, and views where they are fewer than the tokens' rows.
        tokens: [n, views, d_vision]
    """
    from safetensors.torch import save

    data = save({"tokens": tokens.contiguous()})
    with written_aside(folder / f"tokens-{name}.safetensors") as file:
        file.write(data)
    lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    write_whole(folder / f"items-{name}.jsonl", lines)
    return Part(
        name=name,
        items=len(items),
        sha256=hashlib.sha256(data).hexdigest(),
        items_sha256=hashlib.sha256(lines.encode()).hexdigest(),
    )


def write_manifest(folder: Path, backbone: Backbone, adapter: Path | None, parts: Sequence[Part]) -> StoreManifest:
    """Copies the adapter and makes the store whole."""
    if adapter is not None:
        lora.copy_adapter(adapter, folder / "vision_adapter")
    manifest = StoreManifest(
        base=backbone.name,
        fingerprint=backbone.fingerprint,
        vision_adapter=lora.digest(adapter) if adapter else None,
        geometry=backbone.geometry.as_dict(),
        width=backbone.vision_width,
        parts=tuple(parts),
        prompt_version=prompts.VERSIONS[backbone.encoder.style],
        dtype=str(backbone.model.dtype).removeprefix("torch."),
        versions=versions("lavic", "torch", "transformers"),
    )
    write_whole(folder / "manifest.json", json.dumps(asdict(manifest), indent=2) + "\n")
    return manifest


def _read_items(path: Path, part: Part) -> list[bytes]:
    """The lines of a part's list of items, compared with the manifest."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): run `lavic embed` again") from None
    lines = data.split(b"\n")[:-1]  # not splitlines(): a title may hold one of Unicode's own line separators
    if len(lines) != part.items:
        raise DataError(f"{path}: {len(lines)} items, the manifest says {part.items}")
    if part.items_sha256 and hashlib.sha256(data).hexdigest() != part.items_sha256:
        raise DataError(f"{path}: it is not the list that the manifest records: run `lavic embed` again")
    return lines


def _parse_item(line: bytes, path: Path, row: int) -> dict[str, Any]:
    """One line of a list of items, which in older stores has no digest."""
    try:
        item = json.loads(line)
        _ = item["id"], item["key"], item["title"]
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}:{row + 1}: not an item ({first_line(error)}): run `lavic embed` again") from None
    return dict(item)


def _map_tokens(path: Path, part: Part, manifest: StoreManifest) -> tuple[torch.Tensor, bytes]:
    """Maps a tokens file into memory without reading it; and what stands before its numbers."""
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as e:
        raise DataError(f"{path}: {e}") from e
    try:
        header_bytes = int.from_bytes(mapped[:8], "little")
        header = json.loads(mapped[8 : 8 + header_bytes])["tokens"]
        shape, dtype = tuple(header["shape"]), DTYPES[header["dtype"]]
        start, end = header["data_offsets"]
        whole = len(mapped) == 8 + header_bytes + end and not start
    except (KeyError, ValueError, UnicodeDecodeError) as e:
        raise DataError(f"{path}: not a tokens file ({e})") from e
    expected = (part.items, manifest.views, manifest.width)
    if not whole or shape != expected:
        raise DataError(f"{path}: {shape} in {len(mapped)} bytes, the manifest says {expected}")
    count = shape[0] * shape[1] * shape[2]
    before = bytes(mapped[: 8 + header_bytes])
    if not count:
        return torch.empty(shape, dtype=dtype), before
    return torch.frombuffer(mapped, dtype=dtype, count=count, offset=len(before)).view(shape), before
