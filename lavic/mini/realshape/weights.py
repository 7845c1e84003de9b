"""Random weights under the names of the hub's files, written one at a time to bound memory."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from lavic.model.dims import ModelDims

SHARDS = 4
"""Files of the hub's folder."""
SPREAD = 0.02
"""Standard deviation of embeddings, biases and the newline."""

Entry = tuple[str, tuple[int, ...]]
"""A weight's name and shape."""


def entries(shape: ModelDims) -> Iterator[Entry]:
    """Name and shape of every weight, by the names that the hub's files have had since transformers 4.39."""
    yield "image_newline", (shape.hidden,)
    for number, inputs in ((1, shape.vision_hidden), (2, shape.hidden)):
        yield from _linear(f"multi_modal_projector.linear_{number}", inputs, shape.hidden, bias=True)
    yield from _tower(shape)
    yield from _language(shape)


def _tower(shape: ModelDims) -> Iterator[Entry]:
    width, start = shape.vision_hidden, "vision_tower.vision_model"
    side = math.isqrt(shape.patch_numbers // 3)
    yield f"{start}.embeddings.class_embedding", (width,)
    yield f"{start}.embeddings.patch_embedding.weight", (width, 3, side, side)
    yield f"{start}.embeddings.position_embedding.weight", (shape.patches + 1, width)
    for norm in ("pre_layrnorm", "post_layernorm"):
        yield from _norm(f"{start}.{norm}", width, bias=True)
    for layer in range(shape.vision_layers):
        name = f"{start}.encoder.layers.{layer}"
        for norm in ("layer_norm1", "layer_norm2"):
            yield from _norm(f"{name}.{norm}", width, bias=True)
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _linear(f"{name}.self_attn.{part}", width, width, bias=True)
        yield from _linear(f"{name}.mlp.fc1", width, shape.vision_mlp, bias=True)
        yield from _linear(f"{name}.mlp.fc2", shape.vision_mlp, width, bias=True)


def _language(shape: ModelDims) -> Iterator[Entry]:
    width, start = shape.hidden, "language_model.model"
    queries, keys = shape.heads * shape.head, shape.kv_heads * shape.head
    yield f"{start}.embed_tokens.weight", (shape.vocabulary, width)
    for layer in range(shape.layers):
        name = f"{start}.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield from _norm(f"{name}.{norm}", width, bias=False)
        for part, outputs in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            yield from _linear(f"{name}.self_attn.{part}", width, outputs)
        yield from _linear(f"{name}.self_attn.o_proj", queries, width)
        for part in ("gate_proj", "up_proj"):
            yield from _linear(f"{name}.mlp.{part}", width, shape.mlp)
        yield from _linear(f"{name}.mlp.down_proj", shape.mlp, width)
    yield from _norm(f"{start}.norm", width, bias=False)
    yield from _linear("language_model.lm_head", width, shape.vocabulary)


def _linear(name: str, inputs: int, outputs: int, *, bias: bool = False) -> Iterator[Entry]:
    yield f"{name}.weight", (outputs, inputs)
    if bias:
        yield f"{name}.bias", (outputs,)


def _norm(name: str, width: int, *, bias: bool) -> Iterator[Entry]:
    yield f"{name}.weight", (width,)
    if bias:
        yield f"{name}.bias", (width,)


def draw(name: str, shape: Sequence[int], seed: int) -> torch.Tensor:
    """A weight, float16: of a name and a seed always the same, whatever the model's depth.

    Norms are near 1, matrices of the scale that keeps a signal's.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    drawn = torch.randn(*shape, generator=generator)
    if name.endswith("norm.weight") or ("layer_norm" in name and name.endswith("weight")) or "layrnorm.weight" in name:
        return drawn.mul_(SPREAD).add_(1).half()
    if len(shape) > 1 and "embedding" not in name and "embed_tokens" not in name:
        return drawn.mul_(shape[1] ** -0.5).half()
    return drawn.mul_(SPREAD).half()


def write_weights(shape: ModelDims, folder: Path, seed: int) -> int:
    """Writes the weights, in float16, as four safetensors files with their index.

    Returns:
        Bytes of all weights.
    """
    every = list(entries(shape))
    total = sum(2 * math.prod(size) for _, size in every)
    shards: list[list[Entry]] = [[] for _ in range(SHARDS)]
    before = 0
    for entry in every:
        shards[min(before * SHARDS // total, SHARDS - 1)].append(entry)
        before += 2 * math.prod(entry[1])
    index: dict[str, str] = {}
    for number, listed in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{SHARDS:05d}.safetensors"
        _write_shard(folder / file, listed, seed)
        index |= {name: file for name, _ in listed}
    written = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(written, indent=2) + "\n")
    return total


def _write_shard(path: Path, listed: Sequence[Entry], seed: int) -> None:
    """A safetensors file: the length of a JSON header, the header, the numbers."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, size in listed:
        start, end = end, end + 2 * math.prod(size)
        header[name] = {"dtype": "F16", "shape": list(size), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name, size in listed:
            file.write(draw(name, size, seed).numpy().data)
