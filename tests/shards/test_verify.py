"""`lavic verify` finds whatever differs."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from lavic.cli import main
from lavic.data.manifest import Manifest, digest_manifest
from lavic.data.shards import Sample, index_path
from tests.sets import write_set


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    out = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(out, "JPEG")
    samples = [Sample.of(item_id=f"B{n}", n=0, jpg=out.getvalue(), title="x", width=16, height=16) for n in range(5)]
    return write_set(tmp_path / "set", samples, photos_per_shard=3).folder


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
    for what in ("000001.tar: cannot be read", "000000.tar: 600 bytes", "is cut short", "sizes.json: does not agree"):
        assert what in text


def test_a_photo_that_was_replaced(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tar that is whole in itself, with a manifest to match, and a photo that is not the one that was stored."""
    manifest = Manifest.load(folder)
    body = json.loads((folder / "manifest.json").read_text())
    shard = manifest.path(manifest.shards[0])
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    import hashlib

    body["shards"][0]["sha256"] = hashlib.sha256(data).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(body))
    code, text = verify(folder, capsys)
    assert code == 1 and "B0_0: the photo is not the one that was stored" in text


def test_what_is_no_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = verify(tmp_path, capsys)
    assert (
        code == 2 and text.startswith("lavic verify: error: ") and "not a whole set" in text and text.count("\n") == 1
    )
    assert verify(tmp_path / "none", capsys)[0] == 2


def test_a_receipt_is_for_this_manifest_and_goes_when_something_differs(folder: Path) -> None:
    receipt = folder.parent / "set.verified.json"
    assert main(["verify", str(folder), "--receipt", str(receipt)]) == 0
    assert json.loads(receipt.read_text()) == {"manifest": digest_manifest(folder)}
    index_path(folder / "photos-train-000001.tar").write_bytes(b"")
    assert main(["verify", str(folder), "--receipt", str(receipt)]) == 1
    assert not receipt.exists()
