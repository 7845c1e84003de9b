"""What is computed from a model's shape is what the model has."""

from __future__ import annotations

import pytest
import torch

from lavic.launch.sizes import SHAPES, Shape, Zero2, checkpoint_bytes, shape_of
from lavic.model.adapters import add_adapter, trainable
from lavic.model.backbone import Backbone
from lavic.model.settings import LoraSettings, ModelSettings


@pytest.mark.parametrize("kind", ["vision", "language"])
def test_the_miniature(kind):
    backbone, shape = Backbone.load(ModelSettings(name="mini")), shape_of("mini")
    assert shape is not None
    assert shape.parameters == sum(p.numel() for p in backbone.model.parameters())
    assert shape.photo_tokens == 5 * 17
    model = add_adapter(backbone, kind, LoraSettings(r=4))
    assert shape.adapter(kind, 4) == sum(p.numel() for p in trainable(model))


def test_the_real_one():
    """Built without memory, from the published configuration's widths."""
    from transformers import CLIPVisionConfig, LlavaNextConfig, LlavaNextForConditionalGeneration, MistralConfig

    shape = SHAPES["llava-hf/llava-v1.6-mistral-7b-hf"]
    text = MistralConfig(
        hidden_size=4096,
        num_hidden_layers=32,
        intermediate_size=14336,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32064,
    )
    vision = CLIPVisionConfig(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        image_size=336,
        patch_size=14,
    )
    config = LlavaNextConfig(text_config=text, vision_config=vision)
    with torch.device("meta"):
        model = LlavaNextForConditionalGeneration(config)
    assert shape.parameters == sum(p.numel() for p in model.parameters()) == 7_566_747_648
    assert Shape.of(config.to_dict()) == shape
    assert shape.photo_tokens == 2885
    assert shape.store_bytes(1) == 10_240


def test_zero2_shares_gradients_and_optimizer_state():
    alone, eight = Zero2.of(1000, 800, 1, bucket=100), Zero2.of(1000, 800, 8, bucket=100)
    assert alone.weights == eight.weights == 2 * 1800
    assert (alone.optimizer, eight.optimizer) == (12 * 800, 12 * 100)
    assert (alone.gradients, eight.gradients) == (2 * 900, 2 * 200)
    assert (alone.traffic, eight.traffic) == (0, 2 * 2 * 800 * 7 // 8)
    assert checkpoint_bytes(800) == 12 * 800


def test_an_unknown_model_is_not_guessed(tmp_path):
    assert shape_of(str(tmp_path)) is None
