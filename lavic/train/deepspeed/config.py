"""The DeepSpeed configuration for ZeRO-2, and what ZeRO-2 costs in memory, traffic and disk."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lavic.errors import ConfigError
from lavic.storage.json_text import BadJson, parse_json
from lavic.storage.text_files import TextFileError, read_text

BUCKET_SIZE = 50_000_000
"""Elements that are reduced, or gathered, at once."""
FP32 = 4
"""Bytes of an element of the master weights and of Adam's moments, for any dtype of the model."""

MANAGED_KEYS = {
    "train_batch_size": "loop.global_batch_size",
    "train_micro_batch_size_per_gpu": "loop.micro_batch",
    "gradient_accumulation_steps": "loop.global_batch_size and loop.micro_batch",
    "gradient_clipping": "loop.max_grad_norm",
    "optimizer": "loop.lr and loop.weight_decay",
    "scheduler": "loop.schedule and loop.warmup",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "data_types": "model.dtype",
    "communication_data_type": "model.dtype",
    "torch_autocast": "model.dtype",
}
"""Keys refused in a user's DeepSpeed JSON, and the lavic settings that they are set from."""


@dataclass(frozen=True, kw_only=True)
class Zero2Footprint:
    """What ZeRO-2 holds on one rank, sends in a step and saves, in bytes; without activations."""

    weights: int
    """The frozen base model and the adapter, complete on every rank."""
    gradients: int
    """The gradients themselves, the bucket that they are reduced through (always of full size), the copies that are
    summed, and this rank's part of the sum."""
    optimizer: int
    """This rank's part of the master weights and of Adam's two moments."""
    traffic: int
    """Sent by each rank in a step: gradients all-reduced after each micro-step, weights gathered once."""
    checkpoint: int
    """Master weights and moments of all ranks."""

    @classmethod
    def of(cls, *, frozen: int, trained: int, ranks: int, element: int = 2, micro_steps: int = 1) -> Zero2Footprint:
        """Computes the bytes.

        Args:
            frozen: Parameters of the base model.
            trained: Parameters of the adapter.
            element: Bytes of a weight and of its gradient.
        """
        part = -(-trained // ranks)
        # A bucket is flattened once more to be summed, and gradients of another dtype are copied to float32.
        copies = element + (FP32 if element != FP32 else 0)
        return cls(
            weights=element * (frozen + trained),
            gradients=element * (trained + BUCKET_SIZE) + copies * min(trained, BUCKET_SIZE) + FP32 * part,
            optimizer=3 * FP32 * part,
            # A ring reduce-scatter or all-gather sends (n - 1) / n of all elements. DeepSpeed reduces by all-reduce,
            # which is two of these; the all-gather of the weights is a third.
            traffic=(2 * FP32 * micro_steps + element) * trained * (ranks - 1) // ranks,
            checkpoint=3 * FP32 * trained,
        )

    @property
    def memory(self) -> int:
        """Total on one rank."""
        return self.weights + self.gradients + self.optimizer


def zero2_config(
    *, micro_batch: int, accumulation: int, clip: float, bf16: bool, extra: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The DeepSpeed configuration of a run.

    One bucket holds every LoRA gradient of a 7B model, so there is nothing to overlap, and `overlap_comm` has caused
    wrong gradients in several DeepSpeed releases. By default DeepSpeed accumulates and reduces the gradients of a
    bfloat16 model in bfloat16; here in float32.

    Args:
        micro_batch: Samples of one forward pass on one rank.
        accumulation: Micro-steps per optimizer step.
        clip: Largest gradient norm, 0 for no clipping.
        bf16: Train in bfloat16 with float32 master weights and sums of gradients; else float32.
        extra: More keys, from a user's JSON; `zero_optimization` is merged key by key.

    Raises:
        ConfigError: See `check_user_config`.
    """
    extra = dict(extra or {})
    check_user_config(extra)
    zero = {
        "stage": 2,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": BUCKET_SIZE,
        "allgather_bucket_size": BUCKET_SIZE,
        **extra.pop("zero_optimization", {}),
    }
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip,
        "zero_optimization": zero,
        "steps_per_print": sys.maxsize,
        **extra,
    }
    if bf16:
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        config["communication_data_type"] = "fp32"
    return config


def check_user_config(extra: Mapping[str, Any]) -> None:
    """Refuses DeepSpeed settings that contradict lavic's own.

    Raises:
        ConfigError: A key of `MANAGED_KEYS`, a ZeRO stage other than 2, or offloading.
    """
    for key, setting in MANAGED_KEYS.items():
        if key in extra:
            raise ConfigError(f"the DeepSpeed JSON sets {key}: remove it and use {setting}")
    zero = extra.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        raise ConfigError(f"the DeepSpeed JSON sets zero_optimization to {zero!r}: an object is expected")
    if zero.get("stage", 2) != 2:
        raise ConfigError(f"the DeepSpeed JSON asks for ZeRO stage {zero['stage']!r}: only stage 2 is supported")
    for key in ("offload_optimizer", "offload_param"):
        if key in zero and zero[key] not in (None, {}, {"device": "none"}):
            raise ConfigError(
                f"the DeepSpeed JSON sets zero_optimization.{key}: remove it; LoRA's optimizer state is small "
                "(--dry-run prints its size), and the frozen weights stay on the GPU"
            )


def read_deepspeed_config(file: Path | None) -> dict[str, Any]:
    """A user's DeepSpeed settings, checked; empty without a file.

    Raises:
        ConfigError: There is no such file, it holds something else, or what `check_user_config` refuses.
    """
    if file is None:
        return {}
    try:
        values = parse_json(read_text(file))
    except TextFileError as error:
        raise ConfigError(f"--deepspeed {error}") from None
    except BadJson as error:
        raise ConfigError(f"--deepspeed {file}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"--deepspeed {file}: not a JSON object")
    try:
        check_user_config(values)
    except ConfigError as error:
        raise ConfigError(f"--deepspeed {file}: {error}") from None
    return values
