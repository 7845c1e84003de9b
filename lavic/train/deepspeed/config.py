"""ZeRO-2 on paper: how DeepSpeed is told to split gradients and optimizer state, and what each rank then has."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lavic.errors import ConfigError
from lavic.storage.json_text import BadJson, parse_json
from lavic.storage.text_files import TextFileError, read_text

BUCKET = 50_000_000
"""Numbers that are reduced, or gathered, at once."""
FP32 = 4
"""Bytes of a number of the master weights and of Adam's moments, whatever the model has."""

OURS = {
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
}
"""Keys of a DeepSpeed JSON that would say a second time what our own settings say, and the setting that says it."""


@dataclass(frozen=True, kw_only=True)
class Zero2:
    """What ZeRO-2 holds on one rank, sends in a step and saves, in bytes; activations aside."""

    weights: int
    """Of the frozen base model and the adapter, whole on every rank."""
    gradients: int
    """All as they are made, the bucket they pass through (DeepSpeed makes it whole), the copies that are summed, this
    rank's part of the sum."""
    optimizer: int
    """This rank's part of the master weights and of Adam's two moments."""
    traffic: int
    """Sent by each rank in a step: gradients all-reduced after each micro step, weights gathered once."""
    checkpoint: int
    """Master weights and moments of all ranks."""

    @classmethod
    def of(cls, *, frozen: int, trained: int, ranks: int, element: int = 2, micro_steps: int = 1) -> Zero2:
        """Counts.

        Args:
            frozen: Numbers of the base model.
            trained: Numbers of the adapter.
            ranks: Processes that share gradients and optimizer state.
            element: Bytes of a weight and of its gradient.
            micro_steps: Of a step.
        """
        part = -(-trained // ranks)
        # a bucket is flattened once more to be summed, and a float32 copy made of gradients that are not
        copies = element + (FP32 if element != FP32 else 0)
        return cls(
            weights=element * (frozen + trained),
            gradients=element * (trained + BUCKET) + copies * min(trained, BUCKET) + FP32 * part,
            optimizer=3 * FP32 * part,
            # A ring moves (n - 1) / n of all numbers once for each rank to have its part of the sums or of the new
            # weights. DeepSpeed sums by all-reduce, which is two such rounds; the weights take a third.
            traffic=(2 * FP32 * micro_steps + element) * trained * (ranks - 1) // ranks,
            checkpoint=3 * FP32 * trained,
        )

    @property
    def memory(self) -> int:
        """In all, on one rank."""
        return self.weights + self.gradients + self.optimizer


def zero2_config(
    *, micro_batch: int, accumulation: int, clip: float, bf16: bool, extra: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The DeepSpeed configuration of a run.

    One bucket holds every LoRA gradient of a 7B model, so there is nothing to overlap, and overlapping has been the
    source of wrong gradients in several DeepSpeed releases.

    Of a bfloat16 model, DeepSpeed adds up the gradients of micro steps and ranks in bfloat16 unless it is told not to.

    Args:
        micro_batch: Samples of one forward pass on one rank.
        accumulation: Micro steps per optimizer step.
        clip: Largest gradient norm, 0 for no clipping.
        bf16: Train in bfloat16 with float32 master weights and sums of gradients; else float32.
        extra: More keys, from a user's JSON; `zero_optimization` is merged key by key.

    Raises:
        ConfigError: See `check_extra`.
    """
    extra = dict(extra or {})
    check_extra(extra)
    zero = {
        "stage": 2,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
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


def check_extra(extra: Mapping[str, Any]) -> None:
    """Refuses DeepSpeed settings that are at odds with ours.

    Raises:
        ConfigError: A key of `OURS`, a ZeRO stage other than 2, or offloading.
    """
    for key, ours in OURS.items():
        if key in extra:
            raise ConfigError(f"the DeepSpeed JSON sets {key}: remove it, {ours} says it already")
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


def read_json(file: Path | None) -> dict[str, Any]:
    """A user's DeepSpeed settings, checked; none without a file.

    Raises:
        ConfigError: There is no such file, it holds something else, or what `check_extra` refuses.
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
        check_extra(values)
    except ConfigError as error:
        raise ConfigError(f"--deepspeed {file}: {error}") from None
    return values
