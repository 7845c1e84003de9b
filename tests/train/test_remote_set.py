"""Training from an object store: which samples ranks read and which shards they download."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lavic.data.index.held_out import FilteredDataset, HeldOut
from lavic.data.remote_shards import CacheSettings
from lavic.data.shard_dataset import ShardDataset
from lavic.model.bundle import BundleInfo
from lavic.train.input.shuffle_order import ShuffleOrder
from tests.fork_server import ForkServer
from tests.storage.object_store import ObjectStore, object_store
from tests.train.assets import Assets

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).with_name("remote_rank.py")


@pytest.fixture(scope="module")
def store(assets: Assets, fork_server: ForkServer) -> Iterator[ObjectStore]:
    """Both sets of the assets: 24 photos in shards of 10, 10 and 4, and 6 for validation."""
    fork_server.preload("s3fs", "upath")
    with object_store() as store:
        for folder in (assets.photos, assets.valid):
            for file in sorted(folder.iterdir()):
                store.put(f"{folder.name}/{file.name}", file.read_bytes())
        yield store


@pytest.fixture(autouse=True)
def empty_cache(store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAVIC_CACHE", str(tmp_path / "cache"))
    store.served.clear()


def check_downloads(store: ObjectStore, folder: Path) -> None:
    """Every shard was downloaded once."""
    sizes = {f"{folder.name}/{path.name}": path.stat().st_size for path in folder.glob("*.tar")}
    assert {key: count for key, count in store.served.items() if key in sizes} == sizes


@pytest.mark.parametrize(("micro_tokens", "workers"), [(None, 0), (60, 0), (60, 2)])
def test_two_ranks_read_each_sample_and_download_each_shard_once(
    assets: Assets,
    store: ObjectStore,
    tmp_path: Path,
    fork_server: ForkServer,
    micro_tokens: int | None,
    workers: int,
) -> None:
    argv = [PROGRAM, "--shards", "s3://photos/photos", "--base", assets.base]
    argv += ["--folder", tmp_path, "--size", "2", "--workers", workers]
    argv += ["--micro-tokens", micro_tokens] if micro_tokens else []
    ranks = [fork_server.popen([*argv, "--rank", rank]) for rank in range(2)]
    assert fork_server.wait(ranks) == [0, 0], "".join(rank.stderr.read_text() for rank in ranks)
    photos = sorted(map(int, (tmp_path / "getitem.log").read_text().split()))
    assert photos == list(range(24)), "every photo is read once, by one rank"
    log = tmp_path / "meta_and_text.log"
    texts = sorted(map(int, log.read_text().split())) if log.exists() else []
    assert texts == (list(range(24)) if micro_tokens else []), "every text is read once, for its length"
    check_downloads(store, assets.photos)


def test_keys_are_read_without_downloading_a_shard(assets: Assets, store: ObjectStore, tmp_path: Path) -> None:
    """As for `--loop.skip-samples`, whose keys are looked for in the whole set."""
    local = ShardDataset(assets.photos)
    remote = FilteredDataset(ShardDataset("s3://photos/photos"), HeldOut.of([12]))
    assert remote.key(0) == local.key(0)  # builds the index of the set, which every training needs
    store.served.clear()
    keys = [remote.key(index) for index in range(len(remote))]
    assert keys == [local[index].key for index in range(24) if index != 12]
    assert not store.served


def test_read_ahead_uses_at_most_half_of_the_cache(assets: Assets, store: ObjectStore, tmp_path: Path) -> None:
    local = ShardDataset(assets.photos)
    first, _, third = (shard.bytes for shard in local.manifest.shards)
    cache = CacheSettings(folder=tmp_path / "cache", bytes=2 * (first + third) + 10)
    data = ShardDataset("s3://photos/photos", cache=cache)
    assert data.is_remote and not local.is_remote
    data.read_ahead(np.array([3, 23, 4, 15]))  # the third does not fit
    expected = {f"{local.manifest.shards[n].sha256}.tar" for n in (0, 2)}
    deadline = time.monotonic() + 120
    while {path.name for path in cache.folder.glob("*.tar")} != expected and time.monotonic() < deadline:
        time.sleep(0.02)
    assert {path.name for path in cache.folder.glob("*.tar")} == expected
    assert data[3] == local[3] and data[23] == local[23]
    filtered = FilteredDataset(data, HeldOut.of([12]))
    assert filtered.bounds.tolist() == [0, 10, 19, 23]
    filtered.read_ahead(np.array([12]))
    assert filtered[12] == local[13]
    assert sum(path.stat().st_size for path in cache.folder.glob("*.tar")) <= cache.bytes


def test_shuffle_by_shards_finishes_a_shard_before_the_next(assets: Assets) -> None:
    data = ShardDataset(assets.photos)
    order = ShuffleOrder(len(data), 3, mix=1, bounds=data.bounds)
    for epoch in range(3):
        indices = order.span(24 * epoch, 24 * epoch + 24)
        assert sorted(indices) == list(range(24)) and [order.at(24 * epoch + p) for p in range(24)] == indices.tolist()
        shards = np.searchsorted(data.bounds, indices, side="right")
        assert 1 + np.count_nonzero(np.diff(shards)) == 3
    assert order.span(0, 24).tolist() != order.span(24, 48).tolist()
    assert (
        ShuffleOrder(24, 3, block=10).epoch(1).tolist() == ShuffleOrder(24, 3, bounds=[0, 10, 20, 24]).epoch(1).tolist()
    )
    with pytest.raises(ValueError, match="are from 0 to 24"):
        ShuffleOrder(24, 3, bounds=[0, 10])


@pytest.mark.dist
def test_every_stage_reads_a_remote_set_through_the_cache(
    assets: Assets, store: ObjectStore, tmp_path: Path, fork_server: ForkServer
) -> None:
    model = ["--model.name", str(assets.base)]
    loop = [
        "--loop.steps",
        "3",
        "--loop.global-batch-size",
        "8",
        "--loop.lr",
        "0.01",
        "--loop.num-workers",
        "2",
        "--lora.r",
        "2",
    ]
    sets = ["--shards", "s3://photos/photos", "--valid", "s3://photos/valid", "--shuffle", "shards"]
    distill = ["distill", *sets, "--out", str(tmp_path / "run"), *model, *loop, "--loop.micro-tokens", "200"]
    embed = ["embed", *model, "--num-workers", "1", "--shards"]
    commands = [
        distill,
        [*distill, "--cache.bytes", "2TB"],  # may change: it does not affect the weights
        [*embed, "s3://photos/photos", "--out", str(tmp_path / "store")],
        [*embed, str(assets.photos), "--out", str(tmp_path / "local")],
        ["describe", *model, "--max-new-tokens", "4", "--shards", "s3://photos/valid"],
    ]
    outputs = []
    for command in commands:
        run = fork_server.lavic(*command, cwd=tmp_path)
        assert run.returncode == 0, run.stderr
        outputs.append(run.stdout)
    assert "already complete" in outputs[1] and BundleInfo.read(tmp_path / "run" / "bundle").vision_adapter
    tokens, expected = (
        [path.read_bytes() for path in sorted((tmp_path / name).glob("tokens-*.safetensors"))]
        for name in ("store", "local")
    )
    assert tokens == expected and len(tokens) == 3
    assert not (tmp_path / "s3:").exists()
    data, local = ShardDataset("s3://photos/valid"), ShardDataset(assets.valid)
    assert data[0].jpg == local[0].jpg and data[0].text != local[0].text
    for folder in (assets.photos, assets.valid):
        check_downloads(store, folder)
