"""Where a set of shards stands: a folder, or a prefix of an object store, handled through the methods of a `Path`.

An address such as `s3://bucket/prefix` becomes a `UPath` (universal-pathlib over fsspec), which has the methods of a
`Path` that the house uses. Servers other than the usual one, and their keys, are told as fsspec and the store's own
client are told: AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, FSSPEC_S3_..., ~/.aws, ~/.config/fsspec.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, cast

from lavic.errors import ConfigError
from lavic.storage.remote import options as options
from lavic.storage.remote import storage_errors as storage_errors

_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+):/{1,2}(?=[^/])")
"""A `Path` folds the slashes of an address that was put into it; one-letter names are left to Windows."""


def place(text: str | Path) -> Path:
    """What stands at a path or an address.

    Raises:
        ConfigError: The kind of address is not known here, or its package is missing.
    """
    if not isinstance(text, (str, Path)):
        return text
    words = str(text)
    if words.startswith("file:/"):
        return Path("/" + words.removeprefix("file:").lstrip("/"))
    if not (found := _ADDRESS.match(words)) or found[1] == "file":
        return Path(words)
    address = f"{found[1]}://{words[found.end() :]}"
    try:
        from upath import UPath

        made = UPath(address.rstrip("/"), **options(address))
        _ = made.fs
        return cast(Path, made)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"{address}: cannot be opened ({error}); object stores need pip install 'lavic[crawl]'"
        ) from None


def is_remote(path: Path) -> bool:
    """Whether a place is reached through fsspec rather than this machine's file system."""
    return not isinstance(path, Path)


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file that stands directly in a folder, by name; empty where there is no such folder."""
    if is_remote(folder):
        store = cast(Any, folder)
        try:
            found = store.fs.ls(store.path, detail=True)
        except FileNotFoundError:
            return {}
        return {
            entry["name"].rstrip("/").rpartition("/")[2]: int(entry["size"] or 0)
            for entry in found
            if entry["type"] == "file"
        }
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as entries:
        return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
