"""The `lavic` command: quick, honest about errors, and every name in its table is there."""

from __future__ import annotations

import errno
import importlib.util
import os
import pickle
import subprocess
import sys
import time

import pytest

from lavic import __version__
from lavic.cli import COMMANDS, main
from lavic.distributed.failure import EXTRAS

HEAVY = ("torch", "ray", "mlflow", "deepspeed", "transformers", "numpy", "pydantic")


def lavic(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lavic", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **env})


def test_help_takes_under_half_a_second():
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = lavic("--help")
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0
    assert min(seconds) < 0.5


def test_help_imports_nothing_heavy():
    code = f"import sys; from lavic.cli import main; main(['--help']); print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_module(name):
    assert importlib.util.find_spec(COMMANDS[name][0]) is not None


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_manual(name):
    done = lavic(name, "--help")
    assert done.returncode == 0, done.stderr
    assert "usage: lavic " in done.stdout
    assert "Traceback" not in done.stderr


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in COMMANDS)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lavic {__version__}\n"


def test_no_command_is_a_usage_error(capsys):
    assert main([]) == 2
    assert "usage: lavic COMMAND" in capsys.readouterr().out


def test_an_unknown_command_names_the_nearest(capsys):
    assert main(["distil"]) == 2
    assert capsys.readouterr().err == "lavic: error: unknown command 'distil'; did you mean 'distill'?\n"


def test_an_error_is_one_line_and_exit_2():
    done = lavic("doctor", "--rya")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == ("lavic doctor: error: unknown flag --rya; did you mean --ray? See 'lavic doctor --help'\n")


def test_another_rank_than_0_waits_and_then_says_who_it_is():
    start = time.monotonic()
    done = lavic("doctor", "--rya", RANK="1", WORLD_SIZE="2")
    assert done.returncode == 2
    assert "[rank 1]" in done.stderr
    assert time.monotonic() - start > 2


def test_a_package_that_is_not_installed_is_named_with_its_extra(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"time": 1, "step": 1, "loss": 1}\n')
    code = "import sys; sys.modules['mlflow'] = None; from lavic.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "sync", str(tmp_path / "run")], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "pip install 'lavic[mlflow]'" in done.stderr


def test_the_extras_that_messages_name_exist():
    from importlib.metadata import metadata

    assert set(EXTRAS.values()) <= set(metadata("lavic").get_all("Provides-Extra") or [])


def test_output_that_cannot_be_written_is_one_line_and_exit_1():
    with open("/dev/full", "w") as full:  # noqa: PTH123
        words = [sys.executable, "-m", "lavic", "tune", "--help"]
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == (
        "lavic tune: error: could not write (No space left on device): make room, then run the same command again\n"
    )


def test_output_into_a_closed_pipe_is_no_traceback():
    command = f"{sys.executable} -m lavic doctor | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (OSError(errno.EACCES, "Permission denied", "/x/y"), 2, "/x/y: Permission denied: change its permissions"),
        (OSError(errno.EROFS, "Read-only file system", "/x"), 2, "/x: Read-only file system: use a path that can be"),
        (OSError(errno.ENOTDIR, "Not a directory", "/x"), 2, "/x: Not a directory: a file is where a folder is needed"),
        (OSError(errno.ENOENT, "No such file", "a", None, "b"), 2, "a -> b: No such file: "),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), 1, "/x could not be written (No space left"),
        (OSError(errno.EIO, "Input/output error", "/x"), 1, "/x: Input/output error"),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset"), 1, "the operating system: Connection reset"),
        (OSError("odd"), 1, "the operating system: odd"),
        (FileNotFoundError(errno.ENOENT, "No such file", "caf\udce9"), 2, "caf\\udce9: No such file"),
    ],
)
def test_every_error_of_the_operating_system_is_one_line(monkeypatch, tmp_path, error, code, expected):
    """In a process of its own, with its streams as the interpreter makes them."""
    program = (
        "import pickle, sys; from lavic import cli; import lavic.launch.doctor as doctor\n"
        "error = pickle.loads(bytes.fromhex(sys.argv[1]))\n"
        "def fail(argv): raise error\n"
        "doctor.main = fail; sys.exit(cli.main(['doctor']))"
    )
    words = [sys.executable, "-c", program, pickle.dumps(error).hex()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == code
    assert done.stderr.startswith(f"lavic doctor: error: {expected}") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_text_is_printed_whatever_the_terminal_s_encoding_is(encoding):
    program = "import sys; from lavic import cli; cli.main(['--version']); print('\u2588 caf\\udce9')"
    env = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith(b"caf\\udce9")
