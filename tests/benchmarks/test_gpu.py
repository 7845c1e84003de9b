"""The GPU benchmark starts where nothing but torch, transformers, peft and deepspeed was installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
ABSENT = ("PIL", "pillow", "ray", "mlflow", "aiohttp", "webdataset", "pyarrow", "datasets", "pandas", "lavic")


def bare(folder: Path) -> Path:
    """What is installed here, less what the four do not bring."""
    folder.mkdir()
    places = {Path(str(one.locate_file(""))) for one in distributions()} | {Path(torch.__file__).parents[1]}
    for place in places:
        for entry in place.iterdir():
            kept = entry.suffix != ".pth" and not entry.name.lower().startswith(tuple(n.lower() for n in ABSENT))
            if kept and not (folder / entry.name).exists():
                (folder / entry.name).symlink_to(entry)
    return folder


@pytest.mark.dist
def test_small_runs_with_four_packages(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(bare(tmp_path / "packages")), "LAVIC_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    absent = subprocess.run([sys.executable, "-S", "-c", "import PIL"], env=env, capture_output=True)
    assert absent.returncode, "this test hides nothing"
    words = [sys.executable, "-S", str(ROOT / "benchmarks/gpu.py"), "--small", "--json", str(tmp_path / "figures.json")]
    run = subprocess.run(words, env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["photos_by"] == "torch"
    for stage in ("stage1", "stage2"):
        assert figures[stage]["ours"]["samples_per_s"] > 0 < figures[stage]["plain"]["samples_per_s"]
        assert figures[stage]["ours"]["loss"] > 0
    assert figures["embed"]["ours"]["items_per_s"] > 0
