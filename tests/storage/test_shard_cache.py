"""Copies of remote shards: one download for all processes, bounded, and whole or not there."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lavic.errors import ConfigError, DataError, LavicError
from lavic.storage.cache import shard_download
from lavic.storage.cache.shard_cache import ATTEMPTS, ShardCache, shard_folder
from lavic.storage.cache.shard_download import RemoteShard
from lavic.storage.paths import as_path
from tests.conftest import go_without
from tests.storage.object_store import ObjectStore, object_store

READ = """
import sys
from pathlib import Path
from lavic.storage.cache.shard_cache import ShardCache
from lavic.storage.cache.shard_download import RemoteShard
from lavic.storage.paths import as_path
folder, limit, sha256, size, *addresses = sys.argv[1:]
cache = ShardCache(Path(folder), int(limit), backoff_s=0.01)
print("ready", flush=True)
sys.stdin.readline()
for address in addresses:
    path = as_path(address)
    shard = RemoteShard(folder=path.parent, name=path.name, sha256=sha256, bytes=int(size))
    print(len(cache.read(shard, 0, int(size))), flush=True)
"""
"""Reads shards once it is told to begin."""


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with object_store() as store:
        yield store


def make(size: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(size)


def shard(address: str, data: bytes) -> RemoteShard:
    path = as_path(address)
    return RemoteShard(folder=path.parent, name=path.name, sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))


def in_memory(name: str, data: bytes) -> RemoteShard:
    path = as_path(f"memory://{name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return shard(str(path), data)


def reader(cache: Path, limit: int, wanted: RemoteShard) -> subprocess.Popen[str]:
    argv = [sys.executable, "-c", READ, str(cache), str(limit), wanted.sha256, str(wanted.bytes), str(wanted.path)]
    return subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob(".*") if path.name != ".room.lock")


@pytest.mark.slow
def test_many_processes_download_a_shard_once(store: ObjectStore, tmp_path: Path) -> None:
    data = make(3_000_000, 1)
    wanted = shard(store.put("once.tar", data), data)
    readers = [reader(tmp_path, 1 << 30, wanted) for _ in range(4)]
    for process in readers:
        assert process.stdout and process.stdout.readline() == "ready\n"
    outputs = [process.communicate("go\n", timeout=240)[0] for process in readers]
    assert outputs == [f"{len(data)}\n"] * 4
    assert store.served["once.tar"] == len(data)
    assert [path.name for path in tmp_path.glob("[!.]*")] == [f"{wanted.sha256}.tar"] and not leftovers(tmp_path)
    assert (tmp_path / f"{wanted.sha256}.tar").read_bytes() == data


def test_threads_too(tmp_path: Path) -> None:
    data = make(1000, 2)
    wanted, cache = in_memory(f"{tmp_path.name}/a.tar", data), ShardCache(tmp_path, 5000)
    read: list[bytes] = []
    threads = [threading.Thread(target=lambda: read.append(cache.read(wanted, 10, 20))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert read == [data[10:20]] * 8


@pytest.mark.parametrize("faults", [["cut"], ["busy"], ["busy", "cut", "busy", "cut"]])
def test_a_store_that_fails_now_and_then_is_asked_again(
    store: ObjectStore, tmp_path: Path, faults: list, caplog: pytest.LogCaptureFixture
) -> None:
    data = make(200_000, 3)
    wanted = shard(store.put(f"flaky-{'-'.join(faults)}.tar", data), data)
    store.fail(wanted.path.name, *faults)
    assert ShardCache(tmp_path, 1 << 30, backoff_s=0.01).read(wanted, 0, len(data)) == data
    assert not store.faults[wanted.path.name], "every fault has happened"


def test_a_store_that_fails_for_good_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def broken(path: Path) -> Iterator[bytes]:
        tries.append(path)
        yield b"half"
        raise shard_download._DownloadError("cannot be read (503)")

    monkeypatch.setattr(shard_download, "_chunks", broken)
    wanted = in_memory(f"{tmp_path.name}/a.tar", b"x" * 100)
    with pytest.raises(LavicError, match=r"a\.tar: cannot be read \(503\), 5 times") as error:
        ShardCache(tmp_path, 1000, backoff_s=0.001).read(wanted, 0, 10)
    assert "\n" not in str(error.value) and error.value.exit_code == 1 and len(tries) == ATTEMPTS
    assert not list(tmp_path.glob("[!.]*")) and not list(tmp_path.glob(".*.part"))


def test_another_file_than_the_manifest_names_is_refused(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 10_000, backoff_s=0.001)
    wanted = in_memory(f"{tmp_path.name}/a.tar", make(1000, 4))
    wanted.path.write_bytes(make(1000, 5))
    with pytest.raises(LavicError, match="its sha256 differs"):
        cache.read(wanted, 0, 10)
    wanted.path.write_bytes(b"another")
    with pytest.raises(DataError, match=r"a\.tar has 7 bytes, not 1000; `lavic verify` lists"):
        cache.read(wanted, 0, 10)
    wanted.path.unlink()
    with pytest.raises(DataError, match=r"a\.tar: cannot be read"):
        cache.read(wanted, 0, 10)
    assert not list(tmp_path.glob("*.tar")) and not list(tmp_path.glob(".*.part"))


def test_those_used_longest_ago_make_room(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 3500)
    shards = [in_memory(f"{tmp_path.name}/{n}.tar", make(1000, n)) for n in range(6)]
    for number, wanted in enumerate(shards[:3]):
        cache.fetch(wanted)
        os.utime(cache.path(wanted), times=(time.time() - 1000 + number,) * 2)
    assert cache.read(shards[0], 0, 5) == make(1000, 0)[:5]  # its last use is now
    cache.fetch(shards[3])
    assert [cache.holds(wanted) for wanted in shards] == [True, False, True, True, False, False]
    cache.fetch(shards[4])
    assert [cache.holds(wanted) for wanted in shards] == [True, False, False, True, True, False]
    with pytest.raises(ConfigError, match=r"has 1,000 bytes, more than .* cache .* \(999\): raise --cache\.bytes"):
        ShardCache(tmp_path, 999).fetch(shards[5])


def test_a_copy_that_is_removed_while_it_is_read_is_read_on(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 1500)
    first, second = (in_memory(f"{tmp_path.name}/{n}.tar", make(1000, n)) for n in range(2))
    cache.fetch(first)
    file = cache._open(first)
    assert file is not None
    cache.fetch(second)
    assert not cache.holds(first) and os.pread(file, 1000, 0) == make(1000, 0)
    os.close(file)
    assert cache.read(first, 0, 1000) == make(1000, 0), "and downloaded again"


def test_readers_of_more_than_the_cache_holds_get_on(tmp_path: Path) -> None:
    shards = [in_memory(f"{tmp_path.name}/{n}.tar", make(1000, n)) for n in range(4)]
    most, wrong = [0], []

    def read(seed: int) -> None:
        cache, choice = ShardCache(tmp_path, 1500), random.Random(seed)
        for _ in range(25):
            number = choice.randrange(4)
            if cache.read(shards[number], 0, 1000) != make(1000, number):
                wrong.append(number)
            sizes = []
            for path in (*tmp_path.glob("*.tar"), *tmp_path.glob(".*.part")):
                try:
                    sizes.append(path.stat().st_size)
                except FileNotFoundError:
                    continue
            most[0] = max(most[0], len(sizes))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not wrong and not any(thread.is_alive() for thread in threads)
    assert sum(path.stat().st_size for path in tmp_path.glob("*.tar")) <= 1500
    assert not leftovers(tmp_path)


def test_what_a_killed_process_left_is_no_copy_and_is_removed(store: ObjectStore, tmp_path: Path) -> None:
    data, more = make(500_000, 6), make(1000, 7)
    wanted = shard(store.put("killed.tar", data), data)
    other = shard(store.put("other.tar", more), more)
    store.fail("killed.tar", "stall")
    process = reader(tmp_path, 600_000, wanted)
    assert process.stdout and process.stdout.readline() == "ready\n" and process.stdin
    process.stdin.write("go\n")
    process.stdin.flush()
    assert store.stalled.wait(120)
    cache = ShardCache(tmp_path, 600_000)
    assert not cache.fetch(wanted, wait=False), "it is being downloaded"
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    assert not cache.holds(wanted) and len(list(tmp_path.glob(".*.part"))) == 1
    # What is left counts no more: there is room for both.
    assert cache.read(other, 0, 1000) == more and not list(tmp_path.glob(".*.part"))
    assert cache.read(wanted, 0, 500_000) == data
    assert cache.holds(other) and not leftovers(tmp_path)


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    wanted = in_memory(f"{tmp_path.name}/a.tar", b"x" * 100)
    with pytest.raises(ConfigError, match=r"cannot be used \(Not a directory\).*--cache\.folder"):
        ShardCache(tmp_path / "file" / "cache", 1000).read(wanted, 0, 10)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_and_one_that_is_read_only(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "lavic", small], capture_output=True)
    if mounted.returncode:
        go_without(f"no small disk: {mounted.stderr.decode().strip()}")
    try:
        cache = ShardCache(small / "cache", 1 << 30)
        shards = [in_memory(f"{tmp_path.name}/{n}.tar", make(120_000, n)) for n in range(4)]
        for number, wanted in enumerate(shards[:3]):  # a full disk bounds the cache as its limit does
            assert cache.read(wanted, 0, 9) == make(120_000, number)[:9]
            os.utime(cache.path(wanted), times=(time.time() - 100 + number,) * 2)
        assert [cache.holds(wanted) for wanted in shards] == [False, True, True, False]
        subprocess.run(["mount", "-o", "remount,ro", small], check=True)
        assert cache.read(shards[2], 0, 9) == make(120_000, 2)[:9], "what is there can be read"
        with pytest.raises(ConfigError, match=r"cannot be used \(Read-only file system\)"):
            cache.read(shards[0], 0, 9)
        subprocess.run(["mount", "-o", "remount,rw", small], check=True)
        (small / "full").write_bytes(bytes(50_000))
        for wanted in shards[1:3]:
            cache.path(wanted).unlink()
        (small / "fuller").write_bytes(bytes(150_000))
        with pytest.raises(LavicError, match=r"no room for another shard \(No space left on device\).*--cache\.folder"):
            cache.read(shards[0], 0, 9)
        assert not list(small.glob("cache/.*.part"))
    finally:
        subprocess.run(["umount", small], check=True)


def test_where_copies_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("LAVIC_CACHE", "SLURM_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/home/me/.cache")
    assert shard_folder() == Path("/home/me/.cache/lavic/shards")
    monkeypatch.setenv("TMPDIR", "/scratch")
    assert shard_folder() == Path(f"/scratch/lavic-{os.getuid()}/shards")
    if os.getuid() == 0:  # a folder that somebody else has made under our name
        (tmp_path / f"lavic-{os.getuid()}").mkdir()
        os.chown(tmp_path / f"lavic-{os.getuid()}", 12345, -1)
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        assert shard_folder() == Path("/home/me/.cache/lavic/shards")
    monkeypatch.setenv("SLURM_TMPDIR", "/local/job")
    assert shard_folder() == Path(f"/local/job/lavic-{os.getuid()}/shards")
    monkeypatch.setenv("LAVIC_CACHE", "/nvme")
    assert shard_folder() == Path("/nvme/shards")
