"""What is computed from a configuration is what the model has that is made from it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
)

from lavic.errors import ConfigError
from lavic.model.config import LoraSettings, ModelSettings
from lavic.model.dims import CONFIG_DEFAULTS, ModelDims
from lavic.model.hub import SEVEN_B, read_config
from lavic.model.lora import trainable, wrap

VISION = CLIPVisionConfig(
    hidden_size=48,
    intermediate_size=208,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=56,
    patch_size=14,
)
SIZES = {
    "vocab_size": 100,
    "hidden_size": 96,
    "intermediate_size": 416,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
}


def llava(text: PretrainedConfig, **more: object) -> LlavaNextConfig:
    return LlavaNextConfig(
        vision_config=VISION.to_dict(), text_config=text.to_dict(), **{"image_token_index": 5, **more}
    )


def seven_b() -> LlavaNextConfig:
    return LlavaNextConfig.from_dict(dict(read_config(ModelSettings(name=SEVEN_B))))


CONFIGS = {
    "mini": lambda: LlavaNextConfig.from_dict(dict(read_config(ModelSettings(name="mini")))),
    "7b": seven_b,
    "wide heads": lambda: llava(MistralConfig(**SIZES, head_dim=32, num_key_value_heads=2)),
    "llama": lambda: llava(LlamaConfig(**SIZES)),
    "qwen2": lambda: llava(Qwen2Config(**SIZES, num_key_value_heads=2)),
    "tied": lambda: llava(LlamaConfig(**SIZES, tie_word_embeddings=True), tie_word_embeddings=True),
}


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_the_models(name: str) -> None:
    config = CONFIGS[name]()
    shape = ModelDims.from_config(config.to_dict())
    with torch.device("meta"):
        model = LlavaNextForConditionalGeneration(config).requires_grad_(False)
    assert shape.parameters == count(model)
    assert shape.tower == count(model.model.vision_tower)
    assert shape.projector == count(model.model.multi_modal_projector) + shape.hidden
    linears = [
        (path.rpartition(".")[2], module.in_features, module.out_features, module.bias is not None)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    assert sorted((linear.name, linear.inputs, linear.outputs, linear.bias) for linear in shape.linears()) == sorted(
        linears
    )
    for kind in ("vision", "language"):
        adapted = wrap(model, kind, LoraSettings(r=3))  # type: ignore[arg-type]
        assert shape.adapter(kind, 3) == sum(p.numel() for p in trainable(adapted))  # type: ignore[arg-type]
        model = adapted.unload()


def test_the_7b_model_has_its_known_sizes() -> None:
    shape = ModelDims.from_config(read_config(ModelSettings()))
    assert shape.parameters == 7_566_747_648
    assert shape.adapter("vision", 8) == 3_645_440 and shape.adapter("language", 8) == 20_971_520
    assert (shape.tower_tokens, shape.photo_tokens) == (2885, 2928)
    assert shape.store_bytes(1) == 10_240


@pytest.mark.parametrize("text", [LlamaConfig, MistralConfig, Qwen2Config])
def test_what_a_file_leaves_out_is_what_transformers_fills_in(text: type[PretrainedConfig]) -> None:
    config = LlavaNextConfig(
        text_config=text(num_hidden_layers=3).to_dict(), vision_config=CLIPVisionConfig().to_dict()
    )
    short = {
        "model_type": "llava_next",
        "text_config": {"model_type": text.model_type, "num_hidden_layers": 3},
        "vision_config": {"model_type": "clip_vision_model"},
    }
    assert ModelDims.from_config(short) == ModelDims.from_config(config.to_dict())
    assert {text.model_type, "clip_vision_model"} <= set(CONFIG_DEFAULTS)


def test_what_it_cannot_know_is_not_guessed() -> None:
    config = {"text_config": {"model_type": "phi3", "num_hidden_layers": 3}, "vision_config": {}}
    with pytest.raises(ConfigError, match=r"no 'num_attention_heads' for phi3 and clip_vision_model: write it with"):
        ModelDims.from_config(config)
