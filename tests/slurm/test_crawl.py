"""`sbatch slurm/crawl.sbatch`: a Ray over two nodes, with a token, gone afterwards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from lavic.cli import main
from lavic.data.shard_dataset import ShardDataset
from tests.shards.conftest import FaultServer
from tests.slurm.slurm_jobs import Slurm, wait_for
from tests.slurm.test_train import SCRIPTS, settings

pytestmark = [pytest.mark.slurm, pytest.mark.ray]
QUICK = ["--fetch.allow-private", "--fetch.retries", "1", "--photos-per-shard", "10"]


@pytest.fixture
def server() -> Iterator[FaultServer]:
    running = FaultServer()
    yield running
    running.close()


def ray_processes(folder: Path) -> list[str]:
    """Processes of the Ray whose files are in a folder."""
    processes = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                words = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if str(folder) in words:
                processes.append(words)
    return processes


def test_a_crawl_over_two_nodes_stopped_and_requeued(slurm: Slurm, server: FaultServer, tmp_path: Path) -> None:
    rows = [
        {"parent_asin": f"B{n:05d}", "title": f"Item {n}", "images": [{"large": f"{server.url}/n/{n}.jpg"}]}
        for n in range(120)
    ]
    ray = slurm.folder / "ray"
    ray.mkdir()
    items, out = tmp_path / "meta.jsonl", tmp_path / "out"
    items.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["crawl", "--items", str(items), "--out", str(out), *QUICK]
    server.delay = 0.5
    job = slurm.submit(
        "--cpus-per-task=1",
        SCRIPTS / "crawl.sbatch",
        *[*words, "--fetch.concurrency", "1"],
        cwd=tmp_path,
        **settings(RAY_TMPDIR=str(ray), LAVIC_PREFLIGHT="120"),
    )
    wait_for(lambda: list(out.glob("*.seal.json")) or job.ended, 240, "a shard")
    assert ray_processes(ray), job.log
    slurm.run("scancel", "--batch", "--signal=USR1", str(job.number))
    job.wait_until("requeued: restart 1", 120)
    assert not ray_processes(ray) and not list(ray.iterdir())
    assert not (out / "manifest.json").exists()
    server.delay = 0.0
    job.start_now()
    assert job.wait() == 0, job.log
    assert "2 Ray nodes" in job.log
    assert "preflight: 2 nodes passed" in job.log
    assert not ray_processes(ray)
    assert ShardDataset(out).manifest.outcomes == {"ok": 120}
    assert main(["verify", str(out)]) == 0
