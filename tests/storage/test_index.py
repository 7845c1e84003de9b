"""Files of arrays that processes share: whole or not taken, made once, and never in the way."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from lavic.errors import LavicError
from lavic.storage.index import shared, text_hash
from lavic.storage.index.array_file import ArrayFile, ArrayFileError, ArrayWriter
from lavic.storage.index.shared import index_name, shared_index, write_index
from lavic.storage.index.text_column import TextColumn, TextColumnWriter
from lavic.storage.index.text_hash import HashSet, hash_text, hash_texts, in_order

TEXTS = ["", "a_0", "ä_1", "\ud800_2", *(f"B{n:09d}_{n % 3}" for n in range(300)), "x" * 255]


def build(writer: ArrayWriter) -> None:
    column = TextColumnWriter(writer, "keys")
    for start in (0, 1, 5, 70, 71):  # pieces of any size
        column.append(TEXTS[start : {0: 1, 1: 5, 5: 70, 70: 71, 71: len(TEXTS)}[start]])
    column.append([])
    writer.column("pairs", "<u4", 2).append(np.arange(10).reshape(5, 2))
    writer.column("empty", "<i8")


def make(path: Path, source: str = "s") -> ArrayFile:
    write_index(path, build, kind="k/1", source=source)
    return ArrayFile(path, kind="k/1", source=source)


def test_columns_come_back(tmp_path: Path) -> None:
    file = make(tmp_path / "index.safetensors")
    keys = TextColumn(file, "keys")
    assert keys == TEXTS and list(keys) == TEXTS and keys[-1] == "x" * 255 and keys[60:70] == TEXTS[60:70]
    assert [keys[n] for n in range(len(keys))] == TEXTS and keys[5:1] == [] and keys[::100] == TEXTS[::100]
    assert keys != TEXTS[:-1] and keys != [*TEXTS[:-1], "y"]
    with pytest.raises(IndexError):
        keys[len(TEXTS)]
    assert file["pairs"].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]] and file["empty"].shape == (0,)
    assert not file["pairs"].flags.writeable
    assert load_file(tmp_path / "index.safetensors")["pairs"].tolist() == file["pairs"].tolist(), "others read it too"
    assert [path.name for path in tmp_path.iterdir()] == ["index.safetensors"]


def test_a_file_that_is_removed_stays_open_and_pickled_it_is_its_path(tmp_path: Path) -> None:
    file = make(tmp_path / "index.safetensors")
    data = pickle.dumps(file)
    assert len(data) < 300 and TextColumn(pickle.loads(data), "keys") == TEXTS
    file.path.unlink()
    assert TextColumn(file, "keys") == TEXTS


@pytest.mark.parametrize("damage", ["cut", "empty", "header", "json", "longer", "other", "version"])
def test_what_is_not_the_index_is_not_taken(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "index.safetensors"
    make(path)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    path.write_bytes(
        {
            "cut": data[:-1],
            "empty": b"",
            "header": data[:20],
            "json": data[:8] + b"[" * length + data[8 + length :],
            "longer": data + b"\0",
        }.get(damage, data)
    )
    with pytest.raises(ArrayFileError):
        ArrayFile(path, kind="k/2" if damage == "version" else "k/1", source="t" if damage == "other" else "s")


def test_a_bad_index_is_made_anew_elsewhere(tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    beside = tmp_path / "source"
    beside.mkdir()
    how = {"kind": "k/1", "source": "s" * 64, "owner": beside, "beside": beside}
    path = beside / index_name("k/1", "s" * 64)
    write_index(path, build, kind="k/1", source="s" * 64)
    assert shared_index(build, **how).path == path
    path.write_bytes(path.read_bytes()[:-5])
    again = shared_index(build, **how)
    assert again.path.parent == cache / "indexes" and "truncated; building the index again" in caplog.text
    again.path.write_bytes(b"nonsense")
    assert TextColumn(shared_index(build, **how), "keys") == TEXTS
    assert not [*(cache / "indexes").glob(".*")], "no lock and no half a file is left"


def test_where_the_cache_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LAVIC_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(shared.tempfile, "gettempdir", lambda: str(tmp_path))
    how = {"kind": "k/1", "source": "s" * 64, "owner": tmp_path}
    assert shared_index(build, **how).path.parent == tmp_path / f"lavic-{os.getuid()}"
    monkeypatch.setattr(shared.tempfile, "gettempdir", lambda: str(tmp_path / "file"))
    with pytest.raises(LavicError, match=r"indexes: cannot be written to: set LAVIC_CACHE") as caught:
        shared_index(build, **how)
    assert caught.value.exit_code == 2


PROGRAM = """
import sys, time
from pathlib import Path
import numpy as np
from lavic.storage.index.shared import shared_index

def build(writer):
    with (Path(sys.argv[1]) / "built").open("a") as file:
        file.write("x")
    Path(sys.argv[1], "building").touch()
    if sys.argv[2] == "dies":
        time.sleep(60)
    time.sleep(0.5)
    writer.column("numbers", "<i8").append(np.arange(1000))

print(shared_index(build, kind="k/1", source="s" * 64, owner="here")["numbers"].sum())
"""


def start(tmp_path: Path, how: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "LAVIC_CACHE": str(tmp_path)}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path), how], env=environment, stdout=subprocess.PIPE, text=True
    )


def test_processes_make_it_once_and_one_that_dies_does_not_matter(tmp_path: Path) -> None:
    dying = start(tmp_path, "dies")
    while not (tmp_path / "building").exists():
        assert dying.poll() is None
        time.sleep(0.02)
    others = [start(tmp_path, "makes") for _ in range(3)]
    time.sleep(0.2)
    dying.kill()
    assert [other.communicate(timeout=60)[0].strip() for other in others] == ["499500"] * 3
    assert (tmp_path / "built").read_text() == "xx", "by the one that died, and by one of the others"
    dying.wait(60)
    dying.stdout.close()
    assert len([*(tmp_path / "indexes").iterdir()]) == 1


def test_what_nobody_needs_any_more_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAVIC_CACHE", str(tmp_path))
    first = shared_index(build, kind="k/1", source="1" * 64, owner="here").path
    other = shared_index(build, kind="k/1", source="1" * 64, owner="there").path
    second = shared_index(build, kind="k/1", source="2" * 64, owner="here").path
    assert first.exists(), "somebody may be about to open it"
    for path in (first, other, second):
        os.utime(path, (time.time() - 2 * 86400,) * 2)
    shared_index(build, kind="k/1", source="2" * 64, owner="here")
    third = shared_index(build, kind="k/1", source="3" * 64, owner="here").path
    assert not first.exists() and second.exists() and other.exists() and third.exists()
    os.utime(other, (time.time() - 40 * 86400,) * 2)
    shared_index(build, kind="k/1", source="4" * 64, owner="here")
    assert not other.exists()


def test_hashes_are_those_of_any_process() -> None:
    assert hash_text("B000000000") == hash_texts(["B000000000"])[0, 0]
    assert hash_texts(["B000000000"]).tolist() == [[0x8E8F7F25972991CC, 0xF4AACA8C716F5E91]]


@pytest.mark.parametrize("most", [7, 100, 1000])
def test_an_order_in_pieces_is_the_order(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_hash, "_CHUNK", 64)
    hashes = hash_texts(f"{n % 190}" for n in range(200))[:, 0]
    assert np.concatenate([*in_order(hashes, most)]).tolist() == np.argsort(hashes, kind="stable").tolist()


def test_a_set_of_hashes_compares_both_halves() -> None:
    pairs = np.array([[5, 1], [5, 3], [5, 3], [7, 0], [2**64 - 1, 9]], "<u8")
    wanted = np.array([[5, 3], [5, 2], [5, 1], [5, 9], [6, 1], [7, 0], [2**64 - 1, 9], [2**64 - 1, 10], [0, 0]], "<u8")
    known = HashSet(pairs)
    assert len(known) == 4 and known.find(wanted).tolist() == [1, -1, 0, -1, -1, 2, 3, -1, -1]
    assert known.holds(wanted).tolist() == [True, False, True, False, False, True, True, False, False]
    assert not HashSet(np.empty((0, 2), "<u8")).holds(wanted).any()
