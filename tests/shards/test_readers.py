"""Sets as other tools read them: shards without a photo, the first too, and splits whose names yaml would misread."""

from __future__ import annotations

import importlib
import json
import sys
import types
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lavic.cli import main
from lavic.data.manifest import CARD_MARK, Manifest, ShardEntry, card
from lavic.data.shard_dataset import ShardDataset
from lavic.shards.http.fetch_settings import FetchSettings
from lavic.shards.pack.finalize import finalize_splits
from lavic.shards.plan.crawl_plan import make_plan
from lavic.shards.plan.photo_tasks import PlanSettings
from tests.crawled_sets import crawl_here

FETCH = FetchSettings(allow_private=True, host_rate=0, retries=0)
FOUND = ["B00002", "B00003", "B00006", "B00007"]


@pytest.fixture
def holed(tmp_path: Path, catalogue: Callable[..., Path]) -> Path:
    """Of five shards of two the first, the third and the last have no photo."""
    missing = [f"status/{code}" for code in (404, 410, 401, 403, 451, 500)]
    items = catalogue(*missing[:2], "n/1.jpg", "n/2.jpg", *missing[2:4], "n/3.jpg", "n/4.jpg", *missing[4:])
    settings = PlanSettings(set="t", split="2023", photos_per_shard=2, photos="first", image_size="large")
    manifest = crawl_here(make_plan((str(items),), tmp_path / "holed", settings), FETCH)
    assert len(manifest.empty) == 3 and [sample.item_id for sample in ShardDataset(manifest.folder)] == FOUND
    return manifest.folder


@pytest.mark.parametrize("workers", [0, 2])
def test_webdataset_reads_the_range_of_names(holed: Path, workers: int) -> None:
    webdataset = pytest.importorskip("webdataset")
    pytest.importorskip("torch")
    # As webdataset is told where there may be fewer shards than workers.
    data = webdataset.WebDataset(str(holed / "t-2023-{000000..000004}.tar"), shardshuffle=False, empty_check=False)
    loader = webdataset.WebLoader(data.decode("pil").to_tuple("json", "jpg"), batch_size=None, num_workers=workers)
    rows = list(loader)
    assert sorted(meta["item_id"] for meta, _ in rows) == FOUND
    assert all(image.size == (meta["width"], meta["height"]) for meta, image in rows)


def test_open_clip_reads_the_range_of_names(holed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own loader, on the webdataset that is installed.

    It imports torchvision, for ImageNet alone, which cannot be installed beside torch for CPUs. It was written for
    webdataset 0.2, which marks the end of a tar not at all, 1.0 with an empty sample that is no file.
    """
    pytest.importorskip("open_clip_train", reason="pip install --no-deps open_clip_torch")
    for name in ("torchvision", "torchvision.datasets"):
        if name not in sys.modules:
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    loader: Any = importlib.import_module("open_clip_train.data")
    monkeypatch.delitem(sys.modules, "open_clip_train.data")
    monkeypatch.setattr(loader, "tar_file_expander", partial(loader.tar_file_expander, eof_value=None))
    shards = str(holed / "t-2023-{000000..000004}.tar")
    assert loader.get_dataset_size(shards) == (4, 5)
    args = Namespace(
        train_data=shards, val_data=shards, train_num_samples=None, val_num_samples=None, dataset_resampled=False,
        train_data_upsampling_factors=None, seed=0, batch_size=2, workers=0, world_size=1,
    )  # fmt: skip

    def tokenized(text: str) -> list[str]:
        return [f"<{text}>"]

    for is_train in (True, False):
        info = loader.get_wds_dataset(args, lambda image: image.size, is_train, tokenizer=tokenized)
        batches = list(info.dataloader)
        assert sum(len(images) for images, _ in batches) == 4
        assert all(len(size) == 2 for images, _ in batches for size in images)
        assert all(text.startswith("<") for _, texts in batches for text in texts)


def test_datasets_reads_a_folder_whose_first_shard_is_empty(holed: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset(str(holed), cache_dir=str(tmp_path / "cache"))
    assert list(loaded) == ["2023"] and [meta["item_id"] for meta in loaded["2023"]["json"]] == FOUND
    tars = [str(path) for path in sorted(holed.glob("*.tar"))[1:]]
    streamed = datasets.load_dataset("webdataset", data_files={"train": tars}, split="train", streaming=True)
    assert [row["json"]["item_id"] for row in streamed] == FOUND, "an empty shard after the first is no matter"


def test_datasets_reads_all_splits(tmp_path: Path, catalogue: Callable[..., Path]) -> None:
    datasets = pytest.importorskip("datasets")
    items, shares = str(catalogue(*(f"n/{n}.jpg" for n in range(20)))), {"2023": 0.2, "no": 0.5, "later": 0.3}
    expected = {}
    for split in ("2023", "no"):
        settings = PlanSettings(
            set="t", split=split, splits=shares, photos_per_shard=2, photos="first", image_size="large"
        )
        expected[split] = crawl_here(make_plan((items,), tmp_path / f"out/{split}", settings), FETCH).samples
    finalize_splits(tmp_path / "out", shares)
    loaded = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert {split: len(rows) for split, rows in loaded.items()} == expected and sum(expected.values()) > 5
    assert {meta["key"] for meta in loaded["no"]["json"]} == set(ShardDataset(tmp_path / "out/no").keys)


def test_a_readme_of_the_users_is_left_alone(holed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    holed.rename(out / "2023")
    finalize_splits(out, ["2023"])
    assert CARD_MARK in (out / "README.md").read_text()
    (out / "README.md").write_text("my notes\n")
    finalize_splits(out, ["2023"])
    assert (out / "README.md").read_text() == "my notes\n"


@pytest.mark.parametrize("first", [0, 3, 19, 109, 9999, 999_999, 1_000_000])
def test_the_card_names_every_tar_from_the_first_that_has_a_sample(tmp_path: Path, first: int) -> None:
    """The globs of the card, by the names that they match: all tars from the first with a sample on, each once."""
    numbers = sorted({*range(25), 98, 99, 100, 108, 109, 110, 9998, 9999, 10000, 999_999, 1_000_000, 1_000_001})
    names = [f"t-x-{number:06d}.tar" for number in numbers]
    kept = [name for name, number in zip(names, numbers, strict=True) if number >= first]
    entries = tuple(ShardEntry(name=name, samples=1, bytes=1, sha256="") for name in kept)
    manifest = Manifest(folder=tmp_path, set="t", split="x", shards=entries, empty=tuple(names[: -len(kept)]))
    for name in names:
        (tmp_path / name).touch()
    patterns = [json.loads(line[6:]) for line in card("t", [manifest]).splitlines() if line.startswith("    - ")]
    matched = [sorted(path.name for path in tmp_path.glob(pattern)) for pattern in patterns]
    assert all(matched) and len(patterns) <= 8
    assert matched[0][0] == kept[0] and sorted(name for part in matched for name in part) == sorted(kept)


def test_verify_of_a_folder_of_sets(holed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    holed.rename(out / "train")
    (out / "logs").mkdir()
    assert main(["verify", str(out)]) == 0 and f"{out}/train: 4 photos in 2 shards" in capsys.readouterr().out
    # A second one that a crawl was stopped in.
    (out / "valid/plan").mkdir(parents=True)
    assert main(["verify", str(out)]) == 1
    text = capsys.readouterr().out
    assert f"{out}/valid: no manifest.json, so the set is not complete" in text and f"{out}/train: 4 photos" in text
    assert main(["verify", str(out), "--receipt", str(tmp_path / "receipt")]) == 2
    assert "--receipt is for one set" in capsys.readouterr().err
    (out / "valid/plan").rmdir()
    (out / "train/t-2023-000001.tar").write_bytes(b"")
    assert main(["verify", str(out)]) == 1 and "t-2023-000001.tar: 0 bytes" in capsys.readouterr().out
