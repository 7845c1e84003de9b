"""`lavic embed`: the tokens, two ranks, a kill, a stop, an adapter, invalid input."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lavic.cli import main
from lavic.data.shard_dataset import ShardDataset
from lavic.model.bundle import save_bundle
from lavic.model.config import LoraSettings, ModelSettings
from lavic.model.item_store import ItemStore
from lavic.model.loading import Backbone
from lavic.model.lora import add_adapter, save_adapter, trainable
from lavic.model.visual_tokens import cls_tokens
from tests.fork_server import ForkServer


def test_tokens_are_those_of_each_items_first_photo(shards: Path, tmp_path: Path) -> None:
    argv = ["embed", "--model.name", "mini", "--shards", str(shards), "--batch-size", "7", "--precision", "float32"]
    assert main([*argv, "--out", str(tmp_path / "store")]) == 0
    store, data = ItemStore.open(tmp_path / "store"), ShardDataset(shards)
    backbone = Backbone.load(ModelSettings(name="mini"))
    assert len(store) == 30
    first_photos = [sample for sample in (data[i] for i in range(len(data))) if sample.meta["n"] == 0]
    views = torch.from_numpy(np.stack([backbone.geometry.cut(sample.image) for sample in first_photos]))
    with torch.no_grad():
        expected = cls_tokens(backbone.model, views)
    torch.testing.assert_close(store.lookup([s.item_id for s in first_photos]), expected, rtol=1e-5, atol=1e-5)
    assert store.title("B0MN000007") == first_photos[7].title
    # a second run does nothing; another precision is refused
    made = (tmp_path / "store" / "manifest.json").stat().st_mtime_ns
    assert main([*argv, "--out", str(tmp_path / "store")]) == 0
    assert (tmp_path / "store" / "manifest.json").stat().st_mtime_ns == made
    assert main([*argv, "--precision", "float16", "--out", str(tmp_path / "store")]) == 2


def test_a_complete_store_is_checked_without_loading_the_model(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["embed", "--model.name", "mini", "--shards", str(shards), "--out", str(tmp_path / "store")]
    assert main(argv) == 0

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(Backbone, "load", fail)
    assert main(argv) == 0, "nothing to do"
    assert main([*argv, "--precision", "float32"]) == 2, "another plan is refused"


@pytest.mark.dist
def test_two_ranks_write_the_same_store_as_one_process(shards: Path, tmp_path: Path, fork_server: ForkServer) -> None:
    argv = ["embed", "--model.name", "mini", "--shards", str(shards)]
    assert main([*argv, "--out", str(tmp_path / "one")]) == 0
    done = fork_server.lavic(*argv, "--out", tmp_path / "two", ranks=2)
    assert done.returncode == 0, done.stderr
    single, double = ItemStore.open(tmp_path / "one"), ItemStore.open(tmp_path / "two")
    assert single.ids == double.ids
    assert single.manifest.parts == double.manifest.parts


@pytest.mark.dist
def test_a_killed_embed_resumes(shards: Path, tmp_path: Path, fork_server: ForkServer) -> None:
    argv = ["embed", "--model.name", "mini", "--shards", str(shards), "--batch-size", "1"]
    process = fork_server.popen(["-m", "lavic", *argv, "--out", tmp_path / "store"])
    while not list((tmp_path / "store").glob("part-*.json")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert main([*argv, "--out", str(tmp_path / "store")]) == 0
    assert main([*argv, "--out", str(tmp_path / "fresh")]) == 0
    assert ItemStore.open(tmp_path / "store").manifest.parts == ItemStore.open(tmp_path / "fresh").manifest.parts


def test_embed_stops_on_sigusr1_and_resumes(shards: Path, tmp_path: Path, sigusr1_after: Callable[[str], None]) -> None:
    argv = ["embed", "--model.name", "mini", "--shards", str(shards), "--batch-size", "4"]
    assert main([*argv, "--out", str(tmp_path / "uninterrupted")]) == 0
    sigusr1_after("lavic.model.visual_tokens.cls_tokens")
    stopped = [*argv, "--out", str(tmp_path / "store")]
    assert main(stopped) == 75
    assert not list((tmp_path / "store").glob("part-*")), "no part is written before its shard is complete"
    sigusr1_after("lavic.model.item_store.write_part")
    assert main(stopped) == 75
    assert len(list((tmp_path / "store").glob("part-*.json"))) == 1
    assert not (tmp_path / "store" / "manifest.json").exists()
    assert main(stopped) == 0
    stores = [ItemStore.open(tmp_path / name) for name in ("uninterrupted", "store")]
    assert stores[0].manifest.parts == stores[1].manifest.parts


def test_an_adapter_changes_the_tokens_and_is_copied_into_the_store(shards: Path, tmp_path: Path) -> None:
    backbone = Backbone.load(ModelSettings(name="mini"))
    model = add_adapter(backbone, "vision", LoraSettings(r=2, alpha=4, dropout=0.0))
    with torch.no_grad():
        for parameter in trainable(model):
            parameter.normal_(std=0.1)
    save_bundle(tmp_path / "run" / "bundle", backbone, vision=model)
    argv = ["embed", "--model.name", "mini", "--shards", str(shards)]
    assert main([*argv, "--out", str(tmp_path / "plain")]) == 0
    assert main([*argv, "--adapter", str(tmp_path / "run"), "--out", str(tmp_path / "adapted")]) == 0
    plain, adapted = ItemStore.open(tmp_path / "plain"), ItemStore.open(tmp_path / "adapted")
    assert (plain.lookup(plain.ids) - adapted.lookup(plain.ids)).abs().max() > 0.05
    assert plain.vision_adapter is None
    assert adapted.vision_adapter is not None and (adapted.vision_adapter / "adapter_model.safetensors").is_file()

    # the float16 store holds what the vision tower gives in the training loop, where the adapter is not merged
    data = ShardDataset(shards)
    first_photos = [sample for sample in (data[i] for i in range(len(data))) if sample.meta["n"] == 0]
    views = torch.from_numpy(np.stack([backbone.geometry.cut(sample.image) for sample in first_photos]))
    with torch.no_grad():
        from_training = cls_tokens(model.eval(), views)
    stored = adapted.lookup([sample.item_id for sample in first_photos])
    assert stored.dtype == torch.float16
    # half an ulp of float16, and rounding by another order of additions
    torch.testing.assert_close(stored.float(), from_training, rtol=2**-11 + 1e-5, atol=1e-5)


def test_invalid_input_is_one_line_and_exit_code_2(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone = Backbone.load(ModelSettings(name="mini"))
    model = add_adapter(backbone, "language", LoraSettings(r=2, alpha=4, dropout=0.0))
    save_adapter(model, tmp_path / "language", backbone, "language")
    out = ["--out", str(tmp_path / "store")]
    for argv, message in (
        (["embed", "--shards", str(tmp_path / "none"), *out], "no such folder of shards"),
        (["embed", "--shards", str(shards), "--adapter", str(tmp_path), *out], "no vision adapter here"),
        (
            [
                "embed",
                "--model.name",
                "mini",
                "--shards",
                str(shards),
                "--adapter",
                str(tmp_path / "language"),
                *out,
            ],
            "a language adapter, but a vision adapter is needed",
        ),
        (["describe", "--model.name", "mini", "--shards", str(tmp_path / "none")], "no such folder of shards"),
        (["describe", "--shards", str(shards), "--wrong", "1"], "--wrong"),
    ):
        assert main(argv) == 2
        errors = capsys.readouterr().err.strip().splitlines()
        assert message in errors[-1]
