"""The crawl as users run it: real worker processes, real HTTP on loopback, real kills."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lavic.cli import main
from lavic.data.manifest import Manifest
from lavic.data.shard_dataset import ShardDataset
from lavic.distributed.ray_session import RaySettings, ray_session
from lavic.shards.pack.outcomes import read_ledger
from lavic.storage.file_lock import FileLock

pytestmark = pytest.mark.slow

QUICK = ["--fetch.allow-private", "--fetch.deadline", "5", "--fetch.retries", "1", "--fetch.backoff", "0.01"]
QUICK += ["--fetch.host-rate", "0"]


def tar_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of a set that must be the same however it was made."""
    names = [path.name for path in folder.iterdir() if path.name.endswith((".tar", ".idx"))]
    return {name: (folder / name).read_bytes() for name in [*sorted(names), "manifest.json", "sizes.json", "README.md"]}


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*.part")]


class TestCrawl:
    def test_mlflow_shows_the_crawl(
        self, tmp_path: Path, catalogue: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip("mlflow")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "pw-1234")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "pw-1234")
        paths = [*(f"n/{n}.jpg" for n in range(20)), "status/404", "cut.jpg"]
        store = f"sqlite:///{tmp_path / 'mlflow.db'}"
        command = [
            "crawl",
            "--items",
            str(catalogue(*paths)),
            "--out",
            str(tmp_path / "out"),
            "--photos-per-shard",
            "8",
        ]
        assert main([*command, *QUICK, "--tracking.mlflow", "--tracking.uri", store, "--tracking.experiment", "e"]) == 0
        # what a slow machine has not taken while the crawl waited for it
        assert main(["sync", str(tmp_path / "out"), "--uri", store, "--experiment", "e"]) == 0
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=store)
        experiment = client.get_experiment_by_name("e")
        assert experiment is not None
        (run,) = client.search_runs([experiment.experiment_id])
        assert run.info.status == "FINISHED" and run.data.tags["lavic.command"] == "crawl"
        assert run.info.run_name == f"{tmp_path.name}/out"
        assert run.data.params["photos_per_shard"] == "8" and run.data.params["fetch.deadline"] == "5.0"
        counts = {name: value for name, value in run.data.metrics.items() if name.startswith("outcome.")}
        assert counts == {"outcome.ok": 20, "outcome.gone": 1, "outcome.truncated": 1}
        assert run.data.metrics["photos_per_second"] > 0
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert len(files) > 5 and not [path for path in files if b"pw-1234" in path.read_bytes()]

    def test_a_catalogue_with_faults_then_again_then_mended(
        self, tmp_path: Path, catalogue: Callable[..., Path], server: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        paths = [f"n/{n}.jpg" for n in range(40)]
        paths[5:9] = ["status/404", "cut.jpg", "page.jpg", "clear.png"]
        paths[20] = "rotated.jpg"
        out = tmp_path / "out"
        command = ["crawl", "--items", str(catalogue(*paths)), "--out", str(out), "--photos-per-shard", "15", *QUICK]
        server.broken = True
        assert main(command) == 0
        text = capsys.readouterr().out
        dataset = ShardDataset(out)
        broken = len([n for n in range(40) if n % 3 == 0 and paths[n].startswith("n/")])
        assert dataset.manifest.outcomes == {
            "gone": 1,
            "http_error": broken,
            "not_image": 1,
            "ok": 37 - broken,
            "truncated": 1,
        }
        assert "photos/s" in text and "--retry http_error" in text and "http_error" in text
        rows = [row for number in range(3) for row in read_ledger(out / f"photos-train-{number:06d}.tar")]
        assert [row.item_id for row in rows] == [f"B{n:05d}" for n in range(40)]
        assert [row.key for row in rows if row.kind == "ok"] == dataset.keys
        assert json.loads((out / "sizes.json").read_text()) == {s.name: s.samples for s in dataset.manifest.shards}
        assert not leftovers(out)

        before = tar_bytes(out)
        server.requests.clear()
        assert main(command) == 0
        assert tar_bytes(out) == before and not server.requests

        # Asked for more, the same set is not whole, and says so without fetching anything.
        assert main([*command, "--min-success", "0.99"]) == 1 and not server.requests
        assert f"{len(dataset)} of 39 photos stored" in capsys.readouterr().err
        assert not (out / "manifest.json").exists()
        assert main(command) == 0 and tar_bytes(out) == before

        server.broken = False
        assert main([*command, "--retry", "http_error,timeout"]) == 0
        assert all(path.startswith("/n/") for path in server.requests) and len(server.requests) == broken
        assert main(["verify", str(out)]) == 0
        undisturbed = tmp_path / "undisturbed"
        assert main([*command, "--out", str(undisturbed), "--ray.workers", "1", "--fetch.concurrency", "2"]) == 0
        assert tar_bytes(out) == tar_bytes(undisturbed)

    def test_nothing_stored_says_why(
        self, tmp_path: Path, catalogue: Callable[..., Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        items = str(catalogue("plain.jpg", "n/1.jpg"))
        assert main(["crawl", "--items", items, "--out", str(tmp_path / "out")]) == 1
        captured = capsys.readouterr()
        assert "blocked_address" in captured.out and "--fetch.allow-private" in captured.err
        assert not (tmp_path / "out/manifest.json").exists()

    @pytest.mark.ray
    def test_other_loaders_read_the_shards(
        self, tmp_path: Path, catalogue: Callable[..., Path], photos: dict[str, bytes]
    ) -> None:
        cache = str(tmp_path / "cache")
        paths = [f"n/{n}.jpg" for n in range(17)]
        paths[3] = "clear.png"
        paths[5:10] = ["status/404"] * 5  # the second of four shards has no photo
        out = tmp_path / "out"
        assert (
            main(["crawl", "--items", str(catalogue(*paths)), "--out", str(out), "--photos-per-shard", "5", *QUICK])
            == 0
        )
        expected = [ShardDataset(out)[n] for n in range(12)]
        keys = [sample.key for sample in expected]

        webdataset = pytest.importorskip("webdataset")
        source = str(out / "photos-train-{000000..000003}.tar")
        rows = list(
            webdataset.WebDataset(source, shardshuffle=False).decode("pil").to_tuple("__key__", "jpg", "json", "txt")
        )
        assert [row[0] for row in rows] == keys
        assert all(
            row[1].size == (sample.meta["width"], sample.meta["height"])
            for row, sample in zip(rows, expected, strict=True)
        )
        assert [row[2] for row in rows] == [sample.meta for sample in expected]

        datasets = pytest.importorskip("datasets")
        for loaded in (
            datasets.load_dataset(
                "webdataset", data_files={"train": str(out / "*.tar")}, split="train", cache_dir=cache
            ),
            datasets.load_dataset(str(out), split="train", cache_dir=cache),
        ):
            assert loaded["__key__"][:] == keys and loaded["json"][:] == [sample.meta for sample in expected]
            assert loaded[3]["jpg"].size == (64, 48)

        import ray

        names = [str(path) for path in sorted(out.glob("*.tar"))]
        assert len(names) == 4
        with ray_session(RaySettings(cpus=2)):
            read = sorted(ray.data.read_webdataset(names, decoder=None).take_all(), key=lambda row: row["__key__"])
        assert [row["__key__"] for row in read] == keys and [row["jpg"] for row in read] == [s.jpg for s in expected]


def test_a_split_that_is_not_whole_keeps_no_other_from_being_made(
    tmp_path: Path, catalogue: Callable[..., Path], capsys: pytest.CaptureFixture[str], server: Any
) -> None:
    items, out = catalogue(*(f"n/{n}.jpg" for n in range(1, 12)), "status/500"), tmp_path / "out"
    words = ["--items", str(items), "--out", str(out), "--splits", "a=0.5", "b=0.5", "--executor", "local", *QUICK]
    assert main(["crawl", *words, "--min-success", "1"]) == 1
    (good,) = (path.parent.name for path in out.glob("*/manifest.json"))
    bad = {"a": "b", "b": "a"}[good]
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"lavic crawl: error: {out}/{bad}: ") and "less than --min-success 1: " in error
    card = (out / "README.md").read_text()
    assert f'"{good}/*.tar"' in card and f"{bad}/" not in card
    assert main(["crawl", *words]) == 0 and f'"{bad}/*.tar"' in (out / "README.md").read_text()


class TestRefusals:
    """What ends before Ray is started, each with one line and exit code 2."""

    def refused(self, capsys: pytest.CaptureFixture[str], *words: str) -> str:
        assert main(["crawl", *words]) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith("lavic crawl: error: ")
        return line

    def test_input(self, tmp_path: Path, catalogue: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
        items, out = catalogue("n/1.jpg"), ["--out", str(tmp_path / "out")]
        items.write_text(items.read_text() + "no json\n")
        line = self.refused(capsys, "--items", str(items), *out, "--max-rejected", "0")
        assert "meta.jsonl:2: not JSON" in line and "--max-rejected" in line
        (row,) = map(json.loads, (tmp_path / "out/rejected.jsonl").read_text().splitlines())
        assert row["file"] == str(items) and row["line"] == 2 and row["reason"].startswith("not JSON")
        missing = str(tmp_path / "missing/out")
        assert "no such catalogue file" in self.refused(capsys, "--items", str(tmp_path / "x.json"), "--out", missing)
        assert not (tmp_path / "missing").exists(), "a crawl that was refused leaves no folder behind"
        assert "--items" in self.refused(capsys, *out)
        assert "known: gone" in self.refused(capsys, "--items", str(items), *out, "--retry", "tiemout")
        assert not (tmp_path / "out/plan/plan.json").exists()

    def test_a_folder_in_use(
        self, tmp_path: Path, catalogue: Callable[..., Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        items, out = str(catalogue("n/1.jpg")), tmp_path / "out"
        out.mkdir()
        with FileLock(out / ".lock") as lock:
            assert lock.acquire()
            assert "another lavic command" in self.refused(capsys, "--items", items, "--out", str(out))

    def test_an_output_that_is_no_folder(
        self, tmp_path: Path, catalogue: Callable[..., Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["crawl", "--items", str(catalogue("n/1.jpg")), "--out", str(tmp_path / "meta.jsonl")]) == 2
        assert "cannot be written to (a file is where a folder is needed)" in capsys.readouterr().err


def test_killed_in_the_middle_the_same_command_ends_in_the_same_bytes(
    tmp_path: Path, catalogue: Callable[..., Path], server: Any
) -> None:
    shards, per_shard = 12, 40
    items = catalogue(*(f"n/{n}.jpg" for n in range(shards * per_shard)))

    def command(out: Path) -> list[str]:
        words = ["crawl", "--items", str(items), "--out", str(out), "--photos-per-shard", str(per_shard)]
        return [sys.executable, "-m", "lavic", *words, "--fetch.concurrency", "8", *QUICK]

    def seals() -> int:
        return len(list(out.glob("*.seal.json")))

    out = tmp_path / "out"
    server.delay = 0.1
    for enough in (2, 6):
        running = subprocess.Popen(command(out), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        until = time.monotonic() + 90
        while seals() < enough and running.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        assert running.poll() is None and seals() < shards, running.communicate()[1].decode()
        os.kill(running.pid, signal.SIGKILL)
        running.communicate()
        assert not (out / "manifest.json").exists()
        with pytest.raises(Exception, match="the set is not complete"):
            ShardDataset(out)
    server.delay = 0.0
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("*.seal.json")}
    again = subprocess.run(command(out), capture_output=True, text=True, timeout=120, check=False)
    assert again.returncode == 0, again.stderr
    assert f"{len(kept)} of {shards} shards are complete already" in again.stderr or len(kept) < seals()
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept

    undisturbed = tmp_path / "undisturbed"
    subprocess.run(command(undisturbed), capture_output=True, timeout=120, check=True)
    assert tar_bytes(out) == tar_bytes(undisturbed)
    assert Manifest.load(out).samples == shards * per_shard and not leftovers(out)
    shutil.rmtree(out)
