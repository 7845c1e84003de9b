"""Where sets stand and what they are made from: S3 on loopback, full disks, real photos, several sets at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from lavic.cli import main
from lavic.data.manifest import Manifest
from lavic.data.shard_dataset import ShardDataset
from lavic.distributed.ray_session import RaySettings, ray_session
from lavic.shards.pack.outcomes import read_ledger
from lavic.storage.paths import as_path, file_sizes
from lavic.tracking.journal import read_journal
from tests.conftest import go_without
from tests.external import EXTERNAL

QUICK = ["--fetch.allow-private", "--fetch.deadline", "20", "--fetch.retries", "1", "--fetch.backoff", "0.01"]
QUICK += ["--fetch.host-rate", "0"]
FASHION, FASHION_CATALOG = EXTERNAL / "data/fashion", EXTERNAL / "tools/fashion_catalog.py"


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A bucket of an S3 server, which this process and the workers that it starts find by their environment."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("LAVIC_CACHE", str(tmp_path_factory.mktemp("cache")))
        import boto3

        boto3.client("s3").create_bucket(Bucket="photos")
        yield "s3://photos"
    server.stop()


@pytest.fixture(scope="module")
def ray_here(bucket: str) -> Iterator[None]:
    with ray_session(RaySettings(cpus=2)):
        yield


def tars(folder: Path) -> dict[str, bytes]:
    return {
        name: (folder / name).read_bytes() for name in sorted(file_sizes(folder)) if name.endswith((".tar", ".idx"))
    }


def crawl(items: str | Path, out: str | Path, *words: str, per_shard: int = 15) -> int:
    return main(
        ["crawl", "--items", str(items), "--out", str(out), "--photos-per-shard", str(per_shard), *QUICK, *words]
    )


@pytest.mark.ray
@pytest.mark.usefixtures("ray_here")
class TestStorage:
    """In one Ray, which this process keeps."""

    def test_a_set_in_an_object_store(
        self,
        tmp_path: Path,
        bucket: str,
        catalogue: Callable[..., Path],
        server: Any,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        items = catalogue(*(f"n/{n}.jpg" for n in range(40)), "status/404")
        remote = as_path(f"{bucket}/catalogue/meta.jsonl")
        remote.write_bytes(items.read_bytes())
        out = as_path(f"{bucket}/sets/cups")
        server.broken = True
        assert crawl(f"{bucket}/catalogue/*.jsonl", f"{bucket}/sets/cups") == 0
        assert Manifest.load(out).outcomes["http_error"] == 14
        server.broken = False
        assert crawl(f"{bucket}/catalogue/*.jsonl", out, "--retry", "http_error") == 0
        before = tars(out)
        server.requests.clear()
        assert crawl(f"{bucket}/catalogue/*.jsonl", out) == 0 and not server.requests
        assert tars(out) == before

        assert crawl(items, tmp_path / "here") == 0
        assert tars(tmp_path / "here") == before
        assert crawl(items, f"{bucket}/sets/local", "--executor", "local") == 0
        assert tars(as_path(f"{bucket}/sets/local")) == before
        assert main(["verify", str(out)]) == 0
        data, local = ShardDataset(str(out)), ShardDataset(tmp_path / "here")
        assert data.keys == local.keys and data[17] == local[17] and len(data) == 40
        assert not [name for name in file_sizes(out) if name.endswith(".part")]

        # A worker that died before its seal, and a tar that was damaged since.
        (out / "photos-train-000001.seal.json").unlink()
        (out / "photos-train-000002.tar").write_bytes(before["photos-train-000002.tar"][:5000])
        with pytest.raises(Exception, match=r"photos-train-000002\.tar has 5000 bytes"):
            ShardDataset(str(out))
        assert main(["verify", str(out)]) == 1
        assert crawl(f"{bucket}/catalogue/*.jsonl", out) == 0 and tars(out) == before

        remote.write_bytes(
            items.read_bytes() + items.read_bytes().splitlines()[0].replace(b"B00000", b"B99999") + b"\n"
        )
        capsys.readouterr()
        assert crawl(f"{bucket}/catalogue/*.jsonl", out) == 2
        assert "has changed" in capsys.readouterr().err
        assert crawl(f"{bucket}/catalogue/*.jsonl", out, "--extend") == 0
        assert tars(out).items() >= before.items() and len(ShardDataset(str(out))) == 41

    def test_a_store_that_is_not_there(
        self, catalogue: Callable[..., Path], capsys: pytest.CaptureFixture[str], bucket: str
    ) -> None:
        assert crawl(catalogue("n/1.jpg"), "s3://no-such-bucket/x") == 1
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith("lavic crawl: error: s3://no-such-bucket/x: cannot be written to")
        assert main(["verify", f"{bucket}/nothing"]) == 2

    @pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
    def test_a_full_disk_and_then_room(
        self, tmp_path: Path, catalogue: Callable[..., Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        small, items = tmp_path / "small", catalogue(*(f"n/{n}.jpg" for n in range(120)))
        small.mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "lavic", small], capture_output=True)
        if mounted.returncode:
            go_without(f"no small disk: {mounted.stderr.decode().strip()}")
        try:
            assert crawl(items, small / "out", per_shard=30) == 1
            lines = capsys.readouterr().err.strip().splitlines()
            assert "No space left on device" in lines[-1] and lines[-1].startswith("lavic crawl: error: ")
            assert "Traceback" not in "".join(lines) and not list(small.rglob("*.part"))
            assert not (small / "out/manifest.json").exists()
            subprocess.run(["mount", "-o", "remount,size=20m", small], check=True)
            assert crawl(items, small / "out", per_shard=30) == 0
            assert crawl(items, tmp_path / "roomy", per_shard=30) == 0
            assert tars(small / "out") == tars(tmp_path / "roomy")
        finally:
            subprocess.run(["umount", small], check=True)

    def test_pictures_that_are_shared_are_fetched_once(
        self, tmp_path: Path, catalogue: Callable[..., Path], server: Any
    ) -> None:
        paths = [f"n/{n % 17}.jpg" for n in range(51)]
        paths[3::17] = ["status/404"] * 3
        assert crawl(catalogue(*paths), tmp_path / "out") == 0
        assert set(server.requests.values()) == {1} and len(server.requests) == 17
        data = ShardDataset(tmp_path / "out")
        assert len(data) == 48
        rows = [row for path in sorted((tmp_path / "out").glob("*.tar")) for row in read_ledger(path)]
        assert sum(bool(row.same_as) for row in rows) == 34 and sum(row.kind == "gone" for row in rows) == 3
        first = {row.key: row for row in rows if not row.same_as}
        assert all(first[row.same_as].sha256 == row.sha256 for row in rows if row.same_as)

        # Trying the failures again touches their shard alone.
        times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("photos-*")}
        server.requests.clear()
        assert crawl(tmp_path / "meta.jsonl", tmp_path / "out", "--retry", "gone") == 0
        changed = {name[:19] for name in times if (tmp_path / "out" / name).stat().st_mtime_ns != times[name]}
        assert changed == {"photos-train-000000"} and server.requests == {"/status/404": 1}
        assert main(["verify", str(tmp_path / "out")]) == 0

    def test_splits_are_sets_of_their_own(self, tmp_path: Path, catalogue: Callable[..., Path]) -> None:
        items = catalogue(*(f"n/{n}.jpg" for n in range(60)))
        splits = ["--splits", "train=0.7", "valid=0.3"]
        assert crawl(items, tmp_path / "out", *splits) == 0
        parts = [{sample.item_id for sample in _all(tmp_path / "out" / name)} for name in ("train", "valid")]
        assert parts[0].isdisjoint(parts[1]) and len(parts[0] | parts[1]) == 60 and all(parts)
        assert (tmp_path / "out/valid/photos-valid-000000.tar").is_file()
        assert '"train/*.tar"' in (card := (tmp_path / "out/README.md").read_text()) and '"valid/*.tar"' in card
        assert crawl(items, tmp_path / "one", *splits, "--split", "valid") == 0
        assert tars(tmp_path / "one/valid") == tars(tmp_path / "out/valid") and not (tmp_path / "one/train").exists()

    def test_an_extended_set_keeps_its_shards(
        self, tmp_path: Path, catalogue: Callable[..., Path], server: Any
    ) -> None:
        out = tmp_path / "out"
        assert crawl(catalogue(*(f"n/{n}.jpg" for n in range(20))), out) == 0
        times = {path.name: path.stat().st_mtime_ns for path in out.glob("photos-*")}
        server.requests.clear()
        more = catalogue(*(f"n/{n}.jpg" for n in range(33)))
        assert crawl(more, out, "--extend") == 0 and len(server.requests) == 13
        assert {name: (out / name).stat().st_mtime_ns for name in times} == times
        assert [shard.samples for shard in Manifest.load(out).shards] == [15, 5, 13]
        assert main(["verify", str(out)]) == 0
        card = read_journal(out / "metrics.jsonl")[-1]
        assert card["outcome.ok"] == 33 and card["photos_per_second"] > 0

    @pytest.mark.external
    def test_real_photos_from_both_forms_of_their_catalogue(self, tmp_path: Path) -> None:
        class Quiet(SimpleHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None:
                pass

        served = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(FASHION / "images")))
        Thread(target=served.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{served.server_address[1]}"
        words = ["--images", FASHION / "images", "--styles", FASHION / "styles.csv", "--out", tmp_path / "catalogue"]
        subprocess.run(
            [sys.executable, FASHION_CATALOG, *map(str, words), "--base-url", address, "--conversations", "10"],
            check=True,
            capture_output=True,
        )
        expected = len(list((FASHION / "images").glob("*.jpg")))
        for name in ("item2meta_train.json", "meta_Fashion.jsonl"):
            out = tmp_path / name.partition(".")[0]
            assert crawl(tmp_path / "catalogue" / name, out, "--text", "none", per_shard=1000) == 0
            assert Manifest.load(out).outcomes == {"ok": expected}
        served.shutdown()
        served.server_close()
        first, other = tmp_path / "item2meta_train", tmp_path / "meta_Fashion"
        assert (
            tars(first) == tars(other)
            and (first / "manifest.json").read_bytes() == (other / "manifest.json").read_bytes()
        )
        sample = ShardDataset(first)[0]
        assert sample.jpg == (FASHION / "images" / sample.meta["url"].rpartition("/")[2]).read_bytes()
        assert json.loads(sample.meta["details"])["details"]["Department"]


def _all(folder: Path) -> list[Any]:
    data = ShardDataset(folder)
    return [data[index] for index in range(len(data))]
