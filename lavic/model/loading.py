"""Loads the base model: a LLaVA-NeXT from Hugging Face or a folder, with its tokenizer and photo geometry."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError

from lavic.errors import ConfigError, first_line
from lavic.model.chat_template.template import chat_format, load_tokenizer
from lavic.model.config import ModelSettings
from lavic.model.dims import with_config_defaults
from lavic.model.hub import fingerprint, name_of, resolve, tokenizer_digest
from lavic.model.inputs.prompt_encoder import Encoder
from lavic.model.prompts import ChatFormat
from lavic.model.tiling import Geometry

if TYPE_CHECKING:
    from transformers import LlavaNextForConditionalGeneration, PreTrainedTokenizerBase


@dataclass
class Backbone:
    """A loaded base model, frozen and in evaluation mode."""

    model: LlavaNextForConditionalGeneration
    tokenizer: PreTrainedTokenizerBase
    encoder: Encoder
    geometry: Geometry
    name: str
    """A Hugging Face name, or the absolute path of a folder, so that another process can load it."""
    fingerprint: str
    """Digest of config and weights; adapters and item stores record it and do not work with another base model."""
    tokenizer_digest: str
    """Digest of the tokenizer; bundles record it."""

    @classmethod
    def load(
        cls,
        model: ModelSettings,
        device: torch.device | str = "cpu",
        *,
        vision: bool = True,
        language: bool = True,
        chat: ChatFormat | None = None,
    ) -> Backbone:
        """Loads model, tokenizer and geometry.

        Omitted parts are not read from the disk. Weights go to the device one at a time, so that the processes of a
        machine do not fill its memory with copies of the model.

        Args:
            model: Its settings.
            device: Of the model.
            vision: False omits the vision tower: stage 2, evaluation and recommendation do not need it.
            language: False omits the language model and its head: embedding does not need them.
            chat: Tags of prompts; None: those of the model's chat template.

        Raises:
            ConfigError: The model is not found, is not a LLaVA-NeXT, or has no chat template.
        """
        from transformers import AutoConfig
        from transformers.utils import logging

        if not sys.stderr.isatty():
            logging.disable_progress_bar()
        source = resolve(model)
        try:
            config = AutoConfig.from_pretrained(source)
        except (OSError, ValueError) as e:
            raise ConfigError(f"--model.name {model.name}: {first_line(e)}") from e
        if config.model_type != "llava_next":
            raise ConfigError(
                f"--model.name {model.name}: a {config.model_type} model; LaViC needs LLaVA-NeXT (llava_next)"
            )
        tokenizer = load_tokenizer(model, source)
        if chat is None:
            chat = chat_format(model, source, tokenizer, config.image_token_id)
        encoder = Encoder(tokenizer, config.image_token_id, model.prompt, chat)
        device = torch.device(device)
        dtype = getattr(torch, computing_dtype(model, device))
        try:
            loaded: Any = _parts(vision, language).from_pretrained(
                source,
                dtype=dtype,
                attn_implementation=model.attention,
                use_safetensors=True,
                device_map={"": str(device)},
                output_loading_info=True,
            )
        except (OSError, ValueError, ImportError, SafetensorError) as e:
            raise ConfigError(f"--model.name {model.name}: {first_line(e)}") from e
        weights, info = loaded
        if info["missing_keys"]:  # transformers initializes them at random, with a warning
            missing = sorted(info["missing_keys"])
            raise ConfigError(f"--model.name {model.name}: {len(missing)} weights are missing (first: {missing[0]})")
        weights.requires_grad_(False).eval()
        return cls(
            model=weights,
            tokenizer=tokenizer,
            encoder=encoder,
            geometry=read_geometry(source, model.views),
            name=name_of(model),
            fingerprint=fingerprint(source),
            tokenizer_digest=tokenizer_digest(source),
        )

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def vision_width(self) -> int:
        """d_vision, the length of an item token before the projector."""
        vision: Any = self.model.config.vision_config
        return int(vision.hidden_size)


def computing_dtype(model: ModelSettings, device: torch.device) -> Literal["float32", "bfloat16"]:
    """The precision of a model on a device."""
    if model.dtype == "auto":
        return "bfloat16" if device.type == "cuda" else "float32"
    return model.dtype


def _parts(vision: bool, language: bool) -> type[LlavaNextForConditionalGeneration]:
    """The model's class without the omitted parts."""
    from transformers import LlavaNextForConditionalGeneration

    if vision and language:
        return LlavaNextForConditionalGeneration

    omitted = ([] if vision else ["vision_tower"]) + ([] if language else ["language_model", "lm_head"])

    class Parts(LlavaNextForConditionalGeneration):
        _keys_to_ignore_on_load_unexpected = omitted

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            if not vision:
                del self.model.vision_tower
            if not language:
                del self.model.language_model, self.lm_head

    # transformers maps the keys of checkpoints only for classes of its own name.
    Parts.__name__ = Parts.__qualname__ = LlavaNextForConditionalGeneration.__name__
    Parts.__module__ = LlavaNextForConditionalGeneration.__module__
    return Parts


def read_geometry(folder: Path, views: Literal["five", "lavic"] = "five") -> Geometry:
    """The photo geometry in the model's preprocessor file.

    Args:
        folder: Of the model.
        views: Five for every photo, or the grids of the model's processor.

    Raises:
        ConfigError: The file is missing or unusable.
    """
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        vision = with_config_defaults(config, "vision_config", "clip_vision_model")
        processor = read_image_processor(folder)
        size = vision["image_size"]
        pinpoints = processor["image_grid_pinpoints"] if views == "lavic" else [[2 * size, 2 * size]]
        if any(side % size for pinpoint in pinpoints for side in pinpoint):
            raise ValueError(f"image_grid_pinpoints are not multiples of {size}")
        return Geometry(
            size=size,
            patch=vision["patch_size"],
            mean=tuple(processor["image_mean"]),
            std=tuple(processor["image_std"]),
            grids=tuple((height // size, width // size) for height, width in pinpoints),
        )
    except (OSError, KeyError, TypeError, ValueError) as e:
        raise ConfigError(
            f"{folder}: no usable image processor settings in preprocessor_config.json or processor_config.json "
            f"({first_line(e)})"
        ) from e


def read_image_processor(folder: Path) -> dict[str, Any]:
    """The image processor's settings of a model folder.

    transformers 4 saves them in preprocessor_config.json, transformers 5 in processor_config.json under
    `image_processor`. If both exist, the newer form wins, as in transformers.

    Raises:
        OSError: Neither file can be read.
        ValueError: A file is not JSON, or not an object.
    """
    newer = folder / "processor_config.json"
    if newer.is_file():
        processor = json.loads(newer.read_text("utf-8"))
        if isinstance(processor, dict) and isinstance(nested := processor.get("image_processor"), dict):
            return nested
    processor = json.loads((folder / "preprocessor_config.json").read_text("utf-8"))
    if not isinstance(processor, dict):
        raise ValueError("preprocessor_config.json is not a JSON object")
    return processor
