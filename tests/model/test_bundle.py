"""A bundle is compared with what it records before anything ranks with it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lavic.errors import ConfigError, DataError
from lavic.model.bundle import Bundle, save_bundle
from lavic.model.config import LoraSettings, ModelSettings
from lavic.model.item_store import ItemStore, write_manifest
from lavic.model.loading import Backbone, read_geometry
from lavic.model.lora import WEIGHTS, add_adapter, save_adapter
from lavic.shards.embed import find_adapter
from tests.model.test_item_store import make_store
from tests.model.test_lora import train_a_little

LORA = LoraSettings(r=2, alpha=4, dropout=0.0)


def make_bundle(folder: Path, base: Path, *, scale: float = 1.0) -> Path:
    """A bundle with a vision and a language adapter."""
    backbone = Backbone.load(ModelSettings(name=str(base)))
    vision = add_adapter(backbone, "vision", LORA)
    train_a_little(vision)
    save_adapter(vision, folder.with_name(f"{folder.name}-vision"), backbone, "vision")
    backbone = Backbone.load(ModelSettings(name=str(base)))
    language = add_adapter(backbone, "language", LORA)
    train_a_little(language)
    with torch.no_grad():
        for parameter in language.parameters():
            if parameter.requires_grad:
                parameter *= scale
    save_bundle(folder, backbone, vision=folder.with_name(f"{folder.name}-vision"), language=language)
    return folder


@pytest.fixture(scope="module")
def bundle(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundles") / "bundle", base)


@pytest.fixture(scope="module")
def other(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of another run on the same base model."""
    return make_bundle(tmp_path_factory.mktemp("bundles") / "other", base, scale=0.5)


def swap_language(folder: Path, other: Path) -> None:
    shutil.rmtree(folder / "language_adapter")
    shutil.copytree(other / "language_adapter", folder / "language_adapter")


def swap_note(folder: Path, other: Path) -> None:
    shutil.copy(other / "bundle.json", folder / "bundle.json")


def truncate(name: str) -> Callable[[Path, Path], None]:
    return lambda folder, other: os.truncate(folder / name / WEIGHTS, 1000)


def flip_a_bit(folder: Path, other: Path) -> None:
    path = folder / "language_adapter" / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-9] ^= 4
    path.write_bytes(data)


def change_scale(folder: Path, other: Path) -> None:
    path = folder / "language_adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 8}))


def add_unrecorded(folder: Path, other: Path) -> None:
    path = folder / "bundle.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "language_adapter": None}))


@pytest.mark.parametrize(
    ("harm", "named"),
    [
        (swap_language, "language_adapter: its digest is"),
        (swap_note, "language_adapter: its digest is"),
        (truncate("language_adapter"), "language_adapter: its digest is"),
        (truncate("vision_adapter"), "vision_adapter: its digest is"),
        (flip_a_bit, "language_adapter: its digest is"),
        (change_scale, "language_adapter: its digest is"),
        (lambda folder, other: shutil.rmtree(folder / "vision_adapter"), "vision_adapter: not a complete adapter"),
        (add_unrecorded, "language_adapter: bundle.json records no such adapter"),
    ],
    ids=["swapped", "note", "cut", "cut vision", "bit", "scale", "missing", "unrecorded"],
)
def test_files_that_the_bundle_does_not_record_are_refused(bundle, other, tmp_path, harm, named):
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    Bundle.load(copy)
    harm(copy, other)
    with pytest.raises(DataError, match=named) as raised:
        Bundle.load(copy)
    assert str(copy) in str(raised.value) and "\n" not in str(raised.value)


def test_embed_refuses_the_adapter_of_another_run(bundle, other, tmp_path):
    shutil.copytree(bundle, tmp_path / "bundle")
    assert find_adapter(tmp_path / "bundle") == tmp_path / "bundle" / "vision_adapter"
    os.truncate(tmp_path / "bundle" / "vision_adapter" / WEIGHTS, 1000)
    with pytest.raises(DataError, match="vision_adapter: its digest is"):
        find_adapter(tmp_path / "bundle")


def test_a_base_model_that_was_moved_is_found_by_its_new_name(base, other_base, tmp_path):
    moved = tmp_path / "first"
    shutil.copytree(base, moved)
    folder = make_bundle(tmp_path / "bundle", moved)
    moved = moved.rename(tmp_path / "second")
    with pytest.raises(ConfigError, match=r"first: .*if it was moved, give its folder with --model\.name"):
        Bundle.load(folder)
    assert Bundle.load(folder, base=str(moved)).backbone.name == str(moved)
    with pytest.raises(DataError, match=r"trained on the base model .*first with fingerprint .* --model\.name"):
        Bundle.load(folder, base=str(other_base))


def test_another_tokenizer_is_refused(base, tmp_path):
    """The fingerprint is of the weights; another tokenizer would rank otherwise without a word."""
    model = tmp_path / "model"
    shutil.copytree(base, model)
    folder = make_bundle(tmp_path / "bundle", model)
    Bundle.load(folder)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    (model / "tokenizer.json").write_text(json.dumps({**tokenizer, "truncation": None, "padding": None}, indent=1))
    with pytest.raises(DataError, match="trained with another tokenizer"):
        Bundle.load(folder)
    note = folder / "bundle.json"  # of a bundle from before it was recorded
    note.write_text(json.dumps({**json.loads(note.read_text()), "tokenizer": None}))
    Bundle.load(folder)


@pytest.mark.parametrize("change", [{"use_rslora": True}, {"use_dora": True}])
def test_an_adapter_of_another_kind_is_refused(bundle, tmp_path, change):
    shutil.copytree(bundle, tmp_path / "bundle")
    path = tmp_path / "bundle" / "language_adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(DataError, match="which lavic's adapters never have"):
        Bundle.load(tmp_path / "bundle")


def test_a_relative_name_is_recorded_absolute(base, tmp_path, monkeypatch):
    shutil.copytree(base, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    folder = make_bundle(tmp_path / "bundle", Path("model"))
    monkeypatch.chdir("/")
    assert Bundle.load(folder).info.base == str(tmp_path / "model")


def test_a_store_with_another_store_s_tokens_is_refused(tmp_path, backbone):
    make_store(tmp_path / "a", backbone)
    make_store(tmp_path / "b", backbone)
    shutil.copy(tmp_path / "b" / "tokens-00000.safetensors", tmp_path / "a")
    store = ItemStore.open(tmp_path / "a")
    assert store.lookup(["I4"]).shape == (1, 5, backbone.vision_width)  # of a part that is whole
    with pytest.raises(DataError, match=r"tokens-00000\.safetensors: sha256 .* differs from the manifest"):
        store.lookup(["I0"])


def test_a_store_with_another_list_of_items_is_refused(tmp_path, backbone):
    make_store(tmp_path / "a", backbone)
    items = tmp_path / "a" / "items-00000.jsonl"
    items.write_text(items.read_text().replace('"I0"', '"X0"'))
    for index in (tmp_path / "a").glob("items-*.safetensors"):
        index.unlink()
    with pytest.raises(DataError, match=r"items-00000\.jsonl: does not match the manifest"):
        ItemStore.open(tmp_path / "a")


def test_an_older_store_with_a_broken_list_is_refused(tmp_path, backbone):
    make_store(tmp_path / "a", backbone)
    note = tmp_path / "a" / "manifest.json"
    manifest = json.loads(note.read_text())
    note.write_text(json.dumps({**manifest, "parts": [{**p, "items_sha256": ""} for p in manifest["parts"]]}))
    items = next(path for path in sorted((tmp_path / "a").glob("items-*.jsonl")) if path.stat().st_size)
    items.write_text(items.read_text().replace("{", "[", 1))
    with pytest.raises(DataError, match=r"items-.*\.jsonl:1: not an item"):
        ItemStore.open(tmp_path / "a")


def test_a_store_with_another_adapter_is_refused(bundle, tmp_path, backbone):
    (tmp_path / "store").mkdir()
    write_manifest(tmp_path / "store", backbone, bundle / "vision_adapter", [])
    ItemStore.open(tmp_path / "store").check_adapter()
    os.truncate(tmp_path / "store" / "vision_adapter" / WEIGHTS, 1000)
    with pytest.raises(DataError, match="vision_adapter: its digest is"):
        ItemStore.open(tmp_path / "store").check_adapter()


def test_files_of_a_bundle_have_the_modes_of_the_user_s_umask(base, tmp_path):
    before = os.umask(0o027)
    try:
        folder = make_bundle(tmp_path / "bundle", base)
    finally:
        os.umask(before)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in folder.rglob("*") if path.is_file()}
    assert set(modes.values()) == {"0o640"}, modes


@pytest.mark.parametrize("legacy", [False, True], ids=["transformers 5", "both"])
def test_a_folder_that_transformers_5_saved_is_read(base, tmp_path, legacy):
    """It has processor_config.json with the image processor inside, which wins where both files are there."""
    expected = read_geometry(base, "lavic")
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "processor_config.json").write_text(
        json.dumps({"image_processor": processor, "image_token": "<image>", "processor_class": "LlavaNextProcessor"})
    )
    if legacy:
        (folder / "preprocessor_config.json").write_text(json.dumps({**processor, "image_mean": [0, 0, 0]}))
    else:
        (folder / "preprocessor_config.json").unlink()
    assert read_geometry(folder, "lavic") == expected
    Backbone.load(ModelSettings(name=str(folder)))


def test_a_processor_config_without_an_image_processor_does_not_hide_the_older_file(base, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    (folder / "processor_config.json").write_text('{"patch_size": 12, "processor_class": "LlavaNextProcessor"}')
    assert read_geometry(folder) == read_geometry(base)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigError, match=r"no usable image processor settings in preprocessor_config\.json or"):
        read_geometry(folder)
