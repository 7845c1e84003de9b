"""Random weights under the names of the hub's files, written one at a time to bound memory."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

SHARDS = 4
"""Files of the hub's folder."""
SPREAD = 0.02
"""Standard deviation of embeddings, biases and the newline."""

STORED_PARTS = {
    "language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "vision_tower.": "vision_tower.vision_model.",
}
"""Part of a model -> its name in the hub's files."""

Entry = tuple[str, tuple[int, ...]]
"""A weight's name and shape."""


def entries(config: Mapping[str, Any]) -> Iterator[Entry]:
    """Name and shape of every weight of a model, by the names that the hub's files have had since transformers 4.39."""
    with torch.device("meta"):
        model = LlavaNextForConditionalGeneration(LlavaNextConfig.from_dict(dict(config)))
    for name, weight in model.state_dict().items():
        # transformers 5 renamed these parts, some of them in a later release than others.
        stored = name.removeprefix("model.").replace("vision_tower.vision_model.", "vision_tower.")
        for part, stored_part in STORED_PARTS.items():
            if stored.startswith(part):
                stored = stored_part + stored.removeprefix(part)
                break
        yield stored, tuple(weight.shape)


def draw(name: str, shape: Sequence[int], seed: int) -> torch.Tensor:
    """A weight, float16, which depends on name and seed alone, not on the model's depth.

    Norms are near 1; matrices are scaled by 1/sqrt(fan-in).
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    drawn = torch.randn(*shape, generator=generator)
    if name.endswith("norm.weight") or ("layer_norm" in name and name.endswith("weight")) or "layrnorm.weight" in name:
        return drawn.mul_(SPREAD).add_(1).half()
    if len(shape) > 1 and "embedding" not in name and "embed_tokens" not in name:
        return drawn.mul_(shape[1] ** -0.5).half()
    return drawn.mul_(SPREAD).half()


def write_weights(config: Mapping[str, Any], folder: Path, seed: int) -> int:
    """Writes the weights, in float16, as four safetensors files with their index.

    Returns:
        Bytes of all weights.
    """
    all_entries = list(entries(config))
    total = sum(2 * math.prod(size) for _, size in all_entries)
    shards: list[list[Entry]] = [[] for _ in range(SHARDS)]
    offset = 0
    for entry in all_entries:
        shards[min(offset * SHARDS // total, SHARDS - 1)].append(entry)
        offset += 2 * math.prod(entry[1])
    index: dict[str, str] = {}
    for number, shard_entries in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{SHARDS:05d}.safetensors"
        _write_shard(folder / file, shard_entries, seed)
        index |= {name: file for name, _ in shard_entries}
    weight_index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(weight_index, indent=2) + "\n")
    return total


def _write_shard(path: Path, shard_entries: Sequence[Entry], seed: int) -> None:
    """A safetensors file: the length of a JSON header, the header, the numbers."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, size in shard_entries:
        start, end = end, end + 2 * math.prod(size)
        header[name] = {"dtype": "F16", "shape": list(size), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name, size in shard_entries:
            file.write(draw(name, size, seed).numpy().data)
