"""Sets as sequences: random access, worker processes, and orders that a position resumes."""

from __future__ import annotations

import json
import multiprocessing
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lavic.data.descriptions import write_descriptions
from lavic.data.duplicates import Reference, write_references
from lavic.data.index.held_out import FilteredDataset, HeldOut, held_out
from lavic.data.ledger import ledger_path
from lavic.data.manifest import Manifest
from lavic.data.shard_dataset import ShardDataset
from lavic.data.tar_shards import Sample, index_path
from lavic.errors import DataError
from tests.crawled_sets import write_set


def keys_of(dataset: ShardDataset) -> list[str]:
    return [dataset[index].key for index in range(len(dataset))]


def send_keys(dataset: ShardDataset, queue: multiprocessing.Queue) -> None:
    queue.put(keys_of(dataset))


def test_samples_are_numbered_through_the_shards(small_set: Manifest, make_sample: Callable[..., Sample]) -> None:
    dataset = ShardDataset(small_set.folder)
    assert len(dataset) == 25 and dataset[13] == make_sample(13) and dataset[-1] == make_sample(24)
    assert dataset.keys == keys_of(dataset) == [f"B{n:09d}_0" for n in range(25)]
    for outside in (25, -26):
        with pytest.raises(IndexError):
            dataset[outside]


@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_other_processes_read_the_same(small_set: Manifest, how: str) -> None:
    dataset = ShardDataset(small_set.folder)
    expected = keys_of(dataset)
    context = multiprocessing.get_context(how)
    queue = context.Queue()
    worker = context.Process(target=send_keys, args=(dataset, queue))
    worker.start()
    assert queue.get(timeout=60) == expected
    worker.join()
    assert keys_of(dataset) == expected and keys_of(pickle.loads(pickle.dumps(dataset))) == expected


def test_a_title_is_no_description(tmp_path: Path, make_sample: Callable[..., Sample]) -> None:
    titles = {n: make_sample(n).meta["title"] for n in (1, 3)}
    samples = [make_sample(n, titles.get(n)) for n in range(4)]
    folder = write_set(tmp_path / "set", samples, set="cups", split="train", photos_per_shard=10).folder
    for how in ("sidecar", "shard"):
        data = ShardDataset(folder, descriptions=how)
        assert (
            [data[n].text for n in range(4)]
            == [data.meta_and_text(n)[1] for n in range(4)]
            == ["text 0", "", "text 2", ""]
        )


def test_where_text_comes_from(small_set: Manifest) -> None:
    shard = small_set.path(small_set.shards[1])
    write_descriptions(
        shard,
        [
            {
                "key": "B000000011_0",
                "text": "by the teacher",
                "model": "m",
                "weights": "w",
                "prompt": "1",
                "views": "five",
            }
        ],
    )
    texts = {how: ShardDataset(small_set.folder, descriptions=how) for how in ("sidecar", "shard", None)}
    assert [texts[how][11].text for how in texts] == ["by the teacher", "text 11", ""]
    assert [texts[how][12].text for how in texts] == ["text 12", "text 12", ""]
    for data in texts.values():
        for index in (0, 11, 24):
            assert data.meta_and_text(index) == (data[index].meta, data[index].text), "without the photo"
    assert FilteredDataset(texts["sidecar"], HeldOut.of([0])).meta_and_text(10)[1] == "by the teacher"


def test_keys_are_those_of_the_ledger_where_it_fits(small_set: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ShardDataset(small_set.folder).keys
    for number, entry in enumerate(small_set.shards):
        rows = [
            {"key": key, "kind": "ok", "reason": "of one \u2028 line"}
            for key in ShardDataset(small_set.folder).keys_of(number)
        ]
        rows.insert(3, {"key": "B9_0", "kind": "gone", "reason": ""})
        rows.append({"key": "B8_0", "kind": "ok", "reason": ""})
        same = {"key": "B8_0", "same_as": rows[0]["key"], "shard": entry.name, "meta": {}, "text": ""}
        write_references(small_set.path(entry), [Reference(**same)])
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        ledger_path(small_set.path(entry)).write_text(lines, "utf-8")

    def looked(self: ShardDataset, shard: int, start: int) -> str:
        assert start == 0, "each sample was looked at"
        return keys[10 * shard]

    with monkeypatch.context() as patch:
        patch.setattr(ShardDataset, "_key", looked)
        assert ShardDataset(small_set.folder).keys == keys

    first, second, third = (ledger_path(small_set.path(entry)) for entry in small_set.shards)
    text = first.read_text("utf-8")
    second.write_text(text, "utf-8")  # of another shard
    third.write_text(text, "utf-8")  # of another number of photos
    first.write_text(text[:-9], "utf-8")  # torn
    assert ShardDataset(small_set.folder).keys == keys


def test_a_set_that_is_not_whole_is_refused(small_set: Manifest, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        ShardDataset(tmp_path / "none")
    shard, body = small_set.path(small_set.shards[0]), (small_set.folder / "manifest.json").read_text()
    (small_set.folder / "manifest.json").unlink()
    with pytest.raises(DataError, match="the set is not complete"):
        ShardDataset(small_set.folder)
    (small_set.folder / "manifest.json").write_text(body[:-20])
    with pytest.raises(DataError, match="broken manifest"):
        ShardDataset(small_set.folder)
    (small_set.folder / "manifest.json").write_text(body.replace("lavic-shards/1", "lavic-shards/9"))
    with pytest.raises(DataError, match="another version"):
        ShardDataset(small_set.folder)
    (small_set.folder / "manifest.json").write_text(body)
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    with pytest.raises(DataError, match=r"cups-train-000000\.tar has \d+ bytes"):
        ShardDataset(small_set.folder)
    shard.unlink()
    with pytest.raises(DataError, match=r"cups-train-000000\.tar is missing"):
        ShardDataset(small_set.folder)
    shard.write_bytes(data)
    index_path(shard).write_bytes(index_path(small_set.path(small_set.shards[2])).read_bytes())
    with pytest.raises(DataError, match="does not belong to its shard"):
        ShardDataset(small_set.folder)[0]


def test_a_set_without_photos_is_refused(tmp_path: Path) -> None:
    write_set(tmp_path / "empty", [])
    with pytest.raises(DataError, match="the set has no photos"):
        ShardDataset(tmp_path / "empty")


def test_sizes_and_card_stand_beside_the_shards(small_set: Manifest) -> None:
    sizes = json.loads((small_set.folder / "sizes.json").read_text())
    assert sizes == {"cups-train-000000.tar": 10, "cups-train-000001.tar": 10, "cups-train-000002.tar": 5}
    assert Manifest.load(small_set.folder) == small_set


@pytest.mark.parametrize("ledgers", [False, True])
def test_what_a_validation_set_knows_is_held_out(tmp_path: Path, ledgers: bool) -> None:
    """By item and by the photo's bytes, not by the key alone."""

    def photo(item: str, n: int, picture: str) -> Sample:
        jpg = picture.encode()  # nothing here decodes it
        return Sample.of(item_id=item, n=n, jpg=jpg, title=item, width=1, height=1)

    def write(name: str, photos: list[Sample]) -> Manifest:
        manifest = write_set(tmp_path / name, photos, photos_per_shard=3)
        left = list(photos)
        for entry in manifest.shards if ledgers else ():
            samples = [left.pop(0) for _ in range(entry.samples)]
            rows = [{"key": p.key, "kind": "ok", "sha256": p.meta["source_sha256"]} for p in samples]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            ledger_path(manifest.path(entry)).write_text(lines, "utf-8")
        return manifest

    def refer(manifest: Manifest, key: str, same_as: str) -> None:
        data = ShardDataset(manifest.folder)
        (shard,) = (entry.name for n, entry in enumerate(manifest.shards) if same_as in data.keys_of(n))
        meta = {"item_id": key.rpartition("_")[0]}
        write_references(
            manifest.path(manifest.shards[-1]),
            [Reference(key=key, same_as=same_as, shard=shard, meta=meta, text="")],
        )
        replace(manifest, references=1).save()

    train = write(
        "train",
        [
            photo("TRAIN0001", 0, "free"),
            photo("BOTH00001", 1, "another photo of a held-out item"),
            photo("TWIN00001", 0, "a held-out photo"),
            photo("TRAIN0002", 0, "of an item that is referred to there"),
            photo("TRAIN0003", 0, "referred to by a held-out item"),
            photo("TRAIN0003", 1, "free too"),
            photo("REFER0001", 0, "of a photo that valid does not store again"),
        ],
    )
    valid = write("valid", [photo("BOTH00001", 0, "a photo"), photo("VALID0001", 0, "a held-out photo")])
    refer(train, "VALID0001_4", "TRAIN0003_0")
    refer(valid, "REFER0001_3", "VALID0001_0")
    sets = ShardDataset(train.folder), ShardDataset(valid.folder)
    left_out = {"BOTH00001_1", "TWIN00001_0", "TRAIN0003_0", "REFER0001_0"}
    positions = held_out(*sets)
    assert {sets[0].keys[row] for row in positions.rows().tolist()} == left_out
    assert keys_of(FilteredDataset(sets[0], positions)) == ["TRAIN0001_0", "TRAIN0002_0", "TRAIN0003_1"]


def test_a_set_without_some_samples_keeps_the_others_in_order(small_set: Manifest) -> None:
    unsplit = ShardDataset(small_set.folder)
    some = FilteredDataset(unsplit, HeldOut.of([2, 6]))
    assert [some[i].key for i in range(len(some))] == [unsplit.keys[i] for i in range(len(unsplit)) if i not in (2, 6)]
    assert some[-1] == unsplit[-1] and some.meta_and_text(2) == unsplit.meta_and_text(3)
    with pytest.raises(IndexError):
        some[len(some)]
    assert len(FilteredDataset(unsplit, HeldOut.of([]))) == len(unsplit) > 7
