"""Photos by item id from local sets and object stores, with duplicates; hostile ids read nothing."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import pytest

from lavic.data.duplicates import Reference, write_references
from lavic.data.manifest import Manifest
from lavic.data.remote_shards import CacheSettings
from lavic.data.shard_dataset import ShardDataset
from lavic.data.tar_shards import Sample, sample_key
from lavic.errors import DataError, LavicError
from lavic.recommend.serving import photos as photos_module
from lavic.recommend.serving.photos import MOST_CHARACTERS, ItemPhotos
from lavic.storage.atomic import atomic_write
from lavic.storage.paths import as_path
from tests.crawled_sets import write_set

JPEG = b"\xff\xd8\xff\xe0"
HOSTILE = ["../../etc/passwd", "..", ".", "a/b", "a\0b", "%2e%2e%2f", "x" * 100_000, "", "\ud800", "A000_0", "é漢字"]


def sample(item: str, data: bytes) -> Sample:
    return Sample.of(item_id=item, n=0, jpg=data, title=item, width=1, height=1)


def key_of(item: str) -> str:
    return sample_key(item, 0)


@pytest.fixture
def photo_set(tmp_path: Path) -> Manifest:
    samples = [sample(f"A{n:03d}", JPEG + bytes([n]) * 100) for n in range(20)]
    samples.append(sample("a/b: ü", JPEG + b"odd"))
    return write_set(tmp_path / "set", samples, photos_per_shard=6)


def uploaded(manifest: Manifest, address: str) -> Path:
    home = as_path(address)
    home.mkdir(parents=True, exist_ok=True)
    for path in manifest.folder.iterdir():
        atomic_write(home / path.name, path.read_bytes())
    return home


@pytest.mark.parametrize("remote", [False, True])
def test_get_returns_the_bytes_of_the_photo(photo_set, tmp_path, remote):
    folder = uploaded(photo_set, f"memory://{tmp_path.name}/set") if remote else photo_set.folder
    cache = CacheSettings(folder=tmp_path / "copies")
    photos = ItemPhotos([folder], key_of, cache=cache)
    photo = photos.get("A013")
    assert photo is not None
    assert (photo.data, photo.media_type) == (JPEG + bytes([13]) * 100, "image/jpeg")
    assert photos.get("A014").etag != photo.etag == ItemPhotos([folder], key_of, cache=cache).get("A013").etag
    assert photos.get("a/b: ü").data == JPEG + b"odd" and photos.path("a/b: ü") == "/photos/a%2Fb%3A%20%C3%BC"
    assert not (tmp_path / "copies").exists(), "a shard was copied for one photo"
    if remote:  # a copy that exists for another reason is used
        ShardDataset(folder, cache=cache)[0]
        (folder / photo_set.shards[0].name).unlink()
        assert photos.get("A000").data == JPEG + bytes([0]) * 100


@pytest.mark.parametrize("item", HOSTILE, ids=[repr(item[:20]) for item in HOSTILE])
def test_hostile_ids_return_none(photo_set, item):
    photos = ItemPhotos([photo_set.folder], key_of)
    assert photos.get(item) is None and item not in photos and photos.path(item) is None


def test_ids_without_a_key_or_too_long_are_not_looked_up(photo_set):
    looked_up = []
    photos = ItemPhotos([photo_set.folder], lambda item: looked_up.append(item))
    assert photos.get("A000") is None and photos.get("x" * (MOST_CHARACTERS + 1)) is None
    assert looked_up == ["A000"]


def test_a_duplicate_has_the_photo_of_its_original(photo_set):
    shard = photo_set.path(photo_set.shards[2])
    meta = sample("TWIN", b"").meta
    row = Reference(key="TWIN_0", same_as="A003_0", shard=photo_set.shards[0].name, meta=meta, text="")
    write_references(shard, [row])
    dataclasses.replace(photo_set, references=1).save()
    photos = ItemPhotos([photo_set.folder], key_of)
    assert photos.get("TWIN").data == photos.get("A003").data and "TWIN" in photos
    assert ShardDataset(photo_set.folder).references["TWIN_0"].same_as == "A003_0"
    assert "TWIN_1" not in ShardDataset(photo_set.folder).references


def test_the_first_set_with_a_photo_is_used(photo_set, tmp_path):
    second = write_set(tmp_path / "second", [sample("A001", JPEG + b"other"), sample("B", JPEG + b"B")])
    photos = ItemPhotos([photo_set.folder, second.folder], key_of)
    assert photos.get("A001").data == JPEG + b"\1" * 100 and photos.get("B").data == JPEG + b"B"


def test_the_cache_is_bounded(photo_set, monkeypatch):
    read = []
    original = photos_module._read
    monkeypatch.setattr(photos_module, "_read", lambda data, row: read.append(row) or original(data, row))
    photos = ItemPhotos([photo_set.folder], key_of, memory=250)  # two photos of 104 bytes
    for n in (0, 1, 0, 2, 0, 1):
        photos.get(f"A{n:03d}")
    assert read == [0, 1, 2, 1]
    small = ItemPhotos([photo_set.folder], key_of, memory=10)
    assert small.get("A000").data and not small._kept
    assert sum(len(photo.data) for photo in photos._kept.values()) == photos._bytes <= 250


def test_threads_share_the_cache(photo_set):
    photos = ItemPhotos([photo_set.folder], key_of, memory=350)
    failed: list[BaseException] = []

    def read(start: int) -> None:
        try:
            for n in range(200):
                number = (start + 7 * n) % 20
                assert photos.get(f"A{number:03d}").data[-1] == number
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=read, args=(start,)) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and sum(len(photo.data) for photo in photos._kept.values()) == photos._bytes <= 350


def test_bytes_that_are_not_an_image_are_not_served(tmp_path):
    page = write_set(tmp_path / "set", [sample("P", b"<script>alert(1)</script>"), sample("G", b"GIF89a")])
    photos = ItemPhotos([page.folder], key_of)
    assert photos.get("P") is None and photos.get("G").media_type == "image/gif"


def test_a_damaged_photo_is_an_error_that_names_the_set(photo_set):
    shard = photo_set.path(photo_set.shards[0])
    content = shard.read_bytes()
    at = content.index(JPEG + b"\2")
    shard.write_bytes(content[: at + 50] + b"!" + content[at + 51 :])
    photos = ItemPhotos([photo_set.folder], key_of)
    with pytest.raises(DataError, match="A002_0 is damaged; `lavic verify`"):
        photos.get("A002")
    assert photos.get("A001") is not None


def test_a_missing_shard_in_an_object_store_is_an_error(photo_set, tmp_path):
    folder = uploaded(photo_set, f"memory://{tmp_path.name}/lost")
    photos = ItemPhotos([folder], key_of, cache=CacheSettings(folder=tmp_path / "copies"))
    (folder / photo_set.shards[0].name).unlink()
    with pytest.raises(LavicError, match="cannot be read"):
        photos.get("A000")
    assert photos.get("A013") is not None
