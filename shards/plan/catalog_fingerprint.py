"""Fingerprints of a catalogue's files, which show whether a plan was made from their present content."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lavic.errors import DataError
from lavic.storage.file_digest import file_sha256
from lavic.storage.paths import options, storage_errors


def fingerprint(path: str, known: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A fingerprint of a file's content; a file with known size and time is not read again."""
    if "://" in path:
        import fsspec

        try:
            fs, inner = fsspec.core.url_to_fs(path, **options(path))
            info = fs.info(inner)
            return {"bytes": info["size"], "mark": str(info.get("ETag") or info.get("etag") or fs.ukey(inner))}
        except storage_errors() as error:
            raise DataError(f"{path}: cannot be read ({error})") from None
    try:
        stat = Path(path).stat()
        result = {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        before = known.get(path, {})
        if all(before.get(name) == value for name, value in result.items()):
            return dict(before)
        return {"sha256": file_sha256(Path(path)), **result}
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def same_content(old: Mapping[str, Mapping[str, Any]], new: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether two readings had the same files, by content and order; their names do not matter."""
    return list(map(_content, old.values())) == list(map(_content, new.values()))


def _content(fingerprint: Mapping[str, Any]) -> object:
    return fingerprint.get("sha256") or fingerprint.get("mark")


def what_changed(old: Mapping[str, Mapping[str, Any]], new: Mapping[str, Mapping[str, Any]]) -> str:
    """How the files of a catalogue differ from those of a plan, in a few words."""
    changed = [path for path in new if path in old and _content(old[path]) != _content(new[path])]
    if changed:
        return f"the content of {', '.join(changed[:3])} has changed"
    return f"the catalogue was {', '.join(list(old)[:3])} and is {', '.join(list(new)[:3])}"
