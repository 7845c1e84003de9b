"""Folders and object stores through one set of methods."""

from __future__ import annotations

from pathlib import Path

import pytest

from lavic.errors import ConfigError
from lavic.storage.atomic import atomic_open, atomic_write
from lavic.storage.paths import as_path, file_sizes, is_remote


def test_paths_and_addresses() -> None:
    assert as_path("a/b") == Path("a/b") and as_path("/a") == Path("/a") and as_path("file:///a/b") == Path("/a/b")
    assert not is_remote(as_path("C:/x")) and not is_remote(as_path(Path("x")))
    prefix = as_path("memory://bucket/prefix/")
    assert is_remote(prefix) and str(prefix) == "memory://bucket/prefix" and as_path(prefix) is prefix
    assert as_path(Path("memory://bucket/prefix")) == prefix
    with pytest.raises(ConfigError, match="nosuch://x: cannot be opened"):
        as_path("nosuch://x")


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "local":
        return tmp_path
    return as_path(f"memory://{tmp_path.name}")


def test_files_are_whole_or_not_there(folder: Path) -> None:
    assert file_sizes(folder / "none") == {}
    atomic_write(folder / "x.json", "old")
    with pytest.raises(ValueError), atomic_open(folder / "x.json") as file:
        file.write(b"half")
        raise ValueError
    assert (folder / "x.json").read_text() == "old" and file_sizes(folder) == {"x.json": 3}
