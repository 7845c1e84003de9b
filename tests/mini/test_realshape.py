"""`lavic mini realshape`: a model folder like the hub's except for depth and weights, tokenized as by SentencePiece."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoProcessor, LlavaNextForConditionalGeneration

from lavic.cli import main
from lavic.errors import DataError
from lavic.mini.realshape import tokenizer as realshape_tokenizer
from lavic.mini.realshape.folder import make_config
from lavic.mini.realshape.sentencepiece_file import SentencePieceFile
from lavic.mini.realshape.tokenizer import SPACE, find_model
from lavic.mini.realshape.weights import entries
from lavic.model.chat_template.template import load_tokenizer
from lavic.model.config import ModelSettings
from lavic.model.dims import ModelDims
from lavic.model.hub import SEVEN_B_CONFIG
from lavic.model.loading import Backbone
from lavic.model.prompts import MISTRAL

UNUSUAL_TEXTS = [
    "",
    " ",
    "  two  spaces   and three",
    " leading and trailing ",
    "\n\nnewlines\n \n\ttabs\t\r\n",
    "naïve café, ÅÄÖ, ﬁ ligature, e\u0301 combined",
    "日本語のテキスト 한국어 العربية עברית ไทย",
    "👗👠 family 👨‍👩‍👧‍👦 flag 🇸🇪",
    "zero\u200bwidth\u00a0nobreak\u2009thin\u3000wide \ufeff bom",
    "▁ the mark itself ▁▁",
    "a" * 97 + "b" * 31,
    "1234567890 3.14159 -17 1,000,000",
    "B07GL3RKRN: Acme “shirt” — size № 4 (XL) ½ off!!!???",
    "\x00\x01\x7f control \ud7ff",
    "[INST] tags [/INST] <img> </x> {json: [1, 2]} \\n \\\\",
    "https://example.com/a?b=c&d=%20#e",
]


@pytest.fixture(scope="module")
def base(vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("realshape") / "base"
    assert main(["mini", "realshape", "--out", str(out), "--narrow", "--tokenizer", str(vocabulary)]) == 0
    return out


def random_texts(count: int) -> list[str]:
    rng = random.Random(7)
    alphabets = [
        "abc ABC",
        "the shirt is red , . ",
        "éüßñ żł",
        "中文字 ",
        "\n\t  ",
        "0123 456",
        "👗🙂",
        "<>[]/_-=",
        "▁ a",
    ]
    return ["".join(rng.choice(rng.choice(alphabets)) for _ in range(rng.randrange(1, 60))) for _ in range(count)]


def test_token_ids_equal_sentencepiece(base: Path, vocabulary: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(vocabulary))
    ours = load_tokenizer(ModelSettings(name=str(base)), base)
    for text in (*UNUSUAL_TEXTS, *random_texts(3000)):
        assert ours(text).input_ids == [theirs.bos_id(), *theirs.encode(text)], repr(text)


def test_decoding_restores_the_text(base: Path) -> None:
    tokenizer = load_tokenizer(ModelSettings(name=str(base)), base)
    for text in (text for text in UNUSUAL_TEXTS if SPACE not in text):  # the space marker is decoded as a space
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == text, repr(text)


def test_special_tokens_equal_the_hubs(base: Path) -> None:
    tokenizer = load_tokenizer(ModelSettings(name=str(base)), base)
    assert [tokenizer.convert_ids_to_tokens(number) for number in (0, 1, 2, 32000, 32001)] == [
        *("<unk>", "<s>", "</s>", "<image>", "<pad>"),
    ]
    assert len(tokenizer) == 32002 and tokenizer.padding_side == "left"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 32001)
    assert tokenizer("a<image><image>b").input_ids.count(32000) == 2


def test_the_folder_loads_without_missing_or_unexpected_keys(base: Path) -> None:
    loaded: Any = LlavaNextForConditionalGeneration.from_pretrained(base, dtype=torch.float32, output_loading_info=True)
    model, info = loaded
    assert not any(info.values()), info
    shape = ModelDims.from_config(make_config(layers=2, vision_layers=3, narrow=True))
    assert sum(p.numel() for p in model.parameters()) == shape.parameters
    assert len(list(base.glob("model-*-of-00004.safetensors"))) == 4
    backbone = Backbone.load(ModelSettings(name=str(base)))
    assert backbone.encoder.chat == MISTRAL and backbone.encoder.version == "1"
    assert type(AutoProcessor.from_pretrained(base)).__name__ == "LlavaNextProcessor"


def test_config_equals_the_real_model_except_for_depth(base: Path) -> None:
    """Widths from the folder's config.json against those of the model on the hub."""
    hub_config = dict(SEVEN_B_CONFIG)
    full_config = make_config(layers=32, vision_layers=24, narrow=False)
    assert ModelDims.from_config(full_config) == ModelDims.from_config(hub_config)
    assert ModelDims.from_config(full_config).parameters == 7_566_747_648
    assert ModelDims.from_config(make_config(layers=2, vision_layers=3, narrow=False)).parameters == 758_866_944
    config = json.loads((base / "config.json").read_text())
    for key in ("image_grid_pinpoints", "image_token_index", "model_type"):
        assert config[key] == hub_config[key]
    loaded = AutoConfig.from_pretrained(base)
    assert loaded.text_config.rope_parameters["rope_theta"] == 1e6
    assert loaded.vision_feature_layer == -2


@pytest.mark.parametrize("narrow", [True, False])
def test_weight_entries_sum_to_the_parameter_count(narrow: bool) -> None:
    config = make_config(layers=5, vision_layers=4, narrow=narrow)
    sizes = {name: torch.Size(size).numel() for name, size in entries(config)}
    assert sum(sizes.values()) == ModelDims.from_config(config).parameters
    assert "language_model.model.layers.4.mlp.down_proj.weight" in sizes


def test_layers_do_not_depend_on_depth_but_on_the_seed(base: Path, vocabulary: Path, tmp_path: Path) -> None:
    argv = ["mini", "realshape", "--narrow", "--layers", "1", "--vision-layers", "2", "--tokenizer", str(vocabulary)]
    assert main([*argv, "--out", str(tmp_path / "shallow")]) == 0
    assert main([*argv, "--seed", "1", "--out", str(tmp_path / "other")]) == 0
    deep, shallow, other = (read_weights(folder) for folder in (base, tmp_path / "shallow", tmp_path / "other"))
    assert shallow.keys() < deep.keys()
    assert all(torch.equal(shallow[name], deep[name]) for name in shallow)
    assert not any(torch.equal(shallow[name], other[name]) for name in shallow)
    index = json.loads((base / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == deep.keys()
    assert index["metadata"]["total_size"] == sum(2 * weight.numel() for weight in deep.values())


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            tensors |= {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118 (no dict)
    return tensors


@pytest.mark.parametrize("subcommand", ["catalog", "serve", "pretrain", "realshape"])
def test_every_subcommand_is_in_the_usage_and_has_help(subcommand: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mini", "--help"]) == 0
    assert f"\n  {subcommand} " in capsys.readouterr().out
    assert main(["mini", subcommand, "--help"]) == 0
    assert f"usage: lavic mini {subcommand} " in capsys.readouterr().out


def test_a_missing_vocabulary_names_the_install_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(realshape_tokenizer.importlib.util, "find_spec", lambda name: None)
    assert main(["mini", "realshape", "--out", str(tmp_path / "base")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "pip install --no-deps --target vocabulary mistral-common" in error
    assert "--tokenizer vocabulary/mistral_common/data/tokenizer.model.v1" in error
    assert not (tmp_path / "base").exists()
    assert main(["mini", "realshape", "--out", str(tmp_path / "base"), "--tokenizer", "nowhere.model"]) == 2
    assert "--tokenizer nowhere.model: no such file" in capsys.readouterr().err


def test_the_vocabulary_of_an_installed_package_is_found(
    vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "mistral_common"
    (package / "data").mkdir(parents=True)
    shutil.copy(vocabulary, package / "data" / "tokenizer.model.v1")
    (package / "__init__.py").write_text("raise ImportError('its dependencies are missing')")
    monkeypatch.syspath_prepend(tmp_path)
    assert find_model(None) == package / "data" / "tokenizer.model.v1"


def test_a_folder_that_is_not_empty_is_refused(
    base: Path, vocabulary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in base.iterdir()}
    assert main(["mini", "realshape", "--out", str(base), "--narrow", "--tokenizer", str(vocabulary)]) == 2
    assert "something is here already" in capsys.readouterr().err
    assert before == {path.name: path.stat().st_mtime_ns for path in base.iterdir()}


@pytest.mark.parametrize("data", [b"", b"hello there", b"\x0a\xff\xff\xff\xff\xff", b"\x0a\x02\x08\x01", bytes(50)])
def test_a_file_that_is_no_model_is_refused(data: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "x.model"
    file.write_bytes(data)
    with pytest.raises(DataError, match="not a SentencePiece model"):
        SentencePieceFile.read(file)
    assert main(["mini", "realshape", "--out", str(tmp_path / "base"), "--tokenizer", str(file)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "base").exists()


def test_another_models_vocabulary_is_refused(
    vocabulary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A vocabulary with one piece more than Mistral's."""
    file = tmp_path / "more.model"
    shutil.copy(vocabulary, file)
    with file.open("ab") as output:
        output.write(b"\x0a\x09\x0a\x02zz\x15\x00\x00\x00\x00")
    assert main(["mini", "realshape", "--out", str(tmp_path / "base"), "--tokenizer", str(file)]) == 2
    assert "not the vocabulary of Mistral-7B-Instruct" in capsys.readouterr().err
