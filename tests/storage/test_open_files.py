"""Files that stay open: few, those that were read last, and none in the way of a fork or a thread."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from lavic.storage.cache import open_files
from lavic.storage.cache.open_files import OpenFiles
from lavic.storage.index import array_file
from lavic.storage.index.shared import write_index


def opened() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_few_stay_open_and_all_can_be_read(tmp_path: Path) -> None:
    paths = [tmp_path / str(n) for n in range(40)]
    for path in paths:
        path.write_text(f"file {path.name}")
    files, before, owner = OpenFiles(8), opened(), object()
    for n, path in [*enumerate(paths), *enumerate(paths)]:
        assert files.get((owner, n), lambda path=path: path).read(5, 99).decode() == path.name
        assert opened() <= before + 8
    handles = files.get((owner, 0), lambda: paths[0])
    for n, path in enumerate(paths):
        files.get((owner, n), lambda path=path: path)
    assert handles.read(0, 4) == b"file", "pushed out, but not closed while it is held"
    files.get((object(), 0), lambda: paths[0])
    files.drop(owner)
    del handles
    assert len(files) == 1 and opened() == before + 1


def test_the_file_that_was_opened_stays_until_another_key_asks(tmp_path: Path) -> None:
    path, files = tmp_path / "file", OpenFiles()
    path.write_text("old")
    first = files.get("old", lambda: path)
    (tmp_path / "new").write_text("newer")
    (tmp_path / "new").replace(path)
    assert files.get("old", lambda: path) is first and first.read(0, 9) == b"old"
    second = files.get("new", lambda: path)
    assert second.read(0, 9) == b"newer" and second.size == 5 and second.stamp != first.stamp


def test_threads_share_it(tmp_path: Path) -> None:
    paths = [tmp_path / str(n) for n in range(20)]
    for path in paths:
        path.write_text(path.name * 100)
    files, wrong = OpenFiles(3), []

    def read(first: int) -> None:
        for n in range(first, first + 2000):
            path = paths[n * 7 % 20]
            if files.get(path.name, lambda path=path: path).read(0, 9999).decode() != path.name * 100:
                wrong.append(path)

    threads = [threading.Thread(target=read, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(files) == 3


def test_a_forked_child_reads_on(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    files = OpenFiles()
    files.get("file", lambda: tmp_path / "file")
    child = os.fork()
    if not child:
        os._exit(0 if files.get("file", lambda: tmp_path / "gone").read(0, 9) == b"text" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_files_are_closed_also_when_modules_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the interpreter ends: their names are None by then."""
    (tmp_path / "file").write_text("text")
    write_index(tmp_path / "index", lambda writer: writer.column("n", "<i8").append(np.arange(9)), kind="k", source="s")
    raised: list[object] = []
    before = opened()
    handles = [open_files.OpenFile(tmp_path / "file"), array_file.ArrayFile(tmp_path / "index", kind="k", source="s")]
    assert opened() > before
    with monkeypatch.context() as patch:
        patch.setattr(sys, "unraisablehook", raised.append)
        for module in (open_files, array_file):
            patch.setattr(module, "os", None)
        handles.clear()
    assert not raised and opened() == before
