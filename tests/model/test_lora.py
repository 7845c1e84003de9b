"""LoRA goes where it should, comes back whole, and is refused where it does not belong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lavic.errors import ConfigError, DataError
from lavic.model import lora
from lavic.model.bundle import Bundle, BundleInfo, save_bundle
from lavic.model.config import LoraSettings, ModelSettings
from lavic.model.inputs.label_mask import Batch, collate
from lavic.model.inputs.token_loss import hidden_states, unwrap_peft
from lavic.model.loading import Backbone
from lavic.model.lora import add_adapter, apply_adapter, save_adapter, trainable
from lavic.model.visual_tokens import cls_tokens, project

LORA = LoraSettings(r=4, alpha=8, dropout=0.0)


def train_a_little(model: nn.Module) -> None:
    """Gives every LoRA matrix a value, as training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainable(model):
            parameter.normal_(std=0.2, generator=generator)


def a_batch(backbone: Backbone) -> Batch:
    example = backbone.encoder.example(("[INST] ", "I want a red shirt", " [/INST]"), "B0MN123456")
    return collate([example], backbone.encoder.pad)


@pytest.mark.parametrize(
    ("kind", "part"), [("vision", ("vision_tower", "multi_modal_projector")), ("language", ("language_model",))]
)
def test_an_adapter_is_on_every_linear_of_its_part_and_nowhere_else(backbone: Backbone, kind, part) -> None:
    wanted = {
        name
        for name, module in backbone.model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(tuple(f"model.{p}" for p in part))
    }
    model = add_adapter(backbone, kind, LORA)
    names = {
        n.removeprefix("base_model.model.").partition(".lora_")[0]
        for n, p in model.named_parameters()
        if p.requires_grad
    }
    assert names == wanted
    assert all("lora_" in n for n, p in model.named_parameters() if p.requires_grad)


def test_a_saved_adapter_merges_to_the_trained_model_s_values(base: Path, tmp_path: Path) -> None:
    backbone = Backbone.load(ModelSettings(name=str(base)))
    views = torch.randn(3, 5, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    plain = project(backbone.model, cls_tokens(backbone.model, views))
    model = add_adapter(backbone, "vision", LORA)
    assert lora.untouched(model)
    train_a_little(model)
    assert not lora.untouched(model)
    trained = project(model, cls_tokens(model, views))
    save_adapter(model, tmp_path / "vision", backbone, "vision")

    fresh = Backbone.load(ModelSettings(name=str(base)))
    apply_adapter(fresh, tmp_path / "vision", "vision")
    merged = project(fresh.model, cls_tokens(fresh.model, views))
    torch.testing.assert_close(merged, trained, rtol=1e-4, atol=1e-5)
    assert (merged - plain).abs().max() > 0.01
    assert not trainable(fresh.model)

    towerless = Backbone.load(ModelSettings(name=str(base)), vision=False)
    apply_adapter(towerless, tmp_path / "vision", "vision")
    torch.testing.assert_close(project(towerless.model, cls_tokens(fresh.model, views)), merged)


def test_a_bundle_gives_the_in_memory_model_s_logits(base: Path, tmp_path: Path) -> None:
    backbone = Backbone.load(ModelSettings(name=str(base)))
    vision = add_adapter(backbone, "vision", LORA)
    train_a_little(vision)
    save_bundle(tmp_path / "stage1", backbone, vision=vision)

    second = Backbone.load(ModelSettings(name=str(base)), vision=False)
    apply_adapter(second, tmp_path / "stage1" / "vision_adapter", "vision")
    language = add_adapter(second, "language", LORA)
    train_a_little(language)
    batch = a_batch(second)
    trained = unwrap_peft(language).lm_head(hidden_states(language, batch, None))
    info = save_bundle(tmp_path / "stage2", second, vision=tmp_path / "stage1" / "vision_adapter", language=language)

    bundle = Bundle.load(tmp_path / "stage2")
    loaded = bundle.backbone.model.lm_head(hidden_states(bundle.backbone.model, batch, None))
    torch.testing.assert_close(loaded, trained, rtol=1e-4, atol=1e-4)
    assert bundle.info == info == BundleInfo.read(tmp_path / "stage2")
    before = Bundle.load(tmp_path / "stage2", language=False).backbone.model
    untuned = before.lm_head(hidden_states(before, batch, None))
    assert (untuned - trained).abs().max() > 0.01

    beside = Bundle.load(tmp_path / "stage2", merge=False).backbone.model
    for _ in range(2):
        torch.testing.assert_close(beside.lm_head(hidden_states(beside, batch, None)), trained, rtol=1e-4, atol=1e-4)
        with lora.adapter_off(beside.model.language_model):
            torch.testing.assert_close(beside.lm_head(hidden_states(beside, batch, None)), untuned)


@pytest.mark.parametrize("kind", ["vision", "language"])
def test_in_bfloat16_a_loaded_adapter_is_the_trained_one_to_the_bit(base: Path, tmp_path: Path, kind) -> None:
    """A small adapter, as after a few steps: merged into bfloat16 weights most of it would be gone."""
    settings = ModelSettings(name=str(base), dtype="bfloat16")

    def values(model: nn.Module) -> torch.Tensor:
        if kind == "language":
            return hidden_states(model, a_batch(backbone), None)
        return project(model, cls_tokens(model, views))

    backbone = Backbone.load(settings)
    views = torch.randn(3, 5, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    plain = values(backbone.model)
    model = add_adapter(backbone, kind, LORA)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.003, generator=generator)
    save_adapter(model, tmp_path / kind, backbone, kind)
    for parameter in trainable(model):
        parameter.data = parameter.data.bfloat16()  # as DeepSpeed has it
    expected = values(model.eval())

    loaded = Backbone.load(settings)
    apply_adapter(loaded, tmp_path / kind, kind)
    assert not trainable(loaded.model)
    assert torch.equal(values(loaded.model), expected)

    merged = Backbone.load(settings)
    weights = load_file(tmp_path / kind / lora.WEIGHTS)
    for key in (key for key in weights if "lora_A" in key):
        linear = merged.model.get_submodule(key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
        linear.weight.data += (weights[key.replace("lora_A", "lora_B")] @ weights[key] * 2).bfloat16()
    lost, effect = (values(merged.model) - expected).norm(), (expected - plain).norm()
    assert lost > 0.2 * effect, "merging keeps it: this test shows nothing"


def test_an_adapter_with_a_number_that_is_not_finite_is_refused(base: Path, tmp_path: Path) -> None:
    backbone = Backbone.load(ModelSettings(name=str(base)))
    save_adapter(add_adapter(backbone, "language", LORA), tmp_path / "a", backbone, "language")
    weights = load_file(tmp_path / "a" / lora.WEIGHTS)
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, tmp_path / "a" / lora.WEIGHTS)
    with pytest.raises(DataError, match="has numbers that are not finite"):
        apply_adapter(Backbone.load(ModelSettings(name=str(base))), tmp_path / "a", "language")


def test_an_adapter_of_another_base_model_is_refused(base: Path, other_base: Path, tmp_path: Path) -> None:
    backbone = Backbone.load(ModelSettings(name=str(base)))
    save_adapter(add_adapter(backbone, "vision", LORA), tmp_path / "a", backbone, "vision")
    other = Backbone.load(ModelSettings(name=str(other_base)))
    with pytest.raises(DataError, match="made for another base model"):
        apply_adapter(other, tmp_path / "a", "vision")
    with pytest.raises(DataError, match="a vision adapter, but a language adapter is needed"):
        apply_adapter(Backbone.load(ModelSettings(name=str(base))), tmp_path / "a", "language")
    with pytest.raises(DataError, match="not an adapter of LaViC"):
        apply_adapter(other, tmp_path, "vision")


def test_an_adapter_with_a_key_too_few_or_too_many_is_refused(base: Path, tmp_path: Path) -> None:
    backbone = Backbone.load(ModelSettings(name=str(base)))
    save_adapter(add_adapter(backbone, "language", LORA), tmp_path / "a", backbone, "language")
    weights = tmp_path / "a" / lora.WEIGHTS
    full = load_file(weights)
    first = sorted(full)[0]
    save_file({k: v for k, v in full.items() if k != first}, weights)
    with pytest.raises(DataError, match="1 weights missing, 0 unknown"):
        apply_adapter(Backbone.load(ModelSettings(name=str(base))), tmp_path / "a", "language")
    save_file({**full, first.replace("layers.0", "layers.9"): full[first].clone()}, weights)
    with pytest.raises(DataError, match="0 weights missing, 1 unknown"):
        apply_adapter(Backbone.load(ModelSettings(name=str(base))), tmp_path / "a", "language")


def test_what_is_no_llava_next_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--model\.name .*: no such folder, and cannot be downloaded") as raised:
        Backbone.load(ModelSettings(name=str(tmp_path / "missing")))
    assert "\n" not in str(raised.value)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(ConfigError, match="a clip model; LaViC needs LLaVA-NeXT"):
        Backbone.load(ModelSettings(name=str(tmp_path)))
