"""An output folder is tried before the work, kept for one command, and left as it was where nothing was made."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lavic.errors import ConfigError, LavicError
from lavic.storage.output_folder import lock_output_folder, not_writable


def test_a_second_command_is_kept_out_until_the_first_has_ended(tmp_path: Path) -> None:
    out = tmp_path / "a" / "out"
    with lock_output_folder(out):
        with (
            pytest.raises(ConfigError, match="another lavic command is writing to this folder"),
            lock_output_folder(out, timeout_s=0),
        ):
            pass
        (out / "made").write_text("x")
    with lock_output_folder(out):
        pass
    assert {path.name for path in out.iterdir()} == {".lock", "made"}


def test_another_process_is_kept_out_too(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from lavic.storage.output_folder import lock_output_folder\n"
        "with lock_output_folder(Path(sys.argv[1]), timeout_s=0): pass"
    )
    with lock_output_folder(tmp_path):
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "another lavic command is writing" in done.stderr


def test_a_folder_in_which_nothing_was_made_is_removed_with_its_parents(tmp_path: Path) -> None:
    with pytest.raises(KeyError), lock_output_folder(tmp_path / "a" / "b"):
        raise KeyError
    assert not (tmp_path / "a").exists()
    (tmp_path / "there").mkdir()
    with pytest.raises(KeyError), lock_output_folder(tmp_path / "there"):
        raise KeyError
    assert (tmp_path / "there").is_dir()


@pytest.mark.parametrize("path", ["file", "file/out", "file/deeper/out"])
def test_a_file_where_a_folder_is_needed_is_named(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=rf"{path}: cannot be written to \(a file is where a folder is needed\)"):
        lock_output_folder(tmp_path / path).__enter__()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_folder_that_belongs_to_another_user_is_refused_before_the_work(tmp_path: Path) -> None:
    """Root ignores file modes, so the folder is tried as the user `nobody`."""
    (tmp_path / "out").mkdir(mode=0o755)
    (tmp_path / "out" / ".lock").write_text("")
    (tmp_path / "out" / ".lock").chmod(0o666)  # the lock alone can be had
    for parent in (tmp_path, *tmp_path.parents):
        if parent != Path("/tmp"):
            parent.chmod(parent.stat().st_mode | 0o055)
    pid = os.fork()
    if not pid:
        try:
            os.setgid(65534)
            os.setuid(65534)
            lock_output_folder(tmp_path / "out").__enter__()
        except ConfigError as error:
            os._exit(0 if "cannot be written to (Permission denied)" in str(error) else 2)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.parametrize(
    ("number", "kind", "exit_code"),
    [
        (errno.ENOSPC, LavicError, 1),
        (errno.EDQUOT, LavicError, 1),
        (errno.EROFS, ConfigError, 2),
        (errno.EACCES, ConfigError, 2),
    ],
)
def test_what_may_pass_is_told_from_what_must_be_changed(number: int, kind: type, exit_code: int) -> None:
    error = not_writable(Path("out"), OSError(number, os.strerror(number)))
    assert type(error) is kind and error.exit_code == exit_code and os.strerror(number) in str(error)


def test_what_a_killed_command_left_is_removed_but_where_others_write(tmp_path: Path) -> None:
    left = tmp_path / ".results.json.0123abcd.part"
    left.write_text("{")
    (tmp_path / "made").write_text("x")
    with lock_output_folder(tmp_path, exclusive=False):
        assert left.exists()
    with lock_output_folder(tmp_path):
        assert not left.exists()
    assert (tmp_path / "made").read_text() == "x"
