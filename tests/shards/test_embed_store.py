"""The item store of `lavic embed`: refused with other settings, extended when its sets grow."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lavic.cli import main
from lavic.data.shard_dataset import ShardDataset
from lavic.model import item_store
from lavic.model.config import ModelSettings
from lavic.model.hub import resolve
from lavic.model.item_store import ItemStore
from lavic.model.loading import read_geometry
from tests.crawled_sets import write_set
from tests.model.conftest import make_base
from tests.shards.drawn_sets import photo


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with the choice of grids that LLaVA-v1.6 has: narrow photos get fewer views."""
    folder = make_base(tmp_path_factory.mktemp("base"))
    processor = folder / "preprocessor_config.json"
    grids = {"image_grid_pinpoints": [[24, 48], [48, 24], [48, 48]]}
    processor.write_text(json.dumps({**json.loads(processor.read_text()), **grids}))
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--model.views", "lavic"], "--model.views"),
        (["--model.dtype", "bfloat16"], "--model.dtype"),
        (["--model.prompt", "lavic"], "--model.prompt"),
        (["--precision", "bfloat16"], "--precision"),
    ],
)
@pytest.mark.parametrize("complete", [False, True])
def test_a_store_made_with_other_settings_is_refused(
    base: Path,
    small_set: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: list[str],
    message: str,
    complete: bool,
) -> None:
    argv = ["embed", "--model.name", str(base), "--shards", str(small_set), "--out", str(tmp_path / "store")]
    assert main(argv) == 0
    if not complete:
        (tmp_path / "store" / "manifest.json").unlink()
    assert main([*argv, *change]) == 2
    assert f"item store made with another {message}: use another --out" in capsys.readouterr().err
    assert main(argv) == 0


def test_a_narrow_photo_keeps_the_tokens_of_its_views(base: Path, small_set: Path, tmp_path: Path) -> None:
    argv = ["embed", "--model.name", str(base), "--shards", str(small_set), "--model.views", "lavic"]
    assert main([*argv, "--out", str(tmp_path / "store")]) == 0
    store, geometry = ItemStore.open(tmp_path / "store"), read_geometry(resolve(ModelSettings(name=str(base))), "lavic")
    rows, columns = geometry.grid((40, 120))
    assert store.count("B0MN000000") == 1 + rows * columns
    store.check_geometry(geometry)
    assert store.manifest.dtype == "float32"


def test_a_store_grows_with_its_sets_and_stays_readable(
    base: Path, small_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """New shards, a shard packed again, an item that got its first photo; the other items stay as they are."""
    out = tmp_path / "store"
    write_set(tmp_path / "grown", [photo(5), photo(6)], photos_per_shard=1)
    argv = ["embed", "--model.name", str(base), "--shards", str(small_set), str(tmp_path / "grown"), "--out", str(out)]
    assert main(argv) == 0
    before = ItemStore.open(out)
    assert len(before) == 6
    files = {file.name for file in out.iterdir()}

    # item 2 now has its first photo; the other set has one more shard
    write_set(small_set, [photo(0, size=(40, 120)), photo(1), photo(2), photo(2, number=1), photo(3), photo(4)])
    write_set(tmp_path / "grown", [photo(5), photo(6), photo(7)], photos_per_shard=1)
    real, parts = item_store.write_part, []

    def write_part(folder: Path, name: str, items: Any, tokens: torch.Tensor) -> Any:
        assert len(ItemStore.open(out)) == 6, "the old store is complete until the new manifest is written"
        parts.append([item["key"] for item in items])
        return real(folder, name, items, tokens)

    monkeypatch.setattr(item_store, "write_part", write_part)
    assert main(argv) == 0
    assert parts == [[f"B0MN00000{n}_0" for n in range(5)], ["B0MN000007_0"]]
    assert "8 items; 2 of 4 parts made" in capsys.readouterr().out
    after = ItemStore.open(out)
    assert len(after) == 8 and after.key("B0MN000002") == "B0MN000002_0"
    assert len({file.name for file in out.iterdir()}) == len(files) + 3, "files of replaced parts are removed"
    assert torch.equal(after.lookup(["B0MN000005"]), before.lookup(["B0MN000005"]))
    assert before.key("B0MN000002") == "B0MN000002_1" and before.lookup(["B0MN000002"]).any(), (
        "an open store keeps its old parts"
    )
    monkeypatch.setattr(item_store, "write_part", real)
    fresh = [*argv[:-1], str(tmp_path / "fresh")]
    assert main(fresh) == 0
    assert ItemStore.open(tmp_path / "fresh").manifest.parts == after.manifest.parts

    write_set(tmp_path / "other", [photo(n) for n in range(10, 16)])
    assert main(["embed", "--model.name", str(base), "--shards", str(tmp_path / "other"), "--out", str(out)]) == 2
    assert "an item store of another catalogue: 8 of its 8 items are not in the sets" in capsys.readouterr().err


def test_growth_stops_on_sigusr1_and_resumes(
    base: Path,
    small_set: Path,
    tmp_path: Path,
    sigusr1_after: Callable[[str], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "store"
    write_set(tmp_path / "grown", [photo(5)], photos_per_shard=1)
    argv = ["embed", "--model.name", str(base), "--shards", str(small_set), str(tmp_path / "grown"), "--out", str(out)]
    assert main(argv) == 0
    write_set(tmp_path / "grown", [photo(5), photo(6), photo(7)], photos_per_shard=1)
    sigusr1_after("lavic.shards.store_plan.StorePlan.read_part")
    assert main(argv) == 75, "a stop is looked for while existing parts are skipped"
    assert len(ItemStore.open(out)) == 5
    sigusr1_after("lavic.model.item_store.write_part")
    assert main(argv) == 75
    assert len(ItemStore.open(out)) == 5
    assert main(argv) == 0
    assert len(ItemStore.open(out)) == 7


def test_a_store_of_an_older_version_is_complete_and_can_grow(base: Path, small_set: Path, tmp_path: Path) -> None:
    """Its parts are numbered, and the plan records their shards."""
    out = tmp_path / "store"
    argv = ["embed", "--model.name", str(base), "--shards", str(small_set), "--out", str(out)]
    assert main(argv) == 0
    manifest, plan = (json.loads((out / name).read_text()) for name in ("manifest.json", "plan.json"))
    (name,) = (part["name"] for part in manifest["parts"])
    keys = [json.loads(line)["key"] for line in (out / f"items-{name}.jsonl").read_text().splitlines()]
    plan["shards"] = [shard.sha256 for shard in ShardDataset(small_set).manifest.shards]
    plan["items"] = hashlib.sha256("\n".join(keys).encode()).hexdigest()
    del plan["dtype"], plan["prompt"], manifest["dtype"]
    manifest["parts"][0]["name"] = "00000"
    for file in [*out.glob(f"*-{name}.*")]:
        file.rename(file.with_name(file.name.replace(name, "00000")))
    (out / "manifest.json").write_text(json.dumps(manifest))
    (out / "plan.json").write_text(json.dumps(plan))
    stamp = (out / "manifest.json").stat().st_mtime_ns
    assert main(argv) == 0
    assert (out / "manifest.json").stat().st_mtime_ns == stamp, "nothing to do"
    assert len(ItemStore.open(out)) == 4
    write_set(small_set, [photo(n) for n in range(6)])
    assert main(argv) == 0
    assert len(ItemStore.open(out)) == 6
    assert not [*out.glob("*-00000.*")]
