"""Folders and object stores through one set of methods."""

from __future__ import annotations

from pathlib import Path

import pytest

from lavic.data.manifest import NAME, Manifest
from lavic.data.shard_dataset import ShardDataset
from lavic.errors import ConfigError, DataError
from lavic.storage.atomic import atomic_open, atomic_write
from lavic.storage.paths import is_remote, place, sizes
from lavic.storage.shard_cache import local_copy


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


def test_a_set_reads_the_same_from_both(
    folder: Path, small_set: Manifest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LAVIC_CACHE", str(tmp_path / "cache"))
    home = folder / "copy"
    home.mkdir(parents=True, exist_ok=True)
    for path in small_set.folder.iterdir():
        atomic_write(home / path.name, path.read_bytes())
    data, expected = ShardDataset(home), ShardDataset(small_set.folder)
    assert data.keys == expected.keys and data[13] == expected[13]
    copies = sorted((tmp_path / "cache/shards").glob("*")) if is_remote(home) else []
    assert len(copies) == (3 if is_remote(home) else 0)
    for copy in copies:
        copy.unlink()
    (home / small_set.shards[0].name).write_bytes(b"another")
    with pytest.raises(DataError, match=r"cups-train-000000\.tar has 7 bytes"):
        Manifest.load(home)
    if is_remote(home):
        entry = small_set.shards[0]
        with pytest.raises(DataError, match="has 7 bytes"):
            local_copy(home / entry.name, entry.sha256, entry.bytes)
    (home / NAME).unlink()
    with pytest.raises(DataError, match="not a whole set"):
        Manifest.load(home)
