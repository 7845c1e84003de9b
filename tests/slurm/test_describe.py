"""`sbatch slurm/describe.sbatch`: a model server beside the command, gone afterwards. The server is a stand-in."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.shards.teacher_sets import make_photos, sidecars
from tests.slurm.slurm_jobs import Slurm
from tests.slurm.test_train import SCRIPTS, settings

pytestmark = pytest.mark.slurm
ROOT = Path(__file__).parents[2]


def test_photos_are_described_by_a_server_of_the_job(slurm: Slurm, tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", 9, 5)
    served = settings(
        SERVE_MODEL="some/model",
        SERVE_COMMAND=f"env PYTHONPATH={ROOT} {sys.executable} -m tests.slurm.model_server",
        SERVE_FLAGS="",
        SERVE_STARTUP="100",
    )
    words = ["describe", "--shards", str(photos.folder)]
    # The nodes of the tests are one machine: one of them, one port.
    job = slurm.submit(
        "--nodes=1",
        "--cpus-per-task=1",
        "--gpus-per-node=0",
        SCRIPTS / "describe.sbatch",
        *words,
        cwd=tmp_path,
        **served,
    )
    assert job.wait() == 0, job.log
    rows = [row for shard in sidecars(photos) for row in shard]
    assert len(rows) == 9 and {row["text"] for row in rows} == {"A mug with a handle."}
    assert {row["model"] for row in rows} == {"some/model"}
    assert "stopping the servers" in job.log and "9 answers" in job.log


def test_without_a_model_it_says_so(slurm: Slurm, tmp_path: Path) -> None:
    words = ["--nodes=1", "--cpus-per-task=1", "--gpus-per-node=0", SCRIPTS / "describe.sbatch", "describe"]
    job = slurm.submit(*words, cwd=tmp_path, **settings())
    assert job.wait() == 2 and "SERVE_MODEL is not set" in job.log
