"""An item store gives back what was written, and is refused when it is not whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lavic.errors import DataError
from lavic.model.item_store import ItemStore, StoreManifest, write_manifest, write_part
from lavic.model.loading import Backbone


def make_store(folder: Path, backbone: Backbone, sizes: tuple[int, ...] = (3, 0, 2)) -> torch.Tensor:
    folder.mkdir()
    tokens = torch.randn(sum(sizes), 5, backbone.vision_width).half()
    parts, start = [], 0
    for n, size in enumerate(sizes):
        items = [{"id": f"I{i}", "key": f"I{i}_0", "title": f"title\u2028{i}"} for i in range(start, start + size)]
        parts.append(write_part(folder, f"{n:05d}", items, tokens[start : start + size]))
        start += size
    write_manifest(folder, backbone, None, parts)
    return tokens


def test_rows_come_back_in_any_order(tmp_path: Path, backbone: Backbone) -> None:
    tokens = make_store(tmp_path / "store", backbone)
    store = ItemStore.open(tmp_path / "store")
    assert len(store) == 5
    torch.testing.assert_close(store.lookup(["I4", "I0", "I4"]), tokens[[4, 0, 4]])
    assert store.title("I3") == "title\u20283"
    assert "I2" in store and "I9" not in store
    assert store.vision_adapter is None


def test_a_store_that_grows_while_it_is_opened_is_opened(
    tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_store(tmp_path / "store", backbone)
    smaller = StoreManifest.read(tmp_path / "store")
    for part in smaller.parts:
        (tmp_path / "store" / f"tokens-{part.name}.safetensors").unlink()
    items = [{"id": f"I{i}", "key": f"I{i}_0", "title": ""} for i in range(7)]
    part = write_part(tmp_path / "store", "grown", items, torch.zeros(7, 5, backbone.vision_width))
    manifests = [smaller, write_manifest(tmp_path / "store", backbone, None, [part])]
    monkeypatch.setattr(StoreManifest, "read", lambda folder: manifests.pop(0))
    assert len(ItemStore.open(tmp_path / "store")) == 7 and not manifests


def test_unknown_ids_are_named(tmp_path: Path, backbone: Backbone) -> None:
    make_store(tmp_path / "store", backbone)
    with pytest.raises(DataError, match="not in the item store: X, Y, Z and 1 more"):
        ItemStore.open(tmp_path / "store").lookup(["I0", "X", "Y", "Z", "W"])


def test_another_base_model_is_refused(tmp_path: Path, backbone: Backbone) -> None:
    make_store(tmp_path / "store", backbone)
    store = ItemStore.open(tmp_path / "store")
    store.check_base(backbone.fingerprint)
    with pytest.raises(DataError, match="an item store of another base model"):
        store.check_base("0123456789abcdef")


def test_a_store_that_is_not_whole_is_refused(tmp_path: Path, backbone: Backbone) -> None:
    with pytest.raises(DataError, match="no such item store"):
        ItemStore.open(tmp_path / "nothing")
    make_store(tmp_path / "store", backbone)
    file = tmp_path / "store" / "tokens-00000.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-2])
    with pytest.raises(DataError, match="in the manifest"):
        ItemStore.open(tmp_path / "store")
    file.write_bytes(data)
    (tmp_path / "store" / "manifest.json").unlink()
    with pytest.raises(DataError, match="not a complete item store"):
        ItemStore.open(tmp_path / "store")
