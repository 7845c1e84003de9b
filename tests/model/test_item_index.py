"""An item store's index: made where it is missing, never another store's, few files open, nothing sent to workers."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from lavic.data.index.item_index import ItemIndex, index_path
from lavic.errors import DataError
from lavic.model.item_store import ItemStore, StoreManifest, write_manifest, write_part
from lavic.model.loading import Backbone
from tests.model.test_item_store import make_store


def index_of(folder: Path) -> Path:
    (path,) = folder.glob("items-*.safetensors")
    return path


def everything(store: ItemStore) -> list[object]:
    return [
        (id, store.title(id), store.key(id), store.count(id), store.lookup([id]).double().sum().item())
        for id in store.ids
    ]


def test_a_store_without_its_index_is_read_the_same(tmp_path: Path, backbone: Backbone, cache: Path) -> None:
    folder = tmp_path / "store"
    make_store(folder, backbone)
    expected = everything(ItemStore.open(folder))
    assert [row[0] for row in expected] == [f"I{n}" for n in range(5)]
    index_of(folder).unlink()
    store = ItemStore.open(folder)
    assert everything(store) == expected and not [*folder.glob("items-*.safetensors")], "readers leave a store alone"
    assert store.items._file.path.parent == cache / "indexes"
    stamp = store.items._file.path.stat().st_mtime_ns
    assert everything(ItemStore.open(folder)) == expected
    assert store.items._file.path.stat().st_mtime_ns == stamp, "made once"


@pytest.mark.parametrize("digests", [True, False])
def test_a_store_whose_lists_have_changed_gets_another_index(tmp_path: Path, backbone: Backbone, digests: bool) -> None:
    """With the digests of newer manifests, and by time and size with those that have none."""
    folder = tmp_path / "store"
    make_store(folder, backbone, (2,))
    note = folder / "manifest.json"
    items = folder / "items-00000.jsonl"
    manifest = json.loads(note.read_text())
    if not digests:
        manifest["parts"][0]["items_sha256"] = ""
        note.write_text(json.dumps(manifest))
    assert "I1" in ItemStore.open(folder)
    items.write_text(items.read_text().replace("I1", "J1"))
    if digests:
        assert "I1" in ItemStore.open(folder), "the index holds what was verified"
        index_of(folder).unlink()
        with pytest.raises(DataError, match=r"items-00000\.jsonl: does not match the manifest"):
            ItemStore.open(folder)
    else:
        os.utime(items, ns=(0, 0))
        store = ItemStore.open(folder)
        assert "I1" not in store and store.key("J1") == "J1_0"


def test_another_store_s_index_is_not_taken(
    tmp_path: Path, backbone: Backbone, caplog: pytest.LogCaptureFixture
) -> None:
    make_store(tmp_path / "a", backbone, (3,))
    make_store(tmp_path / "b", backbone, (4,))
    shutil.copy(index_of(tmp_path / "a"), index_of(tmp_path / "b"))
    assert ItemStore.open(tmp_path / "b").ids == ["I0", "I1", "I2", "I3"]
    assert "an index of other sources; building the index again" in caplog.text
    os.truncate(index_of(tmp_path / "a"), index_of(tmp_path / "a").stat().st_size - 3)
    assert ItemStore.open(tmp_path / "a").ids == ["I0", "I1", "I2"]


def test_a_damaged_index_is_one_line(tmp_path: Path, backbone: Backbone) -> None:
    make_store(tmp_path / "store", backbone, (3, 2))
    path = index_of(tmp_path / "store")
    path.write_bytes(path.read_bytes().replace(b'"key": "I1_0"', b'"key": "I7_0"'))
    store = ItemStore.open(tmp_path / "store")
    assert store.key("I4") == "I4_0", "of a list that is as it was"
    with pytest.raises(DataError, match="damaged: remove this file, it will be built again"):
        store.key("I0")


def test_ids_are_a_sequence(tmp_path: Path, backbone: Backbone) -> None:
    make_store(tmp_path / "store", backbone)
    ids = ItemStore.open(tmp_path / "store").ids
    assert ids == [f"I{n}" for n in range(5)] and ids[-1] == "I4" and ids[1:3] == ["I1", "I2"] and len(ids) == 5
    assert "I3" in ids and "I5" not in ids and 3 not in ids and ids.index("I2") == 2
    with pytest.raises(IndexError):
        ids[5]


def test_an_id_that_shares_half_its_hash_is_another(
    tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lavic.storage.index.text_hash.digest_of", lambda text: b"\1" * 16)
    make_store(tmp_path / "store", backbone)
    store = ItemStore.open(tmp_path / "store")
    assert [store.title(f"I{n}") for n in range(5)] == [f"title\u2028{n}" for n in range(5)] and "I5" not in store


def test_an_estimate_knows_the_items_without_the_tokens(tmp_path: Path, backbone: Backbone) -> None:
    make_store(tmp_path / "store", backbone)
    (tmp_path / "store" / "tokens-00000.safetensors").unlink()
    items = ItemIndex.of_store(tmp_path / "store")
    assert items and len(items) == 5 and "I0" in items and "I5" not in items
    (tmp_path / "store" / "manifest.json").write_text("{}")
    assert ItemIndex.of_store(tmp_path / "store") is ItemIndex.of_store(tmp_path / "none") is None


def test_a_store_of_many_parts_keeps_few_files_open(tmp_path: Path, backbone: Backbone) -> None:
    folder = tmp_path / "store"
    folder.mkdir()
    tokens = torch.arange(300.0)[:, None, None].expand(300, 5, backbone.vision_width).half()
    rows = [[{"id": f"I{n}", "key": f"I{n}_0", "title": f"title {n}"}] for n in range(300)]
    parts = [write_part(folder, f"{n:05d}", row, tokens[n : n + 1]) for n, row in enumerate(rows)]
    write_manifest(folder, backbone, None, parts)
    before = sum(1 for _ in Path("/proc/self/fd").iterdir())
    store = ItemStore.open(folder)
    assert torch.equal(store.lookup([f"I{n}" for n in range(300)]), tokens)
    assert [store.title(f"I{n}") for n in range(300)] == [f"title {n}" for n in range(300)]
    assert sum(1 for _ in Path("/proc/self/fd").iterdir()) <= before + 3


def look(store: ItemStore, queue: multiprocessing.Queue) -> None:
    lines = Path("/proc/self/maps").read_text().splitlines()
    queue.put((everything(store), [line for line in lines if "/dev/shm/" in line and "/dev/shm/sem." not in line]))


def test_what_a_worker_that_is_not_forked_gets_is_where_the_store_is(tmp_path: Path, backbone: Backbone) -> None:
    for name, count in (("small", 5), ("large", 500)):
        make_store(tmp_path / name, backbone, (count,))
    stores = [ItemStore.open(tmp_path / name) for name in ("small", "large")]
    stores[1].lookup(stores[1].ids)
    sizes = [len(multiprocessing.reduction.ForkingPickler.dumps(store)) for store in stores]
    assert max(sizes) < 500 and sizes[0] == sizes[1]
    context = multiprocessing.get_context("forkserver")
    queue = context.Queue()
    worker = context.Process(target=look, args=(stores[0], queue))
    worker.start()
    rows, mapped = queue.get(timeout=120)
    worker.join()
    assert rows == everything(stores[0]) and not mapped


def test_a_store_that_was_changed_is_not_opened_by_a_worker(tmp_path: Path, backbone: Backbone) -> None:
    make_store(tmp_path / "store", backbone)
    store = ItemStore.open(tmp_path / "store")
    data = pickle.dumps(store)
    assert everything(pickle.loads(data)) == everything(store)
    parts = StoreManifest.read(tmp_path / "store").parts[:1]
    write_manifest(tmp_path / "store", backbone, None, parts)
    with pytest.raises(DataError, match="the item store changed while in use; run the command again"):
        pickle.loads(data)
    assert index_path(tmp_path / "store", parts).is_file()
