"""Numbers are those of `docs/differences.md`, last section: what kept the released scripts from running."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from safetensors.torch import load_file
from transformers import LlavaNextForConditionalGeneration

from lavic.distributed.context import DistributedContext
from lavic.model.bundle import Bundle, save_bundle
from lavic.model.config import LoraSettings, ModelSettings
from lavic.model.loading import Backbone
from lavic.model.lora import add_adapter
from lavic.train.checkpoint import CheckpointManager, TrainState
from lavic.train.config import LoopSettings
from lavic.train.deepspeed.engine import Engine
from lavic.train.train_step import train_step
from tests.train.assets import Assets
from tests.train.toy import ToyData, ToyTask

ROOT = Path(__file__).parents[3]


def declared() -> list[Requirement]:
    """What setup.py asks for."""
    text = (ROOT / "setup.py").read_text("utf-8")
    return [Requirement(line) for line in re.findall(r'"([\w.-]+(?:\[\w+\])?[><=][^"]*)"', text)]


def load(assets: Assets, **how) -> Backbone:
    return Backbone.load(ModelSettings(name=str(assets.base), **how))


def test_b01_what_stage_1_writes_is_enough_for_what_comes_after(assets: Assets, tmp_path: Path) -> None:
    backbone = load(assets)
    save_bundle(tmp_path / "bundle", backbone, vision=add_adapter(backbone, "vision", LoraSettings(r=2)))
    again = Bundle.load(tmp_path / "bundle", vision=True).backbone
    assert again.geometry == backbone.geometry
    assert again.tokenizer.get_vocab() == backbone.tokenizer.get_vocab()
    assert (tmp_path / "bundle" / "tokenizer" / "tokenizer.json").is_file()


def test_b02_versions_are_bounded_and_the_parts_are_where_they_are_looked_for(assets: Assets) -> None:
    wanted = [need for need in declared() if need.name in ("transformers", "torch", "peft", "deepspeed")]
    assert {need.name for need in wanted} == {"transformers", "torch", "peft", "deepspeed"}
    for need in wanted:
        assert {">=", "<"} <= {one.operator for one in need.specifier}, f"{need} has no two bounds"
        assert need.specifier.contains(importlib.metadata.version(need.name).partition("+")[0])
    model = load(assets).model
    for part in (model.model.vision_tower, model.model.multi_modal_projector, model.model.language_model):
        assert isinstance(part, torch.nn.Module)


def test_b03_a_checkpoint_is_read_without_unpickling(tmp_path: Path, world: DistributedContext) -> None:
    engine = Engine(ToyTask(), world, LoopSettings(global_batch_size=4))
    data = ToyData(8, 1)
    train_step(engine, [data.collate([data[n] for n in range(4)])], 0.01, world)
    folder = CheckpointManager(tmp_path, world).save(engine, TrainState(step=1, samples=4))
    for file in folder.iterdir():
        assert not file.read_bytes().startswith((b"\x80", b"PK")), f"{file.name} is a pickle"
    assert all(tensor.dtype == torch.float32 for tensor in load_file(folder / "state.safetensors").values())
    engine.close()


def test_b04_everything_that_is_imported_is_declared() -> None:
    called = {"pil": "pillow", "yaml": "pyyaml", "upath": "universal_pathlib", "pynvml": "nvidia-ml-py"}
    called |= {"pillow_heif": "pillow-heif", "backports": "backports.zstd", "faiss": "faiss-cpu"}
    called |= {"ahocorasick_rs": "ahocorasick-rs"}
    called |= {"prometheus_client": "prometheus-client", "sentence_transformers": "sentence-transformers"}
    comes_with = {"huggingface_hub": "transformers", "tokenizers": "transformers", "yarl": "aiohttp"}
    comes_with |= {"sqlalchemy": "mlflow", "starlette": "fastapi", "pydantic_core": "pydantic"}
    found = set()
    for part in ("lavic", "launch", "shards"):
        for file in (ROOT / part).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                if isinstance(node, ast.Import):
                    found |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    found.add((node.module or "").partition(".")[0])
    newer = {"compression"}  # of the standard library, from Python 3.14
    others = {name.lower() for name in found} - set(sys.stdlib_module_names) - newer - {"lavic", ""}
    undeclared = {comes_with.get(name, called.get(name, name)) for name in others}
    undeclared -= {need.name.lower() for need in declared()}
    assert not undeclared


def test_b04_no_gpu_is_needed_and_no_folder_is_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAVIC_DEVICE", "cpu")
    assert DistributedContext().device() == torch.device("cpu")
    for part in ("lavic", "launch", "shards"):
        for file in (ROOT / part).rglob("*.py"):
            assert not re.search(r"""["']\.\./""", file.read_text("utf-8")), f"{file} looks beside the working folder"


def test_b05_the_model_is_loaded_as_what_it_is(assets: Assets) -> None:
    model = load(assets).model
    assert type(model) is LlavaNextForConditionalGeneration
    stored = load_file(assets.base / "model.safetensors")
    (name,) = (key for key in stored if "image_newline" in key)
    torch.testing.assert_close(model.model.image_newline.detach(), stored[name].float())
