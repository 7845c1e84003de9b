"""`lavic describe` and `lavic embed` on a real set with the packaged base: whole, resumable, refused when wrong."""

from __future__ import annotations

import hashlib
import json
import os
import pkgutil
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lavic.cli import main
from lavic.data.descriptions import descriptions_path, read_descriptions, write_descriptions
from lavic.data.shard_dataset import ShardDataset
from lavic.data.tar_shards import Sample
from lavic.mini.drawing import COLOURS, KINDS, PATTERNS, draw
from lavic.model import item_store, prompts
from lavic.model.bundle import save_bundle
from lavic.model.config import LoraSettings, ModelSettings
from lavic.model.hub import fingerprint, resolve
from lavic.model.item_store import ItemStore
from lavic.model.loading import Backbone, read_geometry
from lavic.model.lora import add_adapter, save_adapter, trainable
from lavic.model.visual_tokens import cls_tokens
from lavic.shards.teacher.text_check import complete_sentences
from tests.crawled_sets import write_set
from tests.model.conftest import make_base


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
    words = ["embed", "--model.name", "mini", "--shards", str(shards), "--batch-size", "7", "--precision", "float32"]
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
    words = [
        "embed",
        "--model.name",
        "mini",
        "--shards",
        str(shards),
        "--batch-size",
        "1",
        "--out",
        str(tmp_path / "store"),
    ]
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
        owner, _, function = name.rpartition(".")
        real, calls = getattr(pkgutil.resolve_name(owner), function), []

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
    words = ["embed", "--model.name", "mini", "--shards", str(shards), "--batch-size", "4"]
    assert main([*words, "--out", str(tmp_path / "undisturbed")]) == 0
    warned_after("lavic.model.visual_tokens.cls_tokens")
    stopped = [*words, "--out", str(tmp_path / "store")]
    assert main(stopped) == 75
    assert not list((tmp_path / "store").glob("part-*")), "its first shard was not done"
    warned_after("lavic.model.item_store.write_part")
    assert main(stopped) == 75
    assert len(list((tmp_path / "store").glob("part-*.json"))) == 1
    assert not (tmp_path / "store" / "manifest.json").exists()
    assert main(stopped) == 0
    stores = [ItemStore.open(tmp_path / name) for name in ("undisturbed", "store")]
    assert stores[0].manifest.parts == stores[1].manifest.parts


def test_a_describe_that_is_warned_stops_and_goes_on(shards: Path, warned_after: Callable[[str], None]) -> None:
    words = ["describe", "--config", "describe-mini", "--shards", str(shards), "--batch-size", "4"]

    def written() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in shards.glob("*.descriptions.jsonl")}

    assert main(words) == 0
    undisturbed = written()
    for name in undisturbed:
        (shards / name).unlink()
    warned_after("lavic.shards.teacher.local_teacher.describe")
    assert main(words) == 75
    assert not written()
    warned_after("lavic.shards.teacher.shard_work.write_descriptions")
    assert main(words) == 75
    assert len(written()) == 1
    assert main(words) == 0
    assert written() == undisturbed


def test_useless_texts_of_the_model_are_drawn_once_more(
    few: Path, capsys: pytest.CaptureFixture[str], warned_after: Callable[[str], None]
) -> None:
    """Sentences as titles, which it has never seen, make the miniature loop."""
    said = ["The photo shows a red plain lamp.", "The photo shows a blue striped shoe."]
    said += ["The photo shows a green dotted shoe.", "The photo shows a yellow checked hat."]
    titled = [
        Sample.of(item_id=s.item_id, n=9, jpg=s.jpg, title=title, width=96, height=96)
        for title, s in zip(said, (photo(n) for n in range(4)), strict=True)
    ]
    folder = few.parent / "titled"
    write_set(folder, titled)
    words = ["describe", "--config", "describe-mini", "--shards", str(folder), "--batch-size", "2"]
    capsys.readouterr()
    assert main(words) == 0
    (shard,) = (ShardDataset(folder).manifest.path(entry) for entry in ShardDataset(folder).manifest.shards)
    undisturbed = descriptions_path(shard).read_bytes()
    rows = read_rows(shard)
    out = capsys.readouterr().out
    again = re.search(r"Written twice +(\d+)", out)
    assert again and int(again[1]) >= max(1, sum(row["flag"] != "" for row in rows))
    assert all((row["text"] == "") == (row["flag"] != "") for row in rows)
    descriptions_path(shard).unlink()
    warned_after("lavic.shards.teacher.local_teacher.describe")
    assert main(words) == 75
    assert main(words) == 0
    assert descriptions_path(shard).read_bytes() == undisturbed, "draws do not depend on interruptions"
    descriptions_path(shard).unlink()
    assert main([*words, "--temperature", "3", "--seed", "5"]) == 0
    drawn = descriptions_path(shard).read_bytes()
    descriptions_path(shard).unlink()
    assert main([*words, "--temperature", "3", "--seed", "5"]) == 0
    assert descriptions_path(shard).read_bytes() == drawn != undisturbed


def test_a_question_of_the_users_is_asked(few: Path, tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_text("What colour is {title}?")
    words = ["describe", "--model.name", "mini", "--shards", str(few), "--max-new-tokens", "4"]
    assert main([*words, "--prompt-file", str(tmp_path / "q.txt")]) == 0
    (shard,) = (ShardDataset(few).manifest.path(entry) for entry in ShardDataset(few).manifest.shards)
    assert all(row["prompt"].startswith("question-") for row in read_rows(shard))
    assert main(words) == 2, "asked with other words"


def test_descriptions_of_another_models_weights_are_refused(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A base that was trained again in its folder keeps its name, and its old words must not teach it."""
    words = ["describe", "--config", "describe-mini", "--shards", str(shards), "--batch-size", "4"]
    assert main(words) == 0
    (sidecar, *_) = sorted(shards.glob("*.descriptions.jsonl"))
    rows = [json.loads(line) for line in sidecar.read_text().splitlines()]
    sidecar.write_text("".join(json.dumps({**row, "weights": "0" * 16}) + "\n" for row in rows))
    capsys.readouterr()
    assert main(words) == 2
    assert f"{sidecar}: by mini with the weights {'0' * 16}, not " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--model.views", "lavic"], "--model.views five, not lavic"),
        (["--model.prompt", "lavic"], "prompt version "),
        (["--model.dtype", "bfloat16"], "--model.dtype float32, not bfloat16"),
        (["--max-new-tokens", "9"], "--max-new-tokens 64, not 9"),
    ],
)
def test_descriptions_made_with_other_settings_are_refused(
    few: Path, capsys: pytest.CaptureFixture[str], change: list[str], said: str
) -> None:
    words = ["describe", "--model.name", "mini", "--shards", str(few), "--max-new-tokens", "64"]
    (shard,) = (ShardDataset(few).manifest.path(entry) for entry in ShardDataset(few).manifest.shards)
    how = {"model": "mini", "weights": fingerprint(resolve(ModelSettings(name="mini"))), "views": "five"}
    how |= {"prompt": prompts.VERSION, "dtype": "float32", "max_new_tokens": "64"}
    write_descriptions(shard, [{"key": key, "text": "A red mug.", **how} for key in ShardDataset(few).keys])
    assert main(words) == 0, "nothing to do"
    assert main([*words, *change]) == 2
    assert said in capsys.readouterr().err
    old = [{k: v for k, v in row.items() if k not in ("dtype", "max_new_tokens")} for row in read_rows(shard)]
    descriptions_path(shard).write_text("".join(json.dumps(row) + "\n" for row in old))
    assert main([*words, "--model.dtype", "bfloat16"]) == 0, "an older version did not record it"


def test_texts_of_the_catalogue_are_refused_where_the_model_is_to_write(few: Path, capsys) -> None:
    (shard,) = (ShardDataset(few).manifest.path(entry) for entry in ShardDataset(few).manifest.shards)
    row = {"text": "A mug.", "model": "catalogue", "weights": "", "prompt": prompts.VERSION, "views": "five"}
    write_descriptions(shard, [{"key": key, **row} for key in ShardDataset(few).keys])
    words = ["describe", "--model.name", "mini", "--shards", str(few)]
    assert main([*words, "--keep", "catalogue"]) == 0
    assert main(words) == 2
    assert "has texts of the catalogue; use --keep catalogue" in capsys.readouterr().err


def read_rows(shard: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in descriptions_path(shard).read_text().splitlines()]


def photo(n: int, number: int = 0, size: tuple[int, int] = (96, 96)) -> Sample:
    look = KINDS[n % 6], list(COLOURS)[n % 10], PATTERNS[n % 4]
    jpg = jpeg(draw(*look, seed=100 * number + n).resize(size))
    return Sample.of(item_id=f"B0MN{n:06d}", n=number, jpg=jpg, title=f"Acme {n}", width=size[0], height=size[1])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with the choice of grids that LLaVA-v1.6 has: slim photos get fewer views."""
    folder = make_base(tmp_path_factory.mktemp("base"))
    processor = folder / "preprocessor_config.json"
    grids = {"image_grid_pinpoints": [[24, 48], [48, 24], [48, 48]]}
    processor.write_text(json.dumps({**json.loads(processor.read_text()), **grids}))
    return folder


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """Four items in one shard; one photo is slim."""
    write_set(tmp_path / "few", [photo(0, size=(40, 120)), photo(1), photo(2, number=1), photo(3)])
    return tmp_path / "few"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--model.views", "lavic"], "--model.views"),
        (["--model.dtype", "bfloat16"], "--model.dtype"),
        (["--model.prompt", "lavic"], "--model.prompt"),
        (["--precision", "bfloat16"], "--precision"),
    ],
)
@pytest.mark.parametrize("whole", [False, True])
def test_a_store_made_with_other_settings_is_refused(
    base: Path, few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: list[str], said: str, whole: bool
) -> None:
    words = ["embed", "--model.name", str(base), "--shards", str(few), "--out", str(tmp_path / "store")]
    assert main(words) == 0
    if not whole:
        (tmp_path / "store" / "manifest.json").unlink()
    assert main([*words, *change]) == 2
    assert f"item store made with another {said}: use another --out" in capsys.readouterr().err
    assert main(words) == 0


def test_a_slim_photo_keeps_the_tokens_of_its_views(base: Path, few: Path, tmp_path: Path) -> None:
    words = ["embed", "--model.name", str(base), "--shards", str(few), "--model.views", "lavic"]
    assert main([*words, "--out", str(tmp_path / "store")]) == 0
    store, geometry = ItemStore.open(tmp_path / "store"), read_geometry(resolve(ModelSettings(name=str(base))), "lavic")
    rows, columns = geometry.grid((40, 120))
    assert store.count("B0MN000000") == 1 + rows * columns
    store.check_geometry(geometry)
    assert store.manifest.dtype == "float32"


def test_a_store_grows_with_its_sets_and_stays_usable(
    base: Path, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """More shards, a shard packed anew, a first photo that was not there before; other items are left alone."""
    out = tmp_path / "store"
    write_set(tmp_path / "grown", [photo(5), photo(6)], photos_per_shard=1)
    words = ["embed", "--model.name", str(base), "--shards", str(few), str(tmp_path / "grown"), "--out", str(out)]
    assert main(words) == 0
    before = ItemStore.open(out)
    assert len(before) == 6
    files = {file.name for file in out.iterdir()}

    # item 2's first photo came at the second try; the other set has a shard more
    write_set(few, [photo(0, size=(40, 120)), photo(1), photo(2), photo(2, number=1), photo(3), photo(4)])
    write_set(tmp_path / "grown", [photo(5), photo(6), photo(7)], photos_per_shard=1)
    real, made = item_store.write_part, []

    def write_part(folder: Path, name: str, items: Any, tokens: torch.Tensor) -> Any:
        assert len(ItemStore.open(out)) == 6, "whole until the new manifest is there"
        made.append([item["key"] for item in items])
        return real(folder, name, items, tokens)

    monkeypatch.setattr(item_store, "write_part", write_part)
    assert main(words) == 0
    assert made == [[f"B0MN00000{n}_0" for n in range(5)], ["B0MN000007_0"]]
    assert "8 items; 2 of 4 parts made" in capsys.readouterr().out
    after = ItemStore.open(out)
    assert len(after) == 8 and after.key("B0MN000002") == "B0MN000002_0"
    assert len({file.name for file in out.iterdir()}) == len(files) + 3, "what nobody needs is gone"
    assert torch.equal(after.lookup(["B0MN000005"]), before.lookup(["B0MN000005"]))
    assert before.key("B0MN000002") == "B0MN000002_1" and before.lookup(["B0MN000002"]).any(), "open since before"
    monkeypatch.setattr(item_store, "write_part", real)
    fresh = [*words[:-1], str(tmp_path / "fresh")]
    assert main(fresh) == 0
    assert ItemStore.open(tmp_path / "fresh").manifest.parts == after.manifest.parts

    write_set(tmp_path / "other", [photo(n) for n in range(10, 16)])
    assert main(["embed", "--model.name", str(base), "--shards", str(tmp_path / "other"), "--out", str(out)]) == 2
    assert "an item store of another catalogue: 8 of its 8 items are not in the sets" in capsys.readouterr().err


def test_growing_that_was_stopped_goes_on(
    base: Path, few: Path, tmp_path: Path, warned_after: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "store"
    write_set(tmp_path / "grown", [photo(5)], photos_per_shard=1)
    words = ["embed", "--model.name", str(base), "--shards", str(few), str(tmp_path / "grown"), "--out", str(out)]
    assert main(words) == 0
    write_set(tmp_path / "grown", [photo(5), photo(6), photo(7)], photos_per_shard=1)
    warned_after("lavic.shards.store_plan.StorePlan.read_part")
    assert main(words) == 75, "a stop is looked for while parts that stand are skipped"
    assert len(ItemStore.open(out)) == 5
    warned_after("lavic.model.item_store.write_part")
    assert main(words) == 75
    assert len(ItemStore.open(out)) == 5
    assert main(words) == 0
    assert len(ItemStore.open(out)) == 7


def test_a_store_of_an_older_version_is_whole_and_can_grow(base: Path, few: Path, tmp_path: Path) -> None:
    """Its parts have numbers, and what they were made of stands in the plan."""
    out = tmp_path / "store"
    words = ["embed", "--model.name", str(base), "--shards", str(few), "--out", str(out)]
    assert main(words) == 0
    manifest, plan = (json.loads((out / name).read_text()) for name in ("manifest.json", "plan.json"))
    (name,) = (part["name"] for part in manifest["parts"])
    keys = [json.loads(line)["key"] for line in (out / f"items-{name}.jsonl").read_text().splitlines()]
    plan["shards"] = [shard.sha256 for shard in ShardDataset(few).manifest.shards]
    plan["items"] = hashlib.sha256("\n".join(keys).encode()).hexdigest()
    del plan["dtype"], plan["prompt"], manifest["dtype"]
    manifest["parts"][0]["name"] = "00000"
    for file in [*out.glob(f"*-{name}.*")]:
        file.rename(file.with_name(file.name.replace(name, "00000")))
    (out / "manifest.json").write_text(json.dumps(manifest))
    (out / "plan.json").write_text(json.dumps(plan))
    stamp = (out / "manifest.json").stat().st_mtime_ns
    assert main(words) == 0
    assert (out / "manifest.json").stat().st_mtime_ns == stamp, "nothing to do"
    assert len(ItemStore.open(out)) == 4
    write_set(few, [photo(n) for n in range(6)])
    assert main(words) == 0
    assert len(ItemStore.open(out)) == 6
    assert not [*out.glob("*-00000.*")]


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
    assert complete_sentences("A red bag. It has a") == "A red bag."
    assert complete_sentences("A red bag with  a\nhandle") == "A red bag with a handle"
