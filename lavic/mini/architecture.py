"""The miniature LLaVA-NeXT: the class of the 7B model with about a million parameters, and how it is initialised."""

from __future__ import annotations

import importlib.resources
import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field, PositiveInt
from torch import nn
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
)
from transformers.utils.logging import disable_progress_bar

from lavic.config import settings
from lavic.errors import DataError
from lavic.mini.tokenizer import IMAGE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MEAN, STD = (0.5, 0.5, 0.5), (0.28, 0.28, 0.28)


@settings
class Architecture:
    """Sizes of a miniature."""

    view: PositiveInt = 48
    """Side of a view, pixels."""
    patch: PositiveInt = 12
    """Side of a patch, pixels."""
    vision_width: PositiveInt = 96
    """d_vision"""
    vision_layers: PositiveInt = 4
    """Layers of the vision tower."""
    width: PositiveInt = 128
    """d_text"""
    layers: Annotated[int, Field(ge=2)] = 4
    """Layers of the language model."""
    heads: PositiveInt = 4
    """Attention heads of both; the language model has half as many key-value heads."""
    positions: PositiveInt = 1024
    """Maximum length of a prompt, tokens."""


def build(architecture: Architecture, tokenizer: PreTrainedTokenizerFast) -> LlavaNextForConditionalGeneration:
    """A freshly initialised miniature.

    With the usual small initialisation a model of this size never learns to copy. With embeddings of unit variance,
    linears scaled by 1/sqrt(fan-in) and damped residual outputs it does within 150 steps.
    """
    a = architecture
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=a.vision_width,
            intermediate_size=2 * a.vision_width,
            num_hidden_layers=a.vision_layers,
            num_attention_heads=a.heads,
            image_size=a.view,
            patch_size=a.patch,
            projection_dim=64,
        ).to_dict(),
        text_config=MistralConfig(
            vocab_size=len(tokenizer),
            hidden_size=a.width,
            intermediate_size=2 * a.width,
            num_hidden_layers=a.layers,
            num_attention_heads=a.heads,
            num_key_value_heads=max(1, a.heads // 2),
            max_position_embeddings=a.positions,
            sliding_window=None,
            tie_word_embeddings=False,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        ).to_dict(),
        image_token_index=tokenizer.get_vocab()[IMAGE],
        image_grid_pinpoints=[[2 * a.view, 2 * a.view]],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    model = LlavaNextForConditionalGeneration(config)
    damp = (2 * a.layers) ** -0.5
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "class_embedding" in name:
                nn.init.normal_(weight, std=0.5)
            elif "position_embedding" in name:
                nn.init.normal_(weight, std=0.3)
            elif "patch_embedding" in name:
                nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
            elif weight.dim() == 2 and "vision_tower" not in name:
                if "embed_tokens" in name:
                    nn.init.normal_(weight, std=1.0)
                elif "lm_head" in name:
                    nn.init.normal_(weight, std=0.5 * a.width**-0.5)
                else:
                    last = "o_proj" in name or "down_proj" in name
                    nn.init.normal_(weight, std=weight.shape[1] ** -0.5 * (damp if last else 1.0))
    return model


@dataclass(frozen=True)
class CopiedWeights:
    """What was copied from another miniature."""

    words: int
    """Number of words in both vocabularies."""
    vision: bool
    """Whether the vision side was copied too."""


def copy_weights(
    model: LlavaNextForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: str | Path
) -> CopiedWeights:
    """Copies the weights of another miniature, as LLaVA began with Mistral's language model and CLIP's vision tower.

    Words of both vocabularies get the trained vectors; a new word keeps its initial one, scaled to the trained ones. A
    vision side of other sizes keeps its initial weights.

    Raises:
        DataError: The folder is not a miniature, or its language model has other sizes.
    """
    try:
        source = LlavaNextForConditionalGeneration.from_pretrained(str(folder), dtype=torch.float32)
        words = AutoTokenizer.from_pretrained(str(folder)).get_vocab()
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: not a miniature to start from: {error}") from None
    language: list[Any] = [model.config.text_config, source.config.text_config]
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    if other := [name for name in sizes if getattr(language[0], name) != getattr(language[1], name)]:
        raise DataError(f"{folder}: its language model has another {', '.join(other)}: choose the same --architecture")
    known = [(new, words[word]) for word, new in tokenizer.get_vocab().items() if word in words]
    ids, trained_ids = (torch.tensor(column) for column in zip(*known, strict=True))
    state = source.model.language_model.state_dict()
    tables = (
        (model.model.language_model.embed_tokens.weight, state.pop("embed_tokens.weight")),
        (model.lm_head.weight, source.lm_head.weight),
    )
    with torch.no_grad():
        for table, trained in tables:
            table *= trained[trained_ids].std() / table.std()
            table[ids] = trained[trained_ids]
    model.model.language_model.load_state_dict(state, strict=False)
    vision: list[Any] = [model.config.vision_config, source.config.vision_config]
    matches = all(getattr(vision[0], name) == getattr(vision[1], name) for name in (*sizes, "image_size", "patch_size"))
    if matches:
        for part in ("vision_tower", "multi_modal_projector"):
            getattr(model.model, part).load_state_dict(getattr(source.model, part).state_dict())
        model.model.image_newline.data.copy_(source.model.image_newline)
    return CopiedWeights(words=len(known), vision=matches)


def save(model: LlavaNextForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes a Hugging Face model folder with half-precision weights; the weights are moved into it last."""
    folder.mkdir(parents=True, exist_ok=True)
    disable_progress_bar()
    half = {name: value.half() for name, value in model.state_dict().items()}
    vision: Any = model.config.vision_config
    size = vision.image_size
    processor = {
        "image_processor_type": "LlavaNextImageProcessor",
        "size": {"shortest_edge": size},
        "crop_size": {"height": size, "width": size},
        "image_grid_pinpoints": model.config.image_grid_pinpoints,
        "image_mean": list(MEAN),
        "image_std": list(STD),
        "resample": 3,
        "do_pad": True,
    }
    with TemporaryDirectory(prefix=".", dir=folder) as temporary:
        model.save_pretrained(temporary, state_dict=half)
        tokenizer.save_pretrained(temporary)
        (Path(temporary) / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
        (Path(temporary) / "chat_template.jinja").write_text(read_chat_template(), "utf-8")
        for file in sorted(Path(temporary).iterdir(), key=lambda file: file.suffix == ".safetensors"):
            file.replace(folder / file.name)


def read_chat_template() -> str:
    """The chat template: the tags of LLaVA-v1.6-Mistral, the photo first."""
    return (importlib.resources.files("lavic.mini") / "base" / "chat_template.jinja").read_text("utf-8")
