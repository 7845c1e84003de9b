"""Dimensions of a LLaVA-NeXT model: parameter, linear-layer and token counts, computed from its config.json.

Needs no weights and no torch, so a login node can plan a run. The tests compare the counts with real models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lavic.errors import ConfigError
from lavic.model.config import Kind, ModelSettings
from lavic.model.hub import read_config
from lavic.model.tiling import VIEWS
from lavic.storage import format_bytes

TOWER, PROJECTOR, LANGUAGE, HEAD = range(4)
"""The parts of a model with linear layers, in forward order."""

ADAPTED: Mapping[Kind, tuple[int, ...]] = {"vision": (TOWER, PROJECTOR), "language": (LANGUAGE,)}
"""The parts whose linear layers an adapter of each kind targets, as in `lavic.model.lora`."""

CONFIG_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "clip_vision_model": {
        "hidden_size": 768,
        "image_size": 224,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "num_channels": 3,
        "num_hidden_layers": 12,
        "patch_size": 32,
    },
    "llama": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "vocab_size": 32000,
    },
    "mistral": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
    },
    "qwen2": {
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "vocab_size": 151936,
    },
}
"""Defaults of transformers for keys that a config.json may omit, by model type."""

LayerPosition = tuple[int, int, int]
"""(part, layer, stage within the layer), ordered as in the forward pass."""


@dataclass(frozen=True)
class Linear:
    """A linear layer of the model."""

    name: str
    position: LayerPosition
    inputs: int
    outputs: int
    bias: bool = False

    @property
    def parameters(self) -> int:
        """Number of parameters, bias included."""
        return self.inputs * self.outputs + self.bias * self.outputs


@dataclass(frozen=True, kw_only=True)
class ModelDims:
    """Widths and depths of a LLaVA-NeXT model."""

    hidden: int
    layers: int
    mlp: int
    heads: int
    kv_heads: int
    head: int
    """Width of one attention head."""
    biased: bool
    """Whether query, key and value have a bias."""
    vocabulary: int
    tied: bool
    """Whether `lm_head` shares its weight with the word embeddings."""
    vision_hidden: int
    vision_layers: int
    vision_mlp: int
    vision_heads: int
    patches: int
    """Patches of one view; the vision tower adds the [CLS] token."""
    patch_numbers: int
    """Input values of one patch: channels x height x width."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelDims:
        """Dimensions from a config.json, or from a complete transformers config as a dict.

        Raises:
            ConfigError: A key is missing that has no known default.
        """
        text, vision = (
            with_config_defaults(config, "text_config", "llama"),
            with_config_defaults(config, "vision_config", "clip_vision_model"),
        )
        try:
            heads, patch = text["num_attention_heads"], vision["patch_size"]
            return cls(
                hidden=text["hidden_size"],
                layers=text["num_hidden_layers"],
                mlp=text["intermediate_size"],
                heads=heads,
                kv_heads=text.get("num_key_value_heads") or heads,
                head=text.get("head_dim") or text["hidden_size"] // heads,
                biased=text["model_type"] == "qwen2",
                vocabulary=text["vocab_size"],
                tied=bool(config.get("tie_word_embeddings", False)),
                vision_hidden=vision["hidden_size"],
                vision_layers=vision["num_hidden_layers"],
                vision_mlp=vision["intermediate_size"],
                vision_heads=vision["num_attention_heads"],
                patches=(vision["image_size"] // patch) ** 2,
                patch_numbers=vision["num_channels"] * patch**2,
            )
        except KeyError as error:
            raise ConfigError(
                f"config.json of the base model: no {error} for {text['model_type']} and {vision['model_type']}: write "
                "it with `AutoConfig.from_pretrained(MODEL).save_pretrained(FOLDER)`, which leaves nothing out"
            ) from None

    @property
    def tower_tokens(self) -> int:
        """Tokens of a photo in the vision tower: every patch and the [CLS] of five views."""
        return VIEWS * (self.patches + 1)

    @property
    def photo_tokens(self) -> int:
        """Tokens of a square photo in the language model before distillation: every patch of five views, and a newline
        after each row of the four quarters."""
        return VIEWS * self.patches + 2 * math.isqrt(self.patches)

    def linears(self) -> Iterator[Linear]:
        """Every linear layer, in forward order."""
        v, h, d, kv = self.vision_hidden, self.hidden, self.heads * self.head, self.kv_heads * self.head
        for layer in range(self.vision_layers):
            for name in ("q_proj", "k_proj", "v_proj"):
                yield Linear(name, (TOWER, layer, 0), v, v, bias=True)
            yield Linear("out_proj", (TOWER, layer, 1), v, v, bias=True)
            yield Linear("fc1", (TOWER, layer, 2), v, self.vision_mlp, bias=True)
            yield Linear("fc2", (TOWER, layer, 3), self.vision_mlp, v, bias=True)
        yield Linear("linear_1", (PROJECTOR, 0, 0), v, h, bias=True)
        yield Linear("linear_2", (PROJECTOR, 0, 1), h, h, bias=True)
        for layer in range(self.layers):
            for name, outputs in (("q_proj", d), ("k_proj", kv), ("v_proj", kv)):
                yield Linear(name, (LANGUAGE, layer, 0), h, outputs, bias=self.biased)
            yield Linear("o_proj", (LANGUAGE, layer, 1), d, h)
            yield Linear("gate_proj", (LANGUAGE, layer, 2), h, self.mlp)
            yield Linear("up_proj", (LANGUAGE, layer, 2), h, self.mlp)
            yield Linear("down_proj", (LANGUAGE, layer, 3), self.mlp, h)
        yield Linear("lm_head", (HEAD, 0, 0), h, self.vocabulary)

    @property
    def tower(self) -> int:
        """Parameters of the vision tower."""
        v = self.vision_hidden
        embeddings = self.patch_numbers * v + (self.patches + 1) * v + v
        norms = (4 * self.vision_layers + 4) * v
        return self._linear((TOWER,)) + embeddings + norms

    @property
    def projector(self) -> int:
        """Parameters of the projector, and of LLaVA-NeXT's newline vector at the end of a row of patches."""
        return self._linear((PROJECTOR,)) + self.hidden

    @property
    def language(self) -> int:
        """Parameters of the language model with its embeddings and head."""
        norms = (2 * self.layers + 1) * self.hidden
        embeddings = self.vocabulary * self.hidden
        return self._linear((LANGUAGE,) if self.tied else (LANGUAGE, HEAD)) + embeddings + norms

    @property
    def parameters(self) -> int:
        """Parameters of the model."""
        return self.tower + self.projector + self.language

    def loaded(self, kind: Kind) -> int:
        """Parameters that a stage loads to train an adapter of this kind; stage 2 loads no vision tower."""
        return self.parameters - (self.tower if kind == "language" else 0)

    def adapter(self, kind: Kind, r: int) -> int:
        """Parameters of a LoRA adapter of rank r: r x (inputs + outputs) for each linear layer that it targets."""
        adapted = (linear for linear in self.linears() if linear.position[0] in ADAPTED[kind])
        return r * sum(linear.inputs + linear.outputs for linear in adapted)

    def store_bytes(self, items: int, element: int = 2) -> int:
        """Bytes of an item store's vectors: five per item, each of the vision tower's width."""
        return items * VIEWS * self.vision_hidden * element

    def _linear(self, parts: Iterable[int]) -> int:
        return sum(linear.parameters for linear in self.linears() if linear.position[0] in parts)


def with_config_defaults(config: Mapping[str, Any], name: str, usual: str) -> Mapping[str, Any]:
    """One section of a configuration, with the defaults of transformers for missing keys."""
    part = config.get(name) or {}
    kind = part.get("model_type", usual)
    return {**CONFIG_DEFAULTS.get(kind, {}), **part, "model_type": kind}


def known_dims(model: ModelSettings) -> ModelDims | None:
    """The dimensions of a base model; None if its config.json has not been downloaded yet."""
    try:
        return ModelDims.from_config(read_config(model))
    except ConfigError:
        return None


def weights_estimate(model: ModelSettings, parameters: Callable[[ModelDims], int]) -> str:
    """A line on the memory of each rank; empty if the model is not known yet.

    Args:
        model: The base model. Its dtype `auto` counts as bfloat16, 2 bytes a parameter.
        parameters: How many of them a rank loads.
    """
    shape = known_dims(model)
    if shape is None:
        return ""
    size = parameters(shape) * (4 if model.dtype == "float32" else 2)
    return f"memory of a rank: {format_bytes(size)} of weights, and its batch"
