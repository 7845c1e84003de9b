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


def declared_requirements() -> list[Requirement]:
    """The requirements in setup.py."""
    text = (ROOT / "setup.py").read_text("utf-8")
    return [Requirement(line) for line in re.findall(r'"([\w.-]+(?:\[\w+\])?[><=][^"]*)"', text)]


def load(assets: Assets, **options) -> Backbone:
    return Backbone.load(ModelSettings(name=str(assets.base), **options))


def test_b01_the_stage_1_bundle_is_complete(assets: Assets, tmp_path: Path) -> None:
    backbone = load(assets)
    save_bundle(tmp_path / "bundle", backbone, vision=add_adapter(backbone, "vision", LoraSettings(r=2)))
    loaded = Bundle.load(tmp_path / "bundle", vision=True).backbone
    assert loaded.geometry == backbone.geometry
    assert loaded.tokenizer.get_vocab() == backbone.tokenizer.get_vocab()
    assert (tmp_path / "bundle" / "tokenizer" / "tokenizer.json").is_file()


def test_b02_versions_are_bounded_and_model_parts_exist(assets: Assets) -> None:
    requirements = {requirement.name: requirement for requirement in declared_requirements()}
    for name in ("transformers", "torch", "peft", "deepspeed"):
        requirement = requirements[name]
        operators = {specifier.operator for specifier in requirement.specifier}
        assert {">=", "<"} <= operators, f"{requirement} has no two bounds"
        assert requirement.specifier.contains(importlib.metadata.version(requirement.name).partition("+")[0])
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


def test_b04_every_import_is_declared() -> None:
    package_names = {"pil": "pillow", "yaml": "pyyaml", "upath": "universal_pathlib", "pynvml": "nvidia-ml-py"}
    package_names |= {"pillow_heif": "pillow-heif", "backports": "backports.zstd", "faiss": "faiss-cpu"}
    package_names |= {"ahocorasick_rs": "ahocorasick-rs"}
    package_names |= {"prometheus_client": "prometheus-client", "sentence_transformers": "sentence-transformers"}
    dependency_of = {"huggingface_hub": "transformers", "tokenizers": "transformers", "yarl": "aiohttp"}
    dependency_of |= {"sqlalchemy": "mlflow", "starlette": "fastapi", "pydantic_core": "pydantic"}
    imported = set()
    for part in ("lavic", "launch", "shards"):
        for file in (ROOT / part).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    imported.add((node.module or "").partition(".")[0])
    newer_stdlib = {"compression"}  # of the standard library, from Python 3.14
    others = {name.lower() for name in imported} - set(sys.stdlib_module_names) - newer_stdlib - {"lavic", ""}
    undeclared = {dependency_of.get(name, package_names.get(name, name)) for name in others}
    undeclared -= {need.name.lower() for need in declared_requirements()}
    assert not undeclared


def test_b04_no_gpu_is_needed_and_no_path_is_hard_coded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAVIC_DEVICE", "cpu")
    assert DistributedContext().device() == torch.device("cpu")
    for part in ("lavic", "launch", "shards"):
        for file in (ROOT / part).rglob("*.py"):
            assert not re.search(r"""["']\.\./""", file.read_text("utf-8")), (
                f"{file} has a path relative to the parent folder"
            )


def test_b05_the_model_is_loaded_as_llava_next(assets: Assets) -> None:
    model = load(assets).model
    assert type(model) is LlavaNextForConditionalGeneration
    stored = load_file(assets.base / "model.safetensors")
    (name,) = (key for key in stored if "image_newline" in key)
    torch.testing.assert_close(model.model.image_newline.detach(), stored[name].float())
