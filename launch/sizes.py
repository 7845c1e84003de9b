"""How many numbers a base model, an adapter and an item's tokens have, and what they weigh: from a model's shape alone.

Nothing is loaded, so that a dry run on a login node can tell; the tests compare with models that are.
"""

from __future__ import annotations

import importlib.resources
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Kind = Literal["vision", "language"]

VIEWS = 5
BF16, FP32 = 2, 4
"""Bytes of a number."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A LLaVA-NeXT's widths and depths."""

    hidden: int
    layers: int
    mlp: int
    heads: int
    kv_heads: int
    head: int
    """Width of one attention head."""
    vocabulary: int
    vision_hidden: int
    vision_layers: int
    vision_mlp: int
    patches: int
    """Of one view; its tokens are one more, the [CLS]."""
    patch_numbers: int
    """Numbers of one patch: channels x height x width."""

    @classmethod
    def of(cls, config: dict[str, Any]) -> Shape:
        """Reads a model's config.json."""
        text, vision = config["text_config"], config["vision_config"]
        heads = text["num_attention_heads"]
        patch = vision["patch_size"]
        return cls(
            hidden=text["hidden_size"],
            layers=text["num_hidden_layers"],
            mlp=text["intermediate_size"],
            heads=heads,
            kv_heads=text.get("num_key_value_heads") or heads,
            head=text.get("head_dim") or text["hidden_size"] // heads,
            vocabulary=text["vocab_size"],
            vision_hidden=vision["hidden_size"],
            vision_layers=vision["num_hidden_layers"],
            vision_mlp=vision["intermediate_size"],
            patches=(vision["image_size"] // patch) ** 2,
            patch_numbers=vision.get("num_channels", 3) * patch**2,
        )

    @property
    def photo_tokens(self) -> int:
        """Tokens of a photo before it is distilled: every patch and the [CLS] of five views."""
        return VIEWS * (self.patches + 1)

    @property
    def _language_linears(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of the linears of one language layer."""
        d, kv = self.heads * self.head, self.kv_heads * self.head
        attention = [(self.hidden, d), (self.hidden, kv), (self.hidden, kv), (d, self.hidden)]
        return [*attention, (self.hidden, self.mlp), (self.hidden, self.mlp), (self.mlp, self.hidden)]

    @property
    def _vision_linears(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of the linears of one vision layer."""
        v = self.vision_hidden
        return [(v, v)] * 4 + [(v, self.vision_mlp), (self.vision_mlp, v)]

    @property
    def _projector(self) -> list[tuple[int, int]]:
        return [(self.vision_hidden, self.hidden), (self.hidden, self.hidden)]

    @property
    def language_parameters(self) -> int:
        """Of the language model with its embeddings and head."""
        layer = sum(i * o for i, o in self._language_linears) + 2 * self.hidden
        return self.layers * layer + 2 * self.vocabulary * self.hidden + self.hidden

    @property
    def vision_parameters(self) -> int:
        """Of vision tower and projector."""
        v = self.vision_hidden
        layer = sum(i * o + o for i, o in self._vision_linears) + 4 * v
        tower = self.vision_layers * layer + self.patch_numbers * v + (self.patches + 1) * v + v + 4 * v
        # and the vector that LLaVA-NeXT puts at the end of a row of patches
        return tower + sum(i * o + o for i, o in self._projector) + self.hidden

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return self.language_parameters + self.vision_parameters

    def adapter(self, kind: Kind, r: int) -> int:
        """Numbers of a LoRA adapter of rank r: r x (inputs + outputs) for each linear that it is put on."""
        if kind == "language":
            return r * self.layers * sum(i + o for i, o in self._language_linears)
        vision = self.vision_layers * sum(i + o for i, o in self._vision_linears)
        return r * (vision + sum(i + o for i, o in self._projector))

    def store_bytes(self, items: int, width: int = BF16) -> int:
        """Of an item store's vectors: five of the vision tower's width for each item."""
        return items * VIEWS * self.vision_hidden * width


SHAPES = {
    "llava-hf/llava-v1.6-mistral-7b-hf": Shape(
        hidden=4096,
        layers=32,
        mlp=14336,
        heads=32,
        kv_heads=8,
        head=128,
        vocabulary=32064,
        vision_hidden=1024,
        vision_layers=24,
        vision_mlp=4096,
        patches=576,
        patch_numbers=3 * 14 * 14,
    )
}
"""Of models whose config.json need not be fetched to know them."""


def shape_of(name: str) -> Shape | None:
    """The shape of a model as settings name it: `mini`, a folder, or a well-known one; None where that is not known."""
    if name in SHAPES:
        return SHAPES[name]
    if name == "mini":
        file = importlib.resources.files("lavic.mini").joinpath("base", "config.json")
        return Shape.of(json.loads(file.read_text("utf-8")))
    path = Path(name) / "config.json"
    return Shape.of(json.loads(path.read_text("utf-8"))) if path.is_file() else None


@dataclass(frozen=True)
class Zero2:
    """What ZeRO-2 holds on one rank and sends per optimizer step, in bytes, activations aside."""

    weights: int
    """Of the frozen base model and the adapter, whole on every rank."""
    gradients: int
    """This rank's part, and the bucket they pass through."""
    optimizer: int
    """This rank's part of float32 master weights and Adam's two moments."""
    traffic: int
    """Sent by each rank in a step: gradients scattered, weights gathered."""

    @property
    def memory(self) -> int:
        """In all."""
        return self.weights + self.gradients + self.optimizer

    @classmethod
    def of(cls, frozen: int, trained: int, ranks: int, *, width: int = BF16, bucket: int = 50_000_000) -> Zero2:
        """Counts.

        Args:
            frozen: Numbers of the base model.
            trained: Numbers of the adapter.
            ranks: Processes that share gradients and optimizer state.
            width: Bytes of a weight and of its gradient.
            bucket: Numbers that are reduced at once.
        """
        part = -(-trained // ranks)
        return cls(
            weights=(frozen + trained) * width,
            gradients=(part + min(bucket, trained)) * width,
            optimizer=part * 3 * FP32,
            # a ring moves (n - 1) / n of all numbers twice: once to scatter the sums, once to gather the new weights
            traffic=2 * width * trained * (ranks - 1) // ranks,
        )


def checkpoint_bytes(trained: int) -> int:
    """Of a checkpoint: weights and two moments, float32."""
    return trained * 3 * FP32
