"""Folders and object stores through one set of methods."""

from __future__ import annotations

from pathlib import Path

import pytest

from lavic.errors import ConfigError
from lavic.storage.atomic import atomic_open, atomic_write
from lavic.storage.paths import is_remote, place, sizes


def test_paths_and_addresses() -> None:
    assert place("a/b") == Path("a/b") and place("/a") == Path("/a") and place("file:///a/b") == Path("/a/b")
    assert not is_remote(place("C:/x")) and not is_remote(place(Path("x")))
    there = place("memory://bucket/prefix/")
    assert is_remote(there) and str(there) == "memory://bucket/prefix" and place(there) is there
    assert place(Path("memory://bucket/prefix")) == there
    with pytest.raises(ConfigError, match="nosuch://x: cannot be opened"):
        place("nosuch://x")


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "local":
        return tmp_path
    return place(f"memory://{tmp_path.name}")


def test_files_are_whole_or_not_there(folder: Path) -> None:
    assert sizes(folder / "none") == {}
    atomic_write(folder / "x.json", "old")
    with pytest.raises(ValueError), atomic_open(folder / "x.json") as file:
        file.write(b"half")
        raise ValueError
    assert (folder / "x.json").read_text() == "old" and sizes(folder) == {"x.json": 3}
