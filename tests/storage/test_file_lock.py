"""A lock that lives as long as its holder, and no longer."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lavic.errors import LavicError
from lavic.storage.file_lock import FileLock, is_held
from lavic.tracking.journal import Journal, read_journal

HOLDER = """
import os, sys, time
from pathlib import Path
from lavic.storage.file_lock import FileLock

assert FileLock(Path(sys.argv[1])).acquire() is False
lock = FileLock(Path(sys.argv[2]))
assert lock.acquire()
if os.fork() == 0:  # a data loader's worker, which outlives a killed rank
    time.sleep(60)
print("held", flush=True)
time.sleep(60)
"""


def test_one_holds_it_and_lets_go(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert is_held(path) is None, "nothing is known of what is not there"
    with FileLock(path) as lock:
        assert lock.acquire() and is_held(path)
        assert not FileLock(path).acquire(timeout_s=0.1)
    assert is_held(path) is False
    assert FileLock(path).acquire()
    assert is_held(path) is False, "forgotten is let go"


def test_it_goes_with_its_holder_though_a_forked_child_lives_on(tmp_path: Path) -> None:
    lock, held_file = FileLock(tmp_path / "mine"), tmp_path / "theirs"
    assert lock.acquire()
    words = [sys.executable, "-c", HOLDER, str(lock.path), str(held_file)]
    holder = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        assert is_held(held_file)
        holder.kill()
        holder.wait()
        until = time.monotonic() + 10  # the child may be so young that it has not dropped its copy yet
        while is_held(held_file) and time.monotonic() < until:
            time.sleep(0.01)
        assert is_held(held_file) is False
        assert FileLock(held_file).acquire()
    finally:
        os.killpg(holder.pid, 9)
        holder.stdout.close()
        lock.release()


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_no_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def flock(file: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", flock)
    with FileLock(tmp_path / "lock") as lock, FileLock(tmp_path / "lock") as second:
        assert lock.acquire() and second.acquire()
        assert lock.unsupported == os.strerror(code)
    assert is_held(tmp_path / "lock") is None


def test_a_removed_file_is_locked_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process removes the file between opening and locking: the lock must be on the file that is there."""
    path, flock, removed = tmp_path / "lock", fcntl.flock, []

    def late(file: int, operation: int) -> None:
        if not removed:
            removed.append(file)
            path.unlink()
        flock(file, operation)

    monkeypatch.setattr("fcntl.flock", late)
    with FileLock(path) as lock:
        assert lock.acquire() and removed
        assert is_held(path) is True
        lock.remove()
        assert not path.exists()


def test_a_journal_is_held_while_it_is_open(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    assert is_held(journal.path)
    journal.log(1, loss=1.0)
    journal.close()
    assert is_held(journal.path) is False


def test_a_journal_on_a_full_disk_says_so_in_one_line(tmp_path: Path) -> None:
    """A process whose files may not grow beyond 100 bytes: the line that does not fit is cut, then refused."""
    path = tmp_path / "metrics.jsonl"
    code = (
        "import resource, signal, sys\nfrom lavic.tracking.journal import Journal\n"
        "from lavic.errors import LavicError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))\n"
        "journal = Journal(sys.argv[1])\n"
        "try:\n    [journal.log(step, loss=1.0) for step in range(9)]\n"
        "except LavicError as error:\n    print(error); sys.exit(error.exit_code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == LavicError.exit_code, done.stderr
    assert done.stdout.startswith(f"{path} cannot be written (") and "make room" in done.stdout
    Journal(path).log(9, loss=2.0)
    assert [row["step"] for row in read_journal(path)] == [0, 1, 9]


@pytest.mark.parametrize("words", [("WORLD_SIZE", "2"), ("WORLD_SIZE", "1")])
def test_a_program_ends_with_the_commands_code(words: tuple[str, str]) -> None:
    """A rank leaves without taking the interpreter down; what it said is there all the same."""
    env = {**os.environ, "RANK": "0", words[0]: words[1]}
    done = subprocess.run([sys.executable, "-m", "lavic", "nonsense"], capture_output=True, text=True, env=env)
    assert done.returncode == 2
    assert "unknown command" in done.stderr
