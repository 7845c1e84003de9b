"""Sets in an object store: the same samples, through the cache of this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from lavic.data.manifest import NAME, Manifest
from lavic.data.remote_shards import CacheSettings
from lavic.data.shard_dataset import ShardDataset
from lavic.errors import DataError
from lavic.storage.atomic import atomic_write
from lavic.storage.cache import shard_cache
from lavic.storage.paths import as_path, is_remote
from lavic.train.input.shuffle_order import ShuffleOrder


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path if request.param == "local" else as_path(f"memory://{tmp_path.name}")


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
    copies = sorted((tmp_path / "cache/shards").glob("*.tar")) if is_remote(home) else []
    assert len(copies) == (3 if is_remote(home) else 0)
    for copy in copies:
        copy.unlink()
    (home / small_set.shards[0].name).write_bytes(b"another")
    with pytest.raises(DataError, match=r"cups-train-000000\.tar has 7 bytes"):
        Manifest.load(home)
    if is_remote(home):
        with pytest.raises(DataError, match="has 7 bytes"):
            data[0]
    (home / NAME).unlink()
    with pytest.raises(DataError, match="the set is not complete"):
        Manifest.load(home)


def test_an_order_by_shards_needs_each_of_them_once_an_epoch_whatever_the_cache_holds(
    small_set: Manifest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    home = as_path(f"memory://{tmp_path.name}/set")
    home.mkdir(parents=True, exist_ok=True)
    for path in small_set.folder.iterdir():
        atomic_write(home / path.name, path.read_bytes())
    fetched = []
    copy = shard_cache.copy_shard
    monkeypatch.setattr(
        shard_cache, "copy_shard", lambda shard, file: fetched.append(shard.path.name) or copy(shard, file)
    )
    limit = max(shard.bytes for shard in small_set.shards) + 1  # one at a time
    counts = []
    for bounds in (ShardDataset(small_set.folder).bounds, None):
        data = ShardDataset(home, cache=CacheSettings(folder=tmp_path / f"{bounds is None}", bytes=limit))
        order = ShuffleOrder(25, 1, block=5, mix=1, bounds=bounds)
        fetched.clear()
        assert sorted(data[i].key for i in order.epoch(0)) == sorted(ShardDataset(small_set.folder).keys)
        counts.append(len(fetched))
    assert counts[0] == 3 < counts[1]
