"""A base model without its weights: what a dry run measures, and what a benchmark fills with random numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lavic.errors import ConfigError
from lavic.model.settings import ModelSettings

if TYPE_CHECKING:
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

SEVEN_B = "llava-hf/llava-v1.6-mistral-7b-hf"
"""The model that LaViC is about; its sizes are known here, so that it can be planned for before it is downloaded."""


def seven_b(**text: Any) -> LlavaNextConfig:
    """The configuration of `SEVEN_B`.

    Args:
        text: Of its language model, other values than the real ones.
    """
    from transformers import CLIPVisionConfig, LlavaNextConfig, MistralConfig

    language = {
        "vocab_size": 32064,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
        "sliding_window": None,
        "tie_word_embeddings": False,
        **text,
    }
    return LlavaNextConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
            projection_dim=768,
        ).to_dict(),
        text_config=MistralConfig(**language).to_dict(),
        image_token_index=32000,
        image_grid_pinpoints=[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
        tie_word_embeddings=False,
    )


def read_config(model: ModelSettings) -> LlavaNextConfig:
    """The configuration of a base model, without its weights: from its folder, Hugging Face's cache, or known sizes.

    Raises:
        ConfigError: There is none of them, or it is not a LLaVA-NeXT.
    """
    from transformers import LlavaNextConfig

    from lavic.model.backbone import resolve

    if model.name == "mini" or Path(model.name).expanduser().is_dir():
        file: Path | None = resolve(model) / "config.json"
    else:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(model.name, "config.json", revision=model.revision)
        file = Path(cached) if isinstance(cached, str) else None
    if file is None:
        if model.name == SEVEN_B:
            return seven_b()
        raise ConfigError(
            f"--model.name {model.name}: no such folder, and not in Hugging Face's cache; a dry run downloads nothing: "
            f"`hf download {model.name} config.json` gets what it needs"
        )
    try:
        values = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as e:
        raise ConfigError(f"--model.name {model.name}: {e}") from e
    if values.get("model_type") != "llava_next":
        raise ConfigError(
            f"--model.name {model.name}: a {values.get('model_type')} model; LaViC needs LLaVA-NeXT (llava_next)"
        )
    config: LlavaNextConfig = LlavaNextConfig.from_dict(values)
    return config


def build(
    config: LlavaNextConfig,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "meta",
    vision: bool = True,
    attention: str = "sdpa",
) -> LlavaNextForConditionalGeneration:
    """A frozen model without weights (`meta`), or with random ones, made where they are to be."""
    from transformers import LlavaNextForConditionalGeneration

    with torch.device(device):
        model = LlavaNextForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation=attention)
    if not vision:
        del model.model.vision_tower
    return model.requires_grad_(False).eval()
