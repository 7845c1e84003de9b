"""What `pip install` would put on a machine: everything, and under `lavic` alone."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SHIPPED = {"lavic": "lavic", **{name: f"lavic/{name}" for name in ("shards", "launch", "configs", "slurm")}}
NOT_SHIPPED = {"__pycache__", ".mypy_cache"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel built from a copy of the tree, since building leaves files behind."""
    copy = tmp_path_factory.mktemp("tree")
    for name in SHIPPED:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns(*NOT_SHIPPED))
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(copy / "out"),
        ".",
    ]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return next((copy / "out").glob("*.whl"))


def test_every_file_of_the_five_folders_is_in_the_wheel(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    missing = []
    for folder, package in SHIPPED.items():
        for path in (ROOT / folder).rglob("*"):
            inner = path.relative_to(ROOT / folder)
            if path.is_file() and not NOT_SHIPPED & set(inner.parts) and f"{package}/{inner.as_posix()}" not in inside:
                missing.append(str(path.relative_to(ROOT)))
    assert not missing


def test_nothing_but_lavic_lands_in_site_packages(wheel):
    tops = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert tops == {"lavic", wheel.name[: wheel.name.index("-py3")] + ".dist-info"}


def test_an_installed_wheel_runs(wheel, tmp_path):
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path), str(wheel)]
    subprocess.run(command, check=True, timeout=120)
    code = "import lavic.launch.doctor; from lavic.cli import main; print(lavic.__file__); main(['--help'])"
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys, site; sys.path[:0] = [{str(tmp_path)!r}, *{sys.path!r}]\n{code}"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path))
