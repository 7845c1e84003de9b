"""`lavic describe` and `lavic embed` on a real set with the packaged base: whole, resumable, refused when wrong."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lavic.cli import main
from lavic.data.dataset import ShardDataset
from lavic.data.descriptions import descriptions_path, read_descriptions
from lavic.data.shards import Sample
from lavic.mini.drawing import COLOURS, KINDS, PATTERNS, draw
from lavic.model.adapters import add_adapter, save_adapter, trainable
from lavic.model.backbone import Backbone
from lavic.model.bundle import save_bundle
from lavic.model.compress import cls_tokens
from lavic.model.itemstore import ItemStore
from lavic.model.settings import LoraSettings, ModelSettings
from lavic.shards.describe import whole_sentences
from tests.sets import write_set


def jpeg(image) -> bytes:
    import io

    file = io.BytesIO()
    image.save(file, "JPEG", quality=92)
    return file.getvalue()


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Thirty items in four shards; every fifth has a second photo."""
    samples = []
    for n in range(30):
        look = KINDS[n % 6], list(COLOURS)[n % 10], PATTERNS[n % 4]
        for photo in range(2 if n % 5 == 0 else 1):
            jpg = jpeg(draw(*look, seed=100 * photo + n))
            samples.append(
                Sample.of(
                    item_id=f"B0MN{n:06d}", n=photo, jpg=jpg, title=f"Acme {look[0].title()}", width=96, height=96
                )
            )
    write_set(tmp_path / "shards", samples, photos_per_shard=10)
    return tmp_path / "shards"


def test_tokens_are_those_of_each_item_s_first_photo(shards: Path, tmp_path: Path) -> None:
    words = ["embed", "--model.name", "mini", "--shards", str(shards), "--batch", "7", "--precision", "float32"]
    assert main([*words, "--out", str(tmp_path / "store")]) == 0
    store, data = ItemStore.open(tmp_path / "store"), ShardDataset(shards)
    backbone = Backbone.load(ModelSettings(name="mini"))
    assert len(store) == 30
    firsts = [sample for sample in (data[i] for i in range(len(data))) if sample.meta["n"] == 0]
    views = torch.from_numpy(np.stack([backbone.geometry.cut(sample.image) for sample in firsts]))
    with torch.no_grad():
        expected = cls_tokens(backbone.model, views)
    torch.testing.assert_close(store.lookup([s.item_id for s in firsts]), expected, rtol=1e-5, atol=1e-5)
    assert store.title("B0MN000007") == firsts[7].title
    # again: nothing to do; another set into the same store: refused
    made = (tmp_path / "store" / "manifest.json").stat().st_mtime_ns
    assert main([*words, "--out", str(tmp_path / "store")]) == 0
    assert (tmp_path / "store" / "manifest.json").stat().st_mtime_ns == made
    assert main([*words, "--precision", "float16", "--out", str(tmp_path / "store")]) == 2


def test_a_store_is_compared_and_read_without_a_model(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["embed", "--model.name", "mini", "--shards", str(shards), "--out", str(tmp_path / "store")]
    assert main(words) == 0

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(Backbone, "load", never)
    assert main(words) == 0, "a whole store has nothing to do"
    assert main([*words, "--precision", "float32"]) == 2, "another plan is refused"


@pytest.mark.dist
def test_two_ranks_make_the_same_store_as_one(shards: Path, tmp_path: Path) -> None:
    words = ["embed", "--model.name", "mini", "--shards", str(shards)]
    assert main([*words, "--out", str(tmp_path / "one")]) == 0
    command = [sys.executable, "-m", "lavic", *words, "--out", str(tmp_path / "two"), "--nproc", "2"]
    subprocess.run(command, check=True, timeout=300)
    one, two = ItemStore.open(tmp_path / "one"), ItemStore.open(tmp_path / "two")
    assert one.ids == two.ids
    assert one.manifest.parts == two.manifest.parts


@pytest.mark.dist
def test_a_killed_embed_goes_on(shards: Path, tmp_path: Path) -> None:
    words = ["embed", "--model.name", "mini", "--shards", str(shards), "--batch", "1", "--out", str(tmp_path / "store")]
    process = subprocess.Popen([sys.executable, "-m", "lavic", *words])
    until = time.monotonic() + 120
    while not list((tmp_path / "store").glob("part-*.json")) and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert list((tmp_path / "store").glob("part-*.json"))
    assert main(words) == 0
    fresh = [*words[:-1], str(tmp_path / "fresh")]
    assert main(fresh) == 0
    assert ItemStore.open(tmp_path / "store").manifest.parts == ItemStore.open(tmp_path / "fresh").manifest.parts


@pytest.fixture
def warned_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Has SIGUSR1, SLURM's warning, reach this process when a function returns for the first time."""

    def arrange(name: str) -> None:
        module, _, function = name.rpartition(".")
        real, calls = getattr(importlib.import_module(module), function), []

        def once(*args: object) -> object:
            done = real(*args)
            if not calls:
                os.kill(os.getpid(), signal.SIGUSR1)
            calls.append(args)
            return done

        monkeypatch.setattr(name, once)

    return arrange


def test_an_embed_that_is_warned_stops_and_goes_on(
    shards: Path, tmp_path: Path, warned_after: Callable[[str], None]
) -> None:
    words = ["embed", "--model.name", "mini", "--shards", str(shards), "--batch", "4"]
    assert main([*words, "--out", str(tmp_path / "undisturbed")]) == 0
    warned_after("lavic.model.compress.cls_tokens")
    stopped = [*words, "--out", str(tmp_path / "store")]
    assert main(stopped) == 75
    assert not list((tmp_path / "store").glob("part-*")), "its first shard was not done"
    warned_after("lavic.model.itemstore.write_part")
    assert main(stopped) == 75
    assert len(list((tmp_path / "store").glob("part-*.json"))) == 1
    assert not (tmp_path / "store" / "manifest.json").exists()
    assert main(stopped) == 0
    stores = [ItemStore.open(tmp_path / name) for name in ("undisturbed", "store")]
    assert stores[0].manifest.parts == stores[1].manifest.parts


def test_a_describe_that_is_warned_stops_and_goes_on(shards: Path, warned_after: Callable[[str], None]) -> None:
    words = ["describe", "--config", "describe-mini", "--shards", str(shards), "--batch", "4"]

    def written() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in shards.glob("*.descriptions.jsonl")}

    assert main(words) == 0
    undisturbed = written()
    for name in undisturbed:
        (shards / name).unlink()
    warned_after("lavic.shards.describe.describe")
    assert main(words) == 75
    assert not written()
    warned_after("lavic.shards.describe.write_descriptions")
    assert main(words) == 75
    assert len(written()) == 1
    assert main(words) == 0
    assert written() == undisturbed


def test_descriptions_of_another_models_weights_are_refused(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A base that was trained again in its folder keeps its name, and its old words must not teach it."""
    words = ["describe", "--config", "describe-mini", "--shards", str(shards), "--batch", "4"]
    assert main(words) == 0
    (sidecar, *_) = sorted(shards.glob("*.descriptions.jsonl"))
    rows = [json.loads(line) for line in sidecar.read_text().splitlines()]
    sidecar.write_text("".join(json.dumps({**row, "weights": "0" * 16}) + "\n" for row in rows))
    capsys.readouterr()
    assert main(words) == 2
    assert f"{sidecar}: by mini ({'0' * 16})" in capsys.readouterr().err


def test_an_adapter_changes_the_tokens_and_is_kept_in_the_store(shards: Path, tmp_path: Path) -> None:
    backbone = Backbone.load(ModelSettings(name="mini"))
    model = add_adapter(backbone, "vision", LoraSettings(r=2, alpha=4, dropout=0.0))
    with torch.no_grad():
        for parameter in trainable(model):
            parameter.normal_(std=0.1)
    save_bundle(tmp_path / "run" / "bundle", backbone, vision=model)
    words = ["embed", "--model.name", "mini", "--shards", str(shards)]
    assert main([*words, "--out", str(tmp_path / "plain")]) == 0
    assert main([*words, "--adapter", str(tmp_path / "run"), "--out", str(tmp_path / "adapted")]) == 0
    plain, adapted = ItemStore.open(tmp_path / "plain"), ItemStore.open(tmp_path / "adapted")
    assert (plain.lookup(plain.ids) - adapted.lookup(plain.ids)).abs().max() > 0.05
    assert plain.vision_adapter is None
    assert adapted.vision_adapter is not None and (adapted.vision_adapter / "adapter_model.safetensors").is_file()

    # the tower in the training loop, adapter unmerged, is what the half-precision store holds
    data = ShardDataset(shards)
    firsts = [sample for sample in (data[i] for i in range(len(data))) if sample.meta["n"] == 0]
    views = torch.from_numpy(np.stack([backbone.geometry.cut(sample.image) for sample in firsts]))
    with torch.no_grad():
        looped = cls_tokens(model.eval(), views)
    stored = adapted.lookup([sample.item_id for sample in firsts])
    assert stored.dtype == torch.float16
    # half an ulp of a half, and the last digits of another order of additions
    torch.testing.assert_close(stored.float(), looped, rtol=2**-11 + 1e-5, atol=1e-5)


def test_wrong_input_is_one_line_and_exit_2(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backbone = Backbone.load(ModelSettings(name="mini"))
    model = add_adapter(backbone, "language", LoraSettings(r=2, alpha=4, dropout=0.0))
    save_adapter(model, tmp_path / "language", backbone, "language")
    out = ["--out", str(tmp_path / "store")]
    for words, message in (
        (["embed", "--shards", str(tmp_path / "none"), *out], "no such folder of shards"),
        (["embed", "--shards", str(shards), "--adapter", str(tmp_path), *out], "no vision adapter here"),
        (
            ["embed", "--model.name", "mini", "--shards", str(shards), "--adapter", str(tmp_path / "language"), *out],
            "a language adapter, a vision adapter is needed",
        ),
        (["describe", "--model.name", "mini", "--shards", str(tmp_path / "none")], "no such folder of shards"),
        (["describe", "--shards", str(shards), "--wrong", "1"], "--wrong"),
    ):
        assert main(words) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert message in said[-1]


def test_describe_writes_a_sidecar_per_shard_and_skips_what_stands(shards: Path) -> None:
    words = ["describe", "--config", "describe-mini", "--shards", str(shards)]
    assert main(words) == 0
    data = ShardDataset(shards)
    paths = [data.manifest.path(shard) for shard in data.manifest.shards]
    texts = {key: text for path in paths for key, text in read_descriptions(path).items()}
    assert set(texts) == set(data.keys)
    right = 0
    for n in range(30):
        words_seen = texts[f"B0MN{n:06d}_0"].rstrip(".").split()
        right += list(COLOURS)[n % 10] in words_seen and PATTERNS[n % 4] in words_seen
    assert right >= 24
    stamps = [descriptions_path(path).stat().st_mtime_ns for path in paths]
    descriptions_path(paths[1]).unlink()
    assert main(["describe", "--config", "describe-mini", "--shards", str(shards)]) == 0
    after = [descriptions_path(path).stat().st_mtime_ns for path in paths]
    assert [a == b for a, b in zip(stamps, after, strict=True)] == [True, False, True, True]


def test_a_cut_description_ends_at_its_last_whole_sentence() -> None:
    assert whole_sentences("A red bag. It has a") == "A red bag."
    assert whole_sentences("A red bag with  a\nhandle") == "A red bag with a handle"
