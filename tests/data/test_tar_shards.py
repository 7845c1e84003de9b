"""The tar contract: bytes, index, keys, and that nothing half-written is taken for whole."""

from __future__ import annotations

import hashlib
import re
import struct
import tarfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lavic.data import tar_writer
from lavic.data.descriptions import descriptions_path, read_descriptions, write_descriptions
from lavic.data.tar_shards import META, Sample, index_path, parse_sample, read_samples, sample_key
from lavic.data.tar_writer import ShardWriter
from lavic.errors import DataError
from lavic.storage.atomic import atomic_open, atomic_write, remove_partial_files

Make = Callable[..., Sample]


def write(path: Path, samples: list[Sample]) -> ShardWriter:
    with ShardWriter(path) as writer:
        for sample in samples:
            writer.add(sample)
    return writer


def test_a_shard_is_plain_ustar_without_times_or_owners(tmp_path: Path, make_sample: Make) -> None:
    writer = write(tmp_path / "x-000000.tar", [make_sample(n) for n in range(3)])
    data = writer.path.read_bytes()
    assert (len(data), hashlib.sha256(data).hexdigest()) == (writer.bytes, writer.entry.sha256) and len(
        data
    ) % 10240 == 0
    with tarfile.open(writer.path) as tar:
        members = tar.getmembers()
    keys = [f"B{n:09d}_0" for n in range(3)]
    assert [member.name for member in members] == [f"{key}.{end}" for key in keys for end in ("jpg", "json", "txt")]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
    assert data[257:263] == b"ustar\0"


@given(st.text("abzAZ09_-", min_size=1, max_size=90), st.integers(0, 8**11 - 1))
def test_headers_are_those_of_tarfile(key: str, size: int) -> None:
    member = tarfile.TarInfo(f"{key}.json")
    member.size = size
    assert tar_writer._header(f"{key}.json".encode(), size) == member.tobuf(tarfile.USTAR_FORMAT)


def test_equal_samples_give_equal_bytes(tmp_path: Path, make_sample: Make) -> None:
    samples = [make_sample(n) for n in range(4)]
    assert write(tmp_path / "a.tar", samples).entry.sha256 == write(tmp_path / "b.tar", samples).entry.sha256


def test_the_index_leads_to_every_sample(tmp_path: Path, make_sample: Make) -> None:
    samples = [make_sample(n) for n in range(5)]
    path = write(tmp_path / "x.tar", samples).path
    data, index = path.read_bytes(), index_path(path).read_bytes()
    offsets = struct.unpack("<6Q", index)
    assert [parse_sample(data[a:b], "x") for a, b in pairwise(offsets)] == samples
    assert list(read_samples(path)) == samples
    assert list(samples[0].meta) == list(META) and samples[0].image.size == (8, 6)


def test_an_error_leaves_nothing_behind(tmp_path: Path, make_sample: Make) -> None:
    path = write(tmp_path / "x.tar", [make_sample(1)]).path
    before = path.read_bytes()
    with pytest.raises(KeyError), ShardWriter(path) as writer:
        writer.add(make_sample(2))
        raise KeyError
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.tar", "x.tar.idx"]


def test_a_shard_without_a_sample_is_not_written(tmp_path: Path) -> None:
    assert write(tmp_path / "x.tar", []).samples == 0 and not list(tmp_path.iterdir())


def test_samples_have_one_schema(tmp_path: Path, make_sample: Make) -> None:
    good = make_sample(1)
    bad = Sample(key=good.key, item_id=good.item_id, jpg=good.jpg, meta={**good.meta, "width": "8"}, text="")
    with pytest.raises(AssertionError, match="width"):
        write(tmp_path / "x.tar", [bad])


@pytest.mark.parametrize("cut", [100, 600, 1500, 5000])
def test_a_shard_cut_short_is_refused(tmp_path: Path, make_sample: Make, cut: int) -> None:
    path = write(tmp_path / "x.tar", [make_sample(n) for n in range(3)]).path
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"x\.tar"):
        list(read_samples(path))


def test_a_broken_header_is_refused(tmp_path: Path, make_sample: Make) -> None:
    path = write(tmp_path / "x.tar", [make_sample(1)]).path
    data = bytearray(path.read_bytes())
    data[3] ^= 0xFF
    with pytest.raises(DataError, match="broken tar header"):
        parse_sample(bytes(data[: struct.unpack("<2Q", index_path(path).read_bytes())[1]]), "here")


@given(st.text(max_size=200), st.integers(0, 10**6))
def test_keys_are_safe_for_every_loader(id: str, n: int) -> None:
    key = sample_key(id, n)
    assert re.fullmatch(r"[A-Za-z0-9_-]+", key) and len(key) <= 90 and key.endswith(f"_{n}")
    assert "/" not in key and "." not in key


@given(st.lists(st.text(max_size=30), unique=True, max_size=30))
def test_different_items_have_different_keys(ids: list[str]) -> None:
    assert len({sample_key(id, 0) for id in ids}) == len(ids)


@pytest.mark.parametrize("id", ["../../etc/passwd", "B0.1", "écharpe", "x" * 10_000, "", "a/b", "a b", "\ud800"])
def test_unsafe_ids_stay_apart_from_paths(id: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9_-]{3,90}", sample_key(id, 0)) and sample_key(id, 0) != sample_key(id + "x", 0)


def test_plain_ids_are_kept() -> None:
    assert sample_key("B08LYS9WYD", 4) == "B08LYS9WYD_4"


def test_files_are_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    atomic_write(path, "old")
    with pytest.raises(ValueError), atomic_open(path) as file:
        file.write(b"half")
        raise ValueError
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["x.json"]
    (tmp_path / ".y.tar.0123.part").write_text("left by a killed writer")
    (tmp_path / ".folder.0123.part" / "in").mkdir(parents=True)
    remove_partial_files(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_descriptions_join_by_key(tmp_path: Path) -> None:
    shard = tmp_path / "x-000000.tar"
    assert read_descriptions(shard) == {}
    write_descriptions(
        shard,
        [{"key": "a_0", "text": "Ein grüner Becher", "model": "m", "weights": "w", "prompt": "1", "views": "five"}],
    )
    assert descriptions_path(shard).name == "x-000000.descriptions.jsonl"
    assert read_descriptions(shard) == {"a_0": "Ein grüner Becher"}
    descriptions_path(shard).write_text('{"key": "a_0"}\n')
    with pytest.raises(DataError, match=r"descriptions\.jsonl:1: not a description"):
        read_descriptions(shard)
