"""What an index holds, of which catalogue, and how it was made: `manifest.json`, written last."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from lavic.errors import DataError
from lavic.storage.atomic import atomic_write
from lavic.storage.checksummed_json import UnknownFormat, dump_checked, load_checked

FILE = "manifest.json"
FORMAT = "lavic-retrieval/1"


@dataclass(frozen=True)
class IndexFile:
    """A file of an index."""

    name: str
    rows: int
    source: str
    """Digest of what it was made from, which the file holds too."""
    rows_from_items: bool = True
    """False for a file that is about all items."""


PLACES = {"bundle": "retriever", "model": "fingerprint"}
"""Settings with the path of a model, each with the setting that identifies the model: if that is recorded, the path may
differ."""


def identity(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a method's settings that its vectors depend on: a model that was moved or copied is the same one."""
    return {name: value for name, value in settings.items() if PLACES.get(name) not in settings}


Shard = tuple[int, int]
"""Which part of an index, of how many: (0, 1) is all of it."""


@dataclass(frozen=True, kw_only=True)
class MethodRecord:
    """A way to search the items."""

    kind: Literal["bm25", "vectors"]
    settings: Mapping[str, Any]
    """What the results depend on (see `identity`): an index of other settings is refused."""
    files: tuple[IndexFile, ...]
    width: int = 0
    """Numbers of a vector."""
    parts: tuple[str, ...] = ()
    """Digests of the item store's parts, of a method that reads them: when items are embedded again its vectors are out
    of date. Empty where that is not known."""
    approximate: Mapping[str, Any] | None = None
    """Files, settings and measured recall of an approximate search; None where the search is exact."""

    def rows_of(self, shard: Shard = (0, 1)) -> list[tuple[int, IndexFile]]:
        """The files with rows that are in a shard, each with its first row."""
        placed, start = [], 0
        for file in self.files:
            if file.rows_from_items:
                placed.append((start, file))
                start += file.rows
        part, parts = shard
        return placed[part * len(placed) // parts : (part + 1) * len(placed) // parts]


@dataclass(frozen=True, kw_only=True)
class IndexManifest:
    """The manifest."""

    catalogue: str
    """Digest of the items' ids and texts."""
    items: int
    table: str
    """Name of the file with the items."""
    text: Mapping[str, Any]
    """Settings of the items' texts."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """Rows of the catalogue by what became of them."""
    catalogue_files: Mapping[str, Any] = field(default_factory=dict)
    """Size and times of change of the catalogue's files: while they are the same they are not read again."""
    methods: Mapping[str, MethodRecord] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> IndexManifest:
        """The manifest of an index.

        Raises:
            DataError: There is none, or it is damaged or of another version.
        """
        path = folder / FILE
        try:
            body = load_checked(path.read_bytes(), FORMAT)
            methods = {
                name: MethodRecord(
                    **{
                        **record,
                        "files": tuple(IndexFile(**file) for file in record["files"]),
                        "parts": tuple(record.get("parts", ())),
                    }
                )
                for name, record in body.pop("methods").items()
            }
            return cls(**body, methods=methods)
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(
                f"{folder}: no retrieval index here: make one of a catalogue, `lavic retrieve --items FILES --index "
                f"{folder} ...`"
            ) from None
        except UnknownFormat as error:
            raise DataError(f"{path}: {error}: make the index in another folder") from None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(
                f"{path}: not the manifest of an index ({error}): make the index in another folder"
            ) from None

    def write(self, folder: Path) -> None:
        """Puts it in place: from now on the index is what it says."""
        atomic_write(folder / FILE, dump_checked({"format": FORMAT, **asdict(self)}, indent=2))

    def file_names(self) -> set[str]:
        """The names of all files that it needs."""
        names = {FILE, self.table}
        for record in self.methods.values():
            names |= {file.name for file in record.files}
            names |= {file["name"] for file in (record.approximate or {}).get("files", ())}
        return names
