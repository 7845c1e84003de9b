"""`lavic verify` finds whatever differs."""

from __future__ import annotations

import hashlib
import io
import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lavic.cli import main
from lavic.data.manifest import Manifest, digest_manifest
from lavic.data.shard_dataset import ShardDataset
from lavic.data.tar_shards import Sample, index_path
from lavic.errors import DataError
from lavic.shards.http.fetch_settings import FetchSettings
from lavic.shards.plan.crawl_plan import make_plan
from lavic.shards.plan.photo_tasks import PlanSettings
from lavic.shards.verify import verify as verify_differences
from tests.crawled_sets import crawl_here, write_set

FLIPS = 60
"""Bits flipped in each file; every byte of them was tried once."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    out = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(out, "JPEG")
    samples = [Sample.of(item_id=f"B{n}", n=0, jpg=out.getvalue(), title="x", width=16, height=16) for n in range(5)]
    return write_set(tmp_path / "set", samples, photos_per_shard=3).folder


def verify_set(folder: Path) -> list[str]:
    return verify_differences(Manifest.load(folder, check=False))


def verify(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = main(["verify", str(folder)])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_a_whole_set(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = verify(folder, capsys)
    assert code == 0 and "5 photos in 2 shards" in text


@pytest.mark.parametrize("at", [3, 700, 1300, 9000, 20479])
def test_one_flipped_byte(folder: Path, capsys: pytest.CaptureFixture[str], at: int) -> None:
    shard = folder / "photos-train-000000.tar"
    data = bytearray(shard.read_bytes())
    data[at % len(data)] ^= 1
    shard.write_bytes(data)
    code, text = verify(folder, capsys)
    assert code == 1 and "photos-train-000000.tar: sha256" in text and "differences" in text


def test_a_flipped_byte_of_the_index(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = index_path(folder / "photos-train-000001.tar")
    data = bytearray(index.read_bytes())
    data[9] ^= 2
    index.write_bytes(data)
    code, text = verify(folder, capsys)
    assert code == 1 and "photos-train-000001" in text


def test_missing_and_cut_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "photos-train-000001.tar").unlink()
    shard = folder / "photos-train-000000.tar"
    shard.write_bytes(shard.read_bytes()[:600])
    (folder / "sizes.json").write_text("{}")
    code, text = verify(folder, capsys)
    assert code == 1
    for what in ("000001.tar: cannot be read", "000000.tar: 600 bytes", "is truncated", "sizes.json: does not agree"):
        assert what in text


def test_a_photo_that_was_replaced(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tar that is whole in itself, with a manifest to match, and a photo that is not the one that was stored."""
    manifest = Manifest.load(folder)
    shard = manifest.path(manifest.shards[0])
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    first = replace(manifest.shards[0], sha256=hashlib.sha256(data).hexdigest())
    replace(manifest, shards=(first, *manifest.shards[1:])).save()
    code, text = verify(folder, capsys)
    assert code == 1 and "B0_0: the photo is not the one that was stored" in text


def test_what_is_no_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = verify(tmp_path, capsys)
    assert (
        code == 2
        and text.startswith("lavic verify: error: ")
        and "the set is not complete" in text
        and text.count("\n") == 1
    )
    assert verify(tmp_path / "none", capsys)[0] == 2


def test_a_receipt_is_for_this_manifest_and_goes_when_something_differs(folder: Path) -> None:
    receipt = folder.parent / "set.verified.json"
    assert main(["verify", str(folder), "--receipt", str(receipt)]) == 0
    assert json.loads(receipt.read_text()) == {"manifest": digest_manifest(folder)}
    index_path(folder / "photos-train-000001.tar").write_bytes(b"")
    assert main(["verify", str(folder), "--receipt", str(receipt)]) == 1
    assert not receipt.exists()


FETCH = FetchSettings(allow_private=True, host_rate=0, retries=0)


@pytest.fixture
def crawled(tmp_path: Path, catalogue: Callable[..., Path]) -> Path:
    """Three shards: one without a photo, one with two, and one whose photos refer to these or are gone."""
    items = catalogue("status/404", "status/410", "n/1.jpg", "n/2.jpg", "n/1.jpg?same", "status/403")
    settings = PlanSettings(
        set="t", split="x", photos_per_shard=2, photos="first", image_size="large", duplicates="referenced"
    )
    plan = make_plan((str(items),), tmp_path / "crawled", settings)
    assert crawl_here(plan, FETCH).references == 1
    return plan.folder


NAMED = [
    "t-x-000000.tar",
    "t-x-000000.ledger.jsonl",
    "t-x-000000.seal.json",
    "t-x-000001.tar",
    "t-x-000001.tar.idx",
    "t-x-000001.ledger.jsonl",
    "t-x-000001.seal.json",
    "t-x-000002.references.jsonl",
    "manifest.json",
    "sizes.json",
]


@pytest.mark.parametrize("name", NAMED)
def test_any_flipped_bit_is_a_difference_that_names_its_file(
    crawled: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = crawled / name
    before = path.read_bytes()
    assert main(["verify", str(crawled)]) == 0
    draw = random.Random(name)
    for at in sorted(draw.sample(range(len(before)), min(len(before), FLIPS))):
        data = bytearray(before)
        data[at] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        capsys.readouterr()
        code = main(["verify", str(crawled)])
        captured = capsys.readouterr()
        assert code in (1, 2) and str(path) in captured.out + captured.err, (at, captured.out + captured.err)
        assert path.suffix == ".json" or "differences" in captured.out
    for cut in (0, len(before) // 2, len(before) - 2):
        path.write_bytes(before[:cut])
        assert main(["verify", str(crawled)]) in (1, 2) and str(path) in "".join(capsys.readouterr())
    path.unlink()
    assert main(["verify", str(crawled)]) in (1, 2) and crawled.name in "".join(capsys.readouterr())


def test_an_index_is_read_no_further_than_its_tar(crawled: Path) -> None:
    """One flipped high bit, and an index that is far larger than it should be: nothing is read into memory for it."""
    index = crawled / "t-x-000001.tar.idx"
    before = index.read_bytes()
    for data in (before[:15] + b"\x40" + before[16:], before[:23] + b"\x40", before[8:], before * 3, before[:8] * 3):
        index.write_bytes(data)
        with pytest.raises(DataError, match=r"t-x-000001\.tar\.idx does not belong"):
            ShardDataset(crawled)[1]
    with index.open("wb") as file:
        file.truncate(1 << 40)
    assert verify_set(crawled) == [f"{index}: is not the index of its tar"]
    with pytest.raises(DataError, match=r"t-x-000001\.tar\.idx does not belong"):
        ShardDataset(crawled)[1]


def test_each_ledger_is_read_once(crawled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: Counter[str] = Counter()
    open_file = Path.open

    def counted(path: Path, *args: Any, **options: Any) -> Any:
        read[path.name] += 1
        return open_file(path, *args, **options)

    monkeypatch.setattr(Path, "open", counted)
    assert verify_set(crawled) == []
    ledgers = {name: count for name, count in read.items() if name.endswith((".ledger.jsonl", ".tar.idx", ".tar"))}
    assert len(ledgers) == 7 and set(ledgers.values()) == {1}, ledgers


@pytest.mark.parametrize("name", ["../x.tar", "t-x-000001.tar\0", "t-x-1.tar", 7])
def test_a_manifest_leads_nowhere_else(crawled: Path, name: object) -> None:
    body = json.loads((crawled / "manifest.json").read_text())
    body["shards"][0]["name"] = name
    del body["checksum"]
    (crawled / "manifest.json").write_text(json.dumps(body))
    with pytest.raises(DataError, match="broken manifest"):
        Manifest.load(crawled)
