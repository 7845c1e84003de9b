"""Writes the folder: the hub's files of LLaVA-v1.6-Mistral-7B in the form of transformers 4, which 5 reads too."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from lavic.mini.architecture import read_chat_template
from lavic.mini.realshape.tokenizer import IMAGE, PIECES, write_tokenizer
from lavic.mini.realshape.weights import write_weights
from lavic.model.dims import ModelDims
from lavic.model.hub import SEVEN_B_CONFIG
from lavic.storage.atomic import atomic_folder

NARROW = {
    "text_config": {"hidden_size": 128, "intermediate_size": 448, "num_attention_heads": 8, "num_key_value_heads": 2},
    "vision_config": {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4},
}
"""Small widths in the real proportions; views, patches and vocabulary stay."""
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
BOS, EOS = 1, 2


def make_config(*, layers: int, vision_layers: int, narrow: bool) -> dict[str, Any]:
    """`config.json` with another depth and, where asked, narrow widths."""
    config: dict[str, Any] = copy.deepcopy(dict(SEVEN_B_CONFIG))
    config["text_config"] |= {"num_hidden_layers": layers, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16"}
    config["vision_config"] |= {"num_hidden_layers": vision_layers, "vocab_size": 32000}
    if narrow:
        for part, widths in NARROW.items():
            config[part] |= widths
    return config | {
        "architectures": ["LlavaNextForConditionalGeneration"],
        "ignore_index": -100,
        "projector_hidden_act": "gelu",
        "torch_dtype": "float16",
        "use_image_newline_parameter": True,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }


def make_processor(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """`preprocessor_config.json` and `processor_config.json`."""
    size = config["vision_config"]["image_size"]
    image_processor = {
        "aspect_ratio_setting": "anyres",
        "crop_size": {"height": size, "width": size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_grid_pinpoints": config["image_grid_pinpoints"],
        "image_mean": CLIP_MEAN,
        "image_processor_type": "LlavaNextImageProcessor",
        "image_std": CLIP_STD,
        "processor_class": "LlavaNextProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": size},
    }
    processor = {
        "image_token": IMAGE,
        "num_additional_image_tokens": 1,
        "patch_size": config["vision_config"]["patch_size"],
        "processor_class": "LlavaNextProcessor",
        "vision_feature_select_strategy": config["vision_feature_select_strategy"],
    }
    return {"preprocessor_config.json": image_processor, "processor_config.json": processor}


def write_folder(
    out: Path, tokenizer: Path, *, layers: int, vision_layers: int, narrow: bool, seed: int
) -> tuple[ModelDims, int]:
    """Writes the model folder, atomically; `tokenizer` is Mistral's SentencePiece model.

    Returns:
        The model's widths and depths, and the bytes of its weights.

    Raises:
        ConfigError: The tokenizer's file is of another model.
    """
    config = make_config(layers=layers, vision_layers=vision_layers, narrow=narrow)
    shape = ModelDims.from_config(config)
    generation = {"_from_model_config": True, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PIECES + 1}
    files: dict[str, dict[str, Any]] = {
        "config.json": config,
        "generation_config.json": generation,
        "chat_template.json": {"chat_template": read_chat_template()},
        **make_processor(config),
    }
    with atomic_folder(out) as aside:
        write_tokenizer(tokenizer, aside)
        for name, value in files.items():
            (aside / name).write_text(json.dumps(value, indent=2) + "\n")
        return shape, write_weights(config, aside, seed)
