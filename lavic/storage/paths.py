"""Paths of sets of shards: a local folder, or a prefix in an object store with the methods of a `Path`.

A URI such as `s3://bucket/prefix` becomes a `UPath` (universal-pathlib on fsspec). Endpoint and credentials come from
the usual configuration of fsspec and of the store's client: AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, FSSPEC_S3_..., ~/.aws,
~/.config/fsspec.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any, cast

from lavic.errors import ConfigError

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+):/{1,2}(?=[^/])")
"""`Path` collapses the two slashes of a URI; one-letter schemes are drives on Windows."""


def as_path(location: str | Path) -> Path:
    """A local path or a URI as a `Path` or `UPath`.

    Raises:
        ConfigError: fsspec does not know the URI's scheme, or its package is not installed.
    """
    if not isinstance(location, (str, Path)):
        return location
    text = str(location)
    if text.startswith("file:/"):
        return Path("/" + text.removeprefix("file:").lstrip("/"))
    scheme = _SCHEME.match(text)
    if not scheme or scheme[1] == "file":
        return Path(text)
    uri = f"{scheme[1]}://{text[scheme.end() :]}"
    try:
        from upath import UPath

        path = UPath(uri.rstrip("/"), **options(uri))
        _ = path.fs
        return cast(Path, path)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{uri}: cannot be opened ({error}); object stores need pip install 'lavic[crawl]'") from None


def options(address: str) -> dict[str, Any]:
    """Keyword arguments for fsspec: no cached listings, since other processes write to the same store."""
    return {"use_listings_cache": False} if "://" in address and "::" not in address else {}


def storage_errors(*others: type[Exception]) -> tuple[type[Exception], ...]:
    """The exceptions of reading and writing a path: OSError, those of the object store's client, and `others`."""
    client = sys.modules.get("botocore.exceptions")
    return (OSError, *((client.BotoCoreError, client.ClientError) if client else ()), *others)


def is_remote(path: Path) -> bool:
    """Whether a path is accessed through fsspec rather than the local file system."""
    return not isinstance(path, Path)


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file directly in a folder, by name; empty if the folder does not exist."""
    if is_remote(folder):
        store = cast(Any, folder)
        try:
            entries = store.fs.ls(store.path, detail=True)
        except FileNotFoundError:
            return {}
        return {
            entry["name"].rstrip("/").rpartition("/")[2]: int(entry["size"] or 0)
            for entry in entries
            if entry["type"] == "file"
        }
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as files:
        return {file.name: file.stat().st_size for file in files if file.is_file()}
