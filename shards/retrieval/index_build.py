"""The index of a `lavic retrieve`: used as it is, or built and extended."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from lavic.config import flatten
from lavic.data.index.item_index import ItemIndex
from lavic.errors import DataError, LavicError
from lavic.recommend.retrieval.build import (
    Make,
    add_methods,
    as_recorded,
    is_usable,
    open_table,
    out_of_date,
    prepare_index,
)
from lavic.recommend.retrieval.catalog_rows import CatalogRows, files_state
from lavic.recommend.retrieval.item_table import ItemTable
from lavic.recommend.retrieval.manifest import FILE, PLACES, IndexManifest, identity
from lavic.recommend.retrieval.vectors.approximate import searches_as
from lavic.shards.retrieval.methods import builders, recorded_builder
from lavic.shards.retrieval.settings import RetrieveSettings
from lavic.storage.output_folder import lock_output_folder


def make_index(chosen: RetrieveSettings, make: Make | None = None) -> IndexManifest:
    """Makes the index, adds what it lacks, or checks that it is the one that is wanted.

    Raises:
        DataError: It is of another catalogue, of other texts or of other settings.
    """
    store = ItemIndex.of_store(chosen.store) if chosen.store else None
    if chosen.store is not None and store is None:
        raise DataError(f"--store {chosen.store}: not a whole item store: name the --out of `lavic embed`")
    if (complete := _complete_index(chosen)) is not None:
        _print_index(chosen.index, complete)
        _check_store(chosen)
        _record_places(chosen, complete)
        return complete
    with lock_output_folder(chosen.index):
        if not chosen.items:
            manifest, before = IndexManifest.read(chosen.index), None
            _check_store(chosen)
        else:
            rows = CatalogRows(chosen.items, chosen.text, store)
            manifest, before = prepare_index(
                chosen.index,
                rows,
                text=flatten(chosen.text),
                extend=chosen.extend,
                files=files_state(chosen.items, chosen.store),
                counts=rows.counts,
            )
        _print_index(chosen.index, manifest)
        unrequested = [
            recorded_builder(name, record, chosen, make)
            for name, record in (before.methods if before is not None else {}).items()
            if name not in chosen.methods
        ]
        return add_methods(
            chosen.index,
            manifest,
            builders(chosen, make),
            before,
            approximate=chosen.approximate,
            unrequested=unrequested,
        )


def _complete_index(chosen: RetrieveSettings) -> IndexManifest | None:
    """The index, if nothing is to be added to it: it is read without its lock, by any number of commands."""
    if not (chosen.index / FILE).is_file():
        return None
    manifest = IndexManifest.read(chosen.index)
    same_methods = not chosen.items or (
        manifest.text == as_recorded(flatten(chosen.text))
        and bool(manifest.catalogue_files)  # a catalogue that is elsewhere is read to tell
        and manifest.catalogue_files == files_state(chosen.items, chosen.store)
    )
    all_complete = all(
        (record := manifest.methods.get(builder.name)) is not None
        and identity(record.settings) == identity(as_recorded(builder.settings))
        and not out_of_date(record, builder)
        and is_usable(chosen.index, record)
        and (record.kind == "bm25" or searches_as(record, chosen.approximate))
        for builder in builders(chosen)
    )
    return manifest if same_methods and all_complete and open_table(chosen.index, manifest) is not None else None


def _record_places(chosen: RetrieveSettings, manifest: IndexManifest) -> None:
    """Records where models lie now that are no longer where they were; not if the index cannot be written now."""
    moved = {
        builder.name: replace(record, settings=as_recorded(builder.settings))
        for builder in builders(chosen)
        if (record := manifest.methods[builder.name]).settings != as_recorded(builder.settings)
        and not all(Path(str(record.settings[name])).exists() for name in PLACES if name in record.settings)
    }
    if moved:
        with suppress(LavicError, OSError), lock_output_folder(chosen.index, timeout_s=0.0):
            if IndexManifest.read(chosen.index) == manifest:  # another command may have added to it
                replace(manifest, methods={**manifest.methods, **moved}).write(chosen.index)


def _check_store(chosen: RetrieveSettings) -> None:
    """Refuses an index with items that the store does not hold, where there is no catalogue to make another one of.

    Raises:
        DataError: One line.
    """
    manifest = IndexManifest.read(chosen.index)
    if chosen.store is None or chosen.items or (store := ItemIndex.of_store(chosen.store)) is None:
        return
    if all(manifest.catalogue_files.get(path) == state for path, state in files_state((), chosen.store).items()):
        return  # it was made of this store's items
    table = ItemTable(chosen.index / manifest.table, manifest.catalogue)
    if lacking := sum(id not in store for id in table.ids):
        raise DataError(
            f"--store {chosen.store}: lacks {lacking:,} of the {manifest.items:,} items of the index {chosen.index}: "
            "name the catalogue too (--items) and another --index, or leave --store out"
        )


def _print_index(folder: Path, manifest: IndexManifest) -> None:
    left_out = {reason: count for reason, count in manifest.counts.items() if count and reason != "rows"}
    reasons = "".join(f"; {reason} {count:,}" for reason, count in left_out.items())
    print(
        f"{folder}: {manifest.items:,} items of {manifest.counts.get('rows', manifest.items):,} rows{reasons}",
        flush=True,
    )
