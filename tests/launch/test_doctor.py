"""What the doctor sees, and the one line that a missing compiler gives."""

from __future__ import annotations

import os
import sys
import time

import pytest

from lavic.errors import LaunchError
from lavic.launch import doctor


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setenv("LAVIC_DEVICE", "cpu")
    monkeypatch.delenv("CXX", raising=False)


def test_this_machine_is_examined(capsys):
    code = doctor.main([])
    text = capsys.readouterr().out
    for name in ("python", "torch", "pydantic", "compiler", "memory", "disk"):
        assert f" {name} " in text
    assert code == (1 if "\nmissing " in f"\n{text}" else 0)


def test_no_compiler_is_one_line_that_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match=r"no C\+\+ compiler .*apt-get install g\+\+") as caught:
        doctor.require_compiler()
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_the_compiler_of_the_environment_counts(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(LaunchError, match="no-such-compiler"):
        doctor.require_compiler()


def test_ninja_is_found_beside_this_python(monkeypatch, tmp_path):
    bin_dir = tmp_path / "venv" / "bin"
    bin_dir.mkdir(parents=True)
    for place, name in ((tmp_path, "c++"), (bin_dir, "ninja")):
        (place / name).write_text("#!/bin/sh\n")
        (place / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(bin_dir / "python"))
    doctor.require_compiler()
    assert os.environ["PATH"].split(os.pathsep)[0] == str(bin_dir)
    (bin_dir / "ninja").unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match="pip install ninja"):
        doctor.require_compiler()


def test_a_lock_that_a_killed_compilation_left_is_removed(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    doctor._drop_stale_lock()
    assert lock.exists(), "somebody may be compiling right now"
    os.utime(lock, (time.time() - 3600,) * 2)
    doctor._drop_stale_lock()
    assert not lock.exists()


def test_packages_are_checked_against_the_bounds_of_setup():
    found = {check.name: check for check in doctor._packages()}
    assert {"pydantic", "ray", "deepspeed", "mlflow", "torch"} <= set(found)
    assert found["pydantic"].state == "ok"
