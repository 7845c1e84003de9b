"""`sbatch slurm/serve.sbatch`: the recommender on a Ray inside a job, until the job is told to stop."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import pytest

from tests.recommend.conftest import KEY, Assets, assets  # noqa: F401 (a fixture)
from tests.slurm.slurm_jobs import Slurm, wait_for
from tests.slurm.test_train import SCRIPTS, settings

pytestmark = [pytest.mark.slurm, pytest.mark.ray, pytest.mark.slow]


def test_a_job_that_serves(slurm: Slurm, assets: Assets, tmp_path: Path) -> None:  # noqa: F811
    ray = slurm.folder / "ray-serve"
    ray.mkdir()
    words = ["serve", "--bundle", str(assets.bundle), "--store", str(assets.store), "--ray", "--port", "0"]
    job = slurm.submit(
        *("--cpus-per-task=1", "--nodes=1"),
        SCRIPTS / "serve.sbatch",
        *[*words, "--scale.cpus", "0.5"],
        cwd=tmp_path,
        **settings(RAY_TMPDIR=str(ray), LAVIC_PREFLIGHT="0"),
    )
    wait_for(lambda: "serving on" in job.log or job.ended, 300, "the server")
    url = re.search(r"serving on (http://\S+)", job.log)
    assert url, job.log
    row = assets.conversations[0]
    body = {"conversation": row.turns[0].text, "candidates": list(row.candidates[KEY])}
    answer = httpx.post(f"{url[1]}/v1/recommend", json=body, timeout=120, trust_env=False)
    assert answer.status_code == 200 and len(answer.json()["items"]) == 10
    slurm.run("scancel", "--batch", "--signal=USR1", str(job.number))
    assert job.wait() == 0, job.log
    assert not list(ray.iterdir())
