"""Builds an index, continues an incomplete build, and adds to an index.

The manifest is written when the items stand, and again after each method; files of vectors that a stopped build left
are kept. A larger catalogue (`extend`) leaves the index as it is until all its methods have been made for it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lavic.errors import ConfigError, DataError
from lavic.recommend.retrieval.bm25.build import KIND as BM25_KIND
from lavic.recommend.retrieval.bm25.build import VOCABULARY
from lavic.recommend.retrieval.item_table import ItemTable, Row, is_readable, write_item_table
from lavic.recommend.retrieval.manifest import FILE, IndexManifest, MethodRecord, identity
from lavic.recommend.retrieval.vectors.approximate import ApproximateSettings, approximate_is_whole, with_approximate
from lavic.recommend.retrieval.vectors.chunks import (
    CHUNK_ROWS,
    Chunk,
    is_complete,
    make_chunk,
    plan_chunks,
    vectors_record,
)
from lavic.recommend.retrieval.vectors.chunks import KIND as VECTORS_KIND
from lavic.tracking.progress import progress_bar
from lavic.tracking.run_metadata import versions

FILE_TYPES = (".safetensors", ".faiss")
"""Endings of an index's files, besides its manifest."""


class MethodBuilder(Protocol):
    """Makes the files of one method."""

    @property
    def name(self) -> str:
        """Name of the method."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """What its results depend on."""

    @property
    def parts(self) -> tuple[str, ...]:
        """See `MethodRecord`; empty for a method that reads no store, or where none is named."""

    def build(self, folder: Path, table: ItemTable, previous: MethodRecord | None = None) -> MethodRecord:
        """Makes what is missing.

        Args:
            folder: The index.
            table: Its items.
            previous: The existing record of the same settings: of a smaller catalogue whose rows are the first of
                `table`, or of another state of the item store.
        """


class Make(Protocol):
    """Makes files of vectors, wherever it is done."""

    def __call__(
        self,
        table: ItemTable,
        chunks: Sequence[Chunk],
        previous: MethodRecord | None,
        settings: Mapping[str, Any],
        done: Callable[[int], None],
    ) -> None:
        """Makes chunks; `done` is called with the number of items of each."""


@dataclass
class VectorBuilder:
    """Makes the vectors of a method from the items' texts, in this process or by what `make` starts."""

    name: str
    settings: Mapping[str, Any]
    embed: Callable[[], Callable[[Sequence[str]], np.ndarray]]
    """Loads a model; returns its function from texts to vectors."""
    make: Make | None = None
    """Makes chunks elsewhere (on Ray); None makes them here."""
    chunk_rows: int = CHUNK_ROWS
    parts: tuple[str, ...] = ()

    def build(self, folder: Path, table: ItemTable, previous: MethodRecord | None = None) -> MethodRecord:
        """See `MethodBuilder`."""

        def load() -> Callable[[Chunk], object]:
            embed = self.embed()
            return lambda chunk: make_chunk(folder, chunk, table, embed, previous)

        chunks = plan_chunks(self.name, self.settings, table, self.chunk_rows)
        return build_chunks(self, folder, table, chunks, previous, self.make, load)


def build_chunks(
    builder: MethodBuilder,
    folder: Path,
    table: ItemTable,
    chunks: Sequence[Chunk],
    previous: MethodRecord | None,
    make: Make | None,
    load: Callable[[], Callable[[Chunk], object]],
) -> MethodRecord:
    """Makes the missing files of a method: by `make`, or without it by the function that `load` returns."""
    missing = [chunk for chunk in chunks if not is_complete(folder, chunk)]
    if missing:
        remaining = sum(chunk.file.rows for chunk in missing)
        with progress_bar(len(table), "items", builder.name, initial=len(table) - remaining) as bar:
            if make is not None:
                make(table, missing, previous, builder.settings, bar.update)
            else:
                make_file = load()
                for chunk in missing:
                    make_file(chunk)
                    bar.update(chunk.file.rows)
    return vectors_record(folder, builder.settings, chunks, builder.parts)


def prepare_index(
    folder: Path,
    rows: Callable[[], Iterable[Row]],
    *,
    text: Mapping[str, Any],
    extend: bool = False,
    files: Mapping[str, Any] | None = None,
    counts: Callable[[], Mapping[str, int]] = dict,
) -> tuple[IndexManifest, IndexManifest | None]:
    """The items of an index: written at first use, compared with the catalogue later.

    The caller holds the folder's lock.

    Args:
        folder: The index.
        rows: Reads the catalogue.
        text: Settings of the items' texts.
        extend: Takes a larger catalogue.
        files: What tells that the catalogue's files are the same as before; then they are not read again.
        counts: Rows of the catalogue that were left out, by reason, when it has been read.

    Returns:
        The manifest to add methods to; and, where the catalogue has grown or its table was lost, the one that is in
        place until they are added.

    Raises:
        DataError: The index is of another catalogue or of other texts.
    """
    text = as_recorded(text)
    previous = IndexManifest.read(folder) if (folder / FILE).is_file() else None
    if previous is None:
        if other_files := [path.name for path in folder.glob("[!.]*") if path.suffix not in FILE_TYPES]:
            raise ConfigError(f"{folder}: not an index, but not empty ({other_files[0]}): use a folder of its own")
        table, row_counts = write_item_table(folder, rows())
        manifest = IndexManifest(
            catalogue=table.digest,
            items=len(table),
            table=table.path.name,
            text=dict(text),
            counts={**row_counts, **counts()},
            catalogue_files=dict(files or {}),
            versions=versions("lavic", "bm25s", "faiss-cpu", "sentence-transformers"),
        )
        manifest.write(folder)
        return manifest, None
    if previous.text != text:
        raise DataError(f"{folder}: the index has other texts ({previous.text}, now {dict(text)}): use another --index")
    old = open_table(folder, previous)
    if old is not None and files and previous.catalogue_files == files:
        return previous, None
    table, row_counts = write_item_table(folder, rows(), old=old if extend else None)
    all_counts = {**row_counts, **counts()}
    if table.digest == previous.catalogue:
        manifest = replace(previous, catalogue_files=dict(files or {}), counts=all_counts)
        if table.path.name != previous.table:  # the same items in another order
            if old is None:
                # the files are about rows of the lost table: all methods are made again
                fileless = {name: replace(record, files=()) for name, record in previous.methods.items()}
                return replace(manifest, table=table.path.name, methods={}), replace(previous, methods=fileless)
            table.path.unlink()
        manifest.write(folder)
        return manifest, None
    if not extend or old is None:
        with suppress(OSError):
            table.path.unlink()
        if old is None:
            raise DataError(
                f"{folder / previous.table}: missing or damaged, and the catalogue is another one now: make the index "
                "in another folder"
            )
        raise DataError(
            f"{folder}: the index is of another catalogue ({previous.items:,} items, now {len(table):,}, or other "
            "texts): --extend adds new items to it; else use another --index"
        )
    grown = replace(
        previous,
        catalogue=table.digest,
        items=len(table),
        table=table.path.name,
        counts=all_counts,
        catalogue_files=dict(files or {}),
        methods={},
    )
    return grown, previous


def add_methods(
    folder: Path,
    manifest: IndexManifest,
    builders: Iterable[MethodBuilder],
    smaller_index: IndexManifest | None = None,
    *,
    approximate: ApproximateSettings | None = None,
    unrequested: Iterable[MethodBuilder] = (),
) -> IndexManifest:
    """Makes the methods that an index lacks.

    Args:
        folder: The index.
        manifest: By `prepare_index`.
        builders: Of the methods that are wanted.
        smaller_index: By `prepare_index`: its methods are all made for the larger index before that replaces it.
        approximate: How to search among vectors; None, or one that names no index, leaves that as it is.
        unrequested: Of the methods that a growing index has besides; they are searched as before.

    Raises:
        DataError: The index has a method with other settings, or one that there is no builder for while it grows.
    """
    table = ItemTable(folder / manifest.table, manifest.catalogue)
    requested = {builder.name: builder for builder in builders}
    all_builders = {**{builder.name: builder for builder in unrequested}, **requested}
    if smaller_index is not None and (
        without_builder := [name for name in smaller_index.methods if name not in all_builders]
    ):
        raise DataError(
            f"{folder}: the index has `{without_builder[0]}` too: name it in --methods, so that it grows as well"
        )
    for name, builder in all_builders.items():
        smaller = smaller_index.methods.get(name) if smaller_index is not None else None
        for record in (manifest.methods.get(name), smaller):
            if record is not None and (changed := _changed(record.settings, builder.settings)):
                raise DataError(f"{folder}: `{name}` was made with other settings ({changed}): use another --index")
        existing = manifest.methods.get(name)
        if existing is None or out_of_date(existing, builder) or not is_whole(folder, existing):
            record = builder.build(folder, table, existing or smaller)
        else:
            record = existing
        search_settings = _approximate_settings(existing or smaller)
        if name in requested and approximate is not None and approximate.index is not None:
            search_settings = approximate
        if search_settings is not None and record.kind == "vectors":
            record = with_approximate(folder, record, search_settings, table.rank)
        if record == existing:
            continue
        manifest = replace(manifest, methods={**manifest.methods, name: record})
        if smaller_index is None:
            manifest.write(folder)
    if smaller_index is not None:
        manifest.write(folder)
    remove_unused_files(folder, manifest, all_builders)
    return manifest


def open_table(folder: Path, manifest: IndexManifest) -> ItemTable | None:
    """The items of an index; None where their file is missing or damaged."""
    try:
        return ItemTable(folder / manifest.table, manifest.catalogue)
    except DataError:
        return None


def is_whole(folder: Path, record: MethodRecord) -> bool:
    """Whether all files of a method are there and whole, but for those of approximate search."""
    for file in record.files:
        kind = VECTORS_KIND if record.kind == "vectors" else BM25_KIND if file.rows_from_items else VOCABULARY
        if not is_readable(folder / file.name, kind, file.source):
            return False
    return True


def is_usable(folder: Path, record: MethodRecord) -> bool:
    """Whether a method can be searched: all its files are there and whole."""
    return is_whole(folder, record) and approximate_is_whole(folder, record)


def out_of_date(record: MethodRecord, builder: MethodBuilder) -> bool:
    """Whether items of the builder's store were embedded since a method was made."""
    return bool(builder.parts) and record.parts != builder.parts


def _approximate_settings(record: MethodRecord | None) -> ApproximateSettings | None:
    """How a method is searched, where that is not exactly."""
    return ApproximateSettings(**record.approximate["settings"]) if record is not None and record.approximate else None


def remove_unused_files(folder: Path, manifest: IndexManifest, methods: Iterable[str]) -> None:
    """Removes files that the manifest does not name: of the items, and of methods that have been made.

    Those of other methods may be the part of a build that was stopped and will be continued.
    """
    names = manifest.file_names()
    prefixes = ("items-", *(f"{name}-" for name in methods))
    for path in folder.glob("[!.]*"):
        if path.suffix in FILE_TYPES and path.name not in names and path.name.startswith(prefixes):
            path.unlink(missing_ok=True)


def as_recorded(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they are read from a manifest: JSON has no tuples."""
    recorded: dict[str, Any] = json.loads(json.dumps(settings))
    return recorded


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    before, now = identity(before), identity(as_recorded(now))
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return "; ".join(f"{name} was {before.get(name)}, is {now.get(name)}" for name in names[:3])
