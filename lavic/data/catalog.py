"""Items of a catalogue, streamed from files in any supported format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lavic.data.schema import SIZES, ImageSize, Item, item_from_meta
from lavic.data.sources.json_records import json_records
from lavic.data.sources.record import BadRecord, OnError, Record, report
from lavic.data.sources.tables import CSV, LIST, PARQUET, csv_records, items_of_links, link_records, parquet_records
from lavic.errors import DataError, first_line
from lavic.storage.compression import unpacked_name
from lavic.storage.json_text import json_type
from lavic.storage.paths import options, storage_errors
from lavic.storage.text_files import open_text_file

_PARQUET_MAGIC = b"PAR1"


def read_items(
    paths: Sequence[str | Path],
    errors: OnError | None = None,
    *,
    sizes: Sequence[ImageSize] = SIZES,
    columns: Mapping[str, str] | None = None,
) -> Iterator[Item]:
    """Reads items in the order of the files; holds one record and one chunk of text at a time.

    Args:
        paths: Files, globs (sorted) and URIs that fsspec knows (`s3://...`) in one of the formats: LaViC
            `item2meta_train.json` ({id: meta}), `item2meta_valid.jsonl`, Amazon Reviews 2023 `meta_*.jsonl`, a JSON
            list; parquet; with `columns` also csv, tsv and lists of links (.txt). Text may be compressed (gzip, bzip2,
            xz, zstd) or UTF-16, which is detected by content.
        errors: Called with every record that cannot be read, which is then skipped; by default the first one is raised.
        sizes: Sizes of a photo by preference: the first that is linked is used.
        columns: For files with a link in each row: the column of each field (`id`, `url`, `title`, `text`). See
            `items_of_links`.

    Raises:
        DataError: A file is missing or, without `errors`, a record cannot be read; the message names file and line.
    """
    for path in find_files(paths):
        records = _records(path, errors, columns or {})
        if columns:
            yield from items_of_links(records, columns, errors)
            continue
        for record in records:
            try:
                if not isinstance(record.value, dict):
                    raise ValueError(f"{json_type(record.value)} where an object with one item was expected")
                yield item_from_meta(record.value, record.id, sizes)
            except ValueError as error:
                report(BadRecord(record.file, record.line, str(error)), errors)


def find_files(paths: Sequence[str | Path]) -> list[str]:
    """The distinct files of paths, globs and URIs, in order.

    A name is a glob only if there is no file of that name, so `[2023] raw/meta.jsonl` works.

    Raises:
        DataError: A path or glob matches no file.
    """
    unique: dict[str, None] = {}
    for path in map(str, paths):
        if not path.strip():
            raise DataError("an empty path among the catalogue files")
        if "://" in path:
            files = _remote(path)
        elif Path(path).is_file():
            files = [path]
        else:
            files = _glob(path)
        if not files:
            problem = "is a folder: name its files, as DIR/*.jsonl" if Path(path).is_dir() else "no such catalogue file"
            raise DataError(f"{path}: {problem}")
        unique.update(dict.fromkeys(files))
    return list(unique)


def check_readable(paths: Sequence[str | Path]) -> None:
    """Opens each file of `find_files`. Raises DataError where one is missing or cannot be read."""
    for path in find_files(paths):
        with open_text_file(path):
            pass


def _glob(path: str) -> list[str]:
    """The files that a glob matches, sorted; its leading folders that exist are taken literally."""
    parts = Path(path).parts
    count = next((n for n in range(len(parts), 0, -1) if Path(*parts[:n]).exists()), 0)
    folder, pattern = Path(*parts[:count]), "/".join(parts[count:])
    try:
        return sorted(str(file) for file in folder.glob(pattern) if file.is_file()) if pattern else []
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None


def _remote(path: str) -> list[str]:
    import fsspec

    try:
        fs, inner = fsspec.core.url_to_fs(path, **options(path))
        files = [inner] if fs.isfile(inner) else sorted(fs.glob(inner)) if any(c in inner for c in "*?[") else []
    except storage_errors(ImportError, ValueError) as error:
        raise DataError(f"{path}: cannot be opened ({first_line(error)})") from None
    return [fs.unstrip_protocol(file) for file in files]


def _records(path: str, errors: OnError | None, columns: Mapping[str, str]) -> Iterator[Record]:
    name = unpacked_name(path).lower()
    names = list(dict.fromkeys(columns.values()))
    if name.endswith(PARQUET):
        yield from parquet_records(path, errors, names)
        return
    with open_text_file(path) as file:
        head = file.peek()[:5]
        # A text may start with the magic number too; in parquet a control character follows it.
        if head.startswith(_PARQUET_MAGIC) and head[4:] < b"\x20":
            yield from parquet_records(path, errors, names)
            return
        if name.endswith(CSV):
            yield from csv_records(path, file, errors, names)
        elif name.endswith(LIST) and not head.lstrip().startswith((b"{", b"[")):
            if set(columns) != {"url"}:
                raise DataError(f"{path}: a list of links is read with --columns url=url, and without other columns")
            yield from link_records(path, file, errors, columns["url"])
        else:
            yield from json_records(path, file, errors, is_json=name.endswith(".json"), keyed=not columns)
        if file.trailing and errors:
            errors(BadRecord(path, 0, f"{file.trailing} bytes after the end of the compressed data were not read"))
