"""Files that stay open: few, those that were read last, and none in the way of a fork or a thread."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

from lavic.storage.open_files import OpenFiles


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
    held = files.get((owner, 0), lambda: paths[0])
    for n, path in enumerate(paths):
        files.get((owner, n), lambda path=path: path)
    assert held.read(0, 4) == b"file", "pushed out, but not closed while it is held"
    files.get((object(), 0), lambda: paths[0])
    files.drop(owner)
    del held
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


def test_nothing_is_said_when_the_interpreter_ends(tmp_path: Path) -> None:
    """Modules are gone then before the last files are closed."""
    (tmp_path / "file").write_text("text")
    program = (
        "import builtins, pathlib, sys, numpy\n"
        "from lavic.storage.index.array_file import ArrayFile\n"
        "from lavic.storage.index.shared import write_index\n"
        "from lavic.storage.open_files import FILES\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "def build(writer): writer.column('numbers', '<i8').append(numpy.arange(9))\n"
        "write_index(folder / 'index', build, kind='k', source='s')\n"
        "builtins.kept = [ArrayFile(folder / 'index', kind='k', source='s'), FILES.get('f', lambda: folder / 'file')]\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
