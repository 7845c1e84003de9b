"""A set's index and sidecars: mapped or read where they stand, never held; few open files; nothing sent to workers."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lavic.data.descriptions import FIELDS, descriptions_path, write_descriptions
from lavic.data.index.held_out import FilteredDataset, held_out
from lavic.data.index.set_index import SetIndex
from lavic.data.ledger import ledger_path
from lavic.data.manifest import Manifest
from lavic.data.shard_dataset import ShardDataset
from lavic.data.tar_shards import Sample
from lavic.errors import DataError
from lavic.storage.index.text_hash import hash_texts
from tests.crawled_sets import write_set


def describe(manifest: Manifest, shard: int, keys: list[str], text: str = "{}") -> None:
    rows = [dict.fromkeys(FIELDS, "x") | {"key": key, "text": text.format(key), "source_sha256": ""} for key in keys]
    write_descriptions(manifest.path(manifest.shards[shard]), rows)


def test_an_index_says_what_the_samples_say(small_set: Manifest, make_sample: Callable[..., Sample]) -> None:
    data = ShardDataset(small_set.folder)
    index = data.index
    samples = [make_sample(n) for n in range(25)]
    assert index.keys == [sample.key for sample in samples]
    assert (index.items == hash_texts(sample.item_id for sample in samples)).all()
    assert not index.numbers.any() and not index.digests.any(), "there is no ledger"
    assert index.find("B000000013_0") == 13 and index.find("B000000013_1") is index.find("B9_0") is None
    for number, entry in enumerate(small_set.shards):
        rows = [{"key": key, "kind": "ok", "sha256": f"digest of {key}"} for key in data.keys_of(number)]
        ledger_path(small_set.path(entry)).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    index._file.path.unlink()
    again = ShardDataset(small_set.folder).index
    assert (again.digests == hash_texts(f"digest of {sample.key}" for sample in samples)[:, 0]).all()


def test_an_index_is_made_once_for_a_set_as_it_is(
    small_set: Manifest, make_sample: Callable[..., Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = list(ShardDataset(small_set.folder).keys)
    with monkeypatch.context() as patch:
        patch.setattr(ShardDataset, "ledger_of", lambda *_: pytest.fail("read again"))
        assert ShardDataset(small_set.folder).keys == keys
    file = ShardDataset(small_set.folder).index._file.path
    os.truncate(file, file.stat().st_size - 1)
    assert ShardDataset(small_set.folder).keys == keys
    write_set(small_set.folder, map(make_sample, range(30, 50)), set="cups", split="train", photos_per_shard=10)
    assert ShardDataset(small_set.folder).keys == [f"B{n:09d}_0" for n in range(30, 50)]


def test_a_description_is_found_wherever_its_line_is(small_set: Manifest) -> None:
    data = ShardDataset(small_set.folder)
    keys = data.keys_of(0)
    describe(small_set, 0, keys)
    describe(small_set, 1, [*data.keys_of(1)[::-2], "B9_0", "B000000015_0"])
    data = ShardDataset(small_set.folder)
    assert [data[n].text for n in range(10)] == keys
    expected = [key if n % 2 else f"text {10 + n}" for n, key in enumerate(data.keys_of(1))]
    assert [data.meta_and_text(10 + n)[1] for n in range(10)] == expected and data[20].text == "text 20"
    describe(small_set, 1, data.keys_of(1), "anew: {}")
    assert ShardDataset(small_set.folder)[12].text == "anew: B000000012_0"


def test_a_sidecar_that_is_replaced_while_it_is_in_use(small_set: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    describe(small_set, 0, ShardDataset(small_set.folder).keys_of(0))
    data = ShardDataset(small_set.folder)
    assert data[3].text == "B000000003_0"
    describe(small_set, 0, data.keys_of(0), "a longer text for {}")
    assert data[4].text == "B000000004_0", "the one that is open"
    monkeypatch.setattr("lavic.storage.cache.open_files.FILES.max_open", 1)
    assert data[14].text == "text 14"  # pushes it out
    assert data[4].text == "a longer text for B000000004_0"


def test_a_broken_line_is_named(small_set: Manifest) -> None:
    path = descriptions_path(small_set.path(small_set.shards[0]))
    describe(small_set, 0, ShardDataset(small_set.folder).keys_of(0))
    path.write_text(path.read_text().replace('{"key": "B000000003', '["key": "B000000003'))
    data = ShardDataset(small_set.folder)
    assert data[2].text == "B000000002_0"
    with pytest.raises(DataError, match=r"descriptions\.jsonl:4: not a description"):
        data[3]


def test_few_files_are_open_whatever_the_shards(tmp_path: Path, make_sample: Callable[..., Sample]) -> None:
    sets = []
    for part in range(2):
        samples = (make_sample(n) for n in range(240))
        manifest = write_set(tmp_path / f"{part}", samples, photos_per_shard=2)
        for shard in range(len(manifest.shards)):
            describe(manifest, shard, [f"B{2 * shard + n:09d}_0" for n in range(2)])
        sets.append(ShardDataset(manifest.folder))
    before = sum(1 for _ in Path("/proc/self/fd").iterdir())
    for index in range(240):
        for data in sets:
            assert data[index].text == f"B{index:09d}_0"
    assert len(data._offsets) == len(data._sidecars) == 64
    assert sum(1 for _ in Path("/proc/self/fd").iterdir()) < before + 110
    del data, sets
    assert sum(1 for _ in Path("/proc/self/fd").iterdir()) <= before


def shared_memory() -> list[str]:
    """What this process maps in /dev/shm besides the queue's own semaphores."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line for line in lines if "/dev/shm/" in line and "/dev/shm/sem." not in line]


def look(data: FilteredDataset, queue: multiprocessing.Queue) -> None:
    queue.put(([data[n] for n in (0, 7, -1)], data.meta_and_text(3), shared_memory()))


@pytest.mark.slow
def test_what_a_worker_that_is_not_forked_gets_is_where_the_set_is(
    tmp_path: Path, make_sample: Callable[..., Sample]
) -> None:
    sizes = []
    for count in (40, 400):
        train = write_set(tmp_path / f"train{count}", map(make_sample, range(count)), photos_per_shard=10)
        valid = write_set(tmp_path / f"valid{count}", map(make_sample, range(count // 2)))
        describe(train, 3, ShardDataset(train.folder).keys_of(3))
        every = ShardDataset(train.folder)
        data = FilteredDataset(every, held_out(every, ShardDataset(valid.folder)))
        assert 0 < len(data) <= count // 2  # some are drawn alike
        data[0]
        sizes.append(len(pickle.dumps(data)))
    assert max(sizes) < 1000 and abs(sizes[0] - sizes[1]) < 20
    context = multiprocessing.get_context("forkserver")
    queue = context.Queue()
    worker = context.Process(target=look, args=(data, queue))
    worker.start()
    samples, words, mapped = queue.get(timeout=120)
    worker.join()
    assert samples == [data[n] for n in (0, 7, -1)] and words == data.meta_and_text(3)
    assert not mapped and not shared_memory()


def test_a_set_that_was_changed_is_not_opened_by_a_worker(
    small_set: Manifest, make_sample: Callable[..., Sample]
) -> None:
    data = pickle.dumps(ShardDataset(small_set.folder))
    assert pickle.loads(data)[13] == make_sample(13)
    write_set(small_set.folder, map(make_sample, range(9)), set="cups", split="train", photos_per_shard=10)
    with pytest.raises(DataError, match="the set changed while in use; run the command again"):
        pickle.loads(data)


def test_many_items_are_compared_a_part_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The photos that a store takes are the same, however few are compared at once."""
    from lavic.shards import store_photos
    from lavic.storage.index import text_hash

    def photo(item: int, n: int) -> Sample:
        return Sample.of(item_id=f"I{item}", n=n, jpg=b"x", title="", width=1, height=1)

    order = np.random.RandomState(0).permutation(240)
    first = write_set(tmp_path / "a", (photo(n // 3, n % 3 + 1) for n in order[:160].tolist()), photos_per_shard=40)
    second = write_set(tmp_path / "b", (photo(n // 3, n % 3) for n in order.tolist()), photos_per_shard=50)
    sets = [ShardDataset(first.folder), ShardDataset(second.folder)]
    taken: dict[str, tuple[int, int, str]] = {}
    for number, data in enumerate(sets):
        for key in data.keys:
            item, n = key.rsplit("_", 1)
            taken[item] = min(taken.get(item, (9, 9, "")), (number, int(n), key))
    expected = {key for _, _, key in taken.values()}
    parts = []
    for most in (1 << 20, 16):
        monkeypatch.setattr(store_photos, "_CHUNK", most)
        monkeypatch.setattr(text_hash, "_CHUNK", most)
        photos = store_photos.StorePhotos.of(sets, {"most": most}, tmp_path / "store")
        parts.append([photos.keys(shard) for shard in range(len(photos))])
        assert (photos.items(5) == hash_texts(key.rsplit("_", 1)[0] for key in photos.keys(5))).all()
    assert parts[0] == parts[1]
    keys = [key for part in parts[0] for key in part]
    assert len(keys) == len(expected) and set(keys) == expected
    assert isinstance(sets[0].index, SetIndex)
