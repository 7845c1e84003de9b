"""A fake cluster that queues jobs and never runs them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture
def cluster(tmp_path, monkeypatch) -> Path:
    """A folder with the inputs of `pipeline-mini`, and fakes of SLURM's programs on PATH."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("sbatch", "squeue", "sacct", "scancel", "scontrol"):
        text = (HERE / "fake_slurm.py").read_text()
        (programs / name).write_text(f"#!{sys.executable} -IS\n{text}")  # without the environment's packages
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mini").mkdir()
    for name in ("item2meta_train.json", *(f"{n}.jsonl" for n in ("item2meta_valid", "train", "valid"))):
        (tmp_path / "mini" / name).touch()
    for name in ("test", "test_combinations"):
        (tmp_path / "mini" / f"{name}.jsonl").touch()
    return tmp_path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that submit a pipeline run a dozen processes of the fake SLURM each."""
    for item in items:
        if "cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)
