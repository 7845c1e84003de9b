"""Checks a saved bundle against the model in memory."""

from __future__ import annotations

import copy
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from lavic.distributed.context import DistributedContext
from lavic.errors import LavicError
from lavic.train.sanity_checks import TRAINED_PARTS

if TYPE_CHECKING:
    from peft import PeftModel

    from lavic.model.config import Kind
    from lavic.train.input.data_loader import TaskDataset

LOSS_TOLERANCE = 1e-3
"""Largest difference between the losses of the saved and the trained model, nats per token."""
COMPARED_SAMPLES = 64
"""Validation samples for these losses, spread over the set. Rounded weights change the losses of single tokens in both
directions, which may cancel over few tokens."""


def check_bundle(
    folder: Path,
    model: PeftModel,
    task: nn.Module,
    samples: TaskDataset,
    world: DistributedContext,
    *,
    vision: Path | None,
) -> None:
    """Checks a saved bundle: it has the trained weights, and nothing else has changed. Collective; rank 0 checks.

    Args:
        task: Its task; the loaded bundle must give the same losses.
        vision: In stage 2, the folder of stage 1's vision adapter, if any.

    Raises:
        LavicError: The bundle differs from the model.
    """
    problem = None
    if world.is_main:
        try:
            problem = _compare(folder, model, task, samples, vision)
        except Exception as e:  # the other ranks wait for the broadcast
            problem = f"{type(e).__name__}: {e}"
    if problem := world.broadcast_object(problem):
        raise LavicError(f"{folder}: {problem}; this is a bug in lavic, do not use the bundle")


def _compare(folder: Path, model: PeftModel, task: nn.Module, samples: TaskDataset, vision: Path | None) -> str | None:
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    from lavic.model.lora import WEIGHTS

    kind: Kind = task.trains  # type: ignore[assignment]
    saved = load_file(folder / f"{kind}_adapter" / WEIGHTS)
    trained = {name: p.detach().cpu() for name, p in get_peft_model_state_dict(model).items()}
    if unmatched := sorted(saved.keys() ^ trained.keys()):
        return f"{len(unmatched)} weights are saved or trained, but not both (first: {unmatched[0]})"
    for name, weight in trained.items():
        if not torch.equal(saved[name].to(weight.dtype), weight):  # saved in float32, trained in bfloat16
            return f"{name} differs from the trained weight"
    if not any(weight.count_nonzero() for name, weight in saved.items() if "lora_B" in name):
        return "every LoRA B is zero"
    for name, parts in TRAINED_PARTS.items():
        file = folder / f"{name}_adapter" / WEIGHTS
        foreign = [n for n in load_file(file) if not any(p in n for p in parts)] if file.is_file() else []
        if foreign:
            return f"its {name} adapter has the foreign weight {foreign[0]}"
    if kind == "language":
        copied = folder / "vision_adapter" / WEIGHTS
        if (vision is None) == copied.is_file() or (vision and copied.read_bytes() != (vision / WEIGHTS).read_bytes()):
            return "its vision adapter differs from that of stage 1"
    return _compare_losses(folder, kind, task, samples)


@torch.no_grad()
def _compare_losses(folder: Path, kind: Kind, task: nn.Module, samples: TaskDataset) -> str | None:
    """Loads the saved adapter and compares the losses on validation samples."""
    from lavic.model.lora import install

    loaded = _without_adapter(task)
    loaded.model = install(loaded.model, folder / f"{kind}_adapter")
    loaded.eval()
    was_training, device = task.training, next(task.parameters()).device
    task.eval()
    try:
        # Evenly spaced ones first; others only if some of these have no target.
        spaced = (n * len(samples) // COMPARED_SAMPLES for n in range(COMPARED_SAMPLES))
        positions = dict.fromkeys([*spaced, *range(len(samples))])
        single = (samples.collate([samples[n]]) for n in positions if n < len(samples))
        batches = islice((batch for batch in single if sum(batch.targets)), COMPARED_SAMPLES)
        losses = [torch.stack([task(batch), loaded(batch)]) for batch in (b.to(device) for b in batches)]
    finally:
        task.train(was_training)
    if not losses:
        return None
    trained, saved = torch.cat(losses, 1).double().mean(1).tolist()  # per target token, as in the validation
    if not abs(trained - saved) <= LOSS_TOLERANCE:
        return (
            f"its loss on {len(losses)} validation samples is {saved:.6f}, that of the trained model {trained:.6f}: "
            "it is not the same model"
        )
    return None


def _without_adapter(module: nn.Module) -> nn.Module:
    """A copy of a module tree that shares its tensors, without PEFT layers and without hooks."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    if isinstance(module, PeftModel):
        module = module.get_base_model()
    elif isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    clone = copy.copy(module)
    for name, value in vars(module).items():
        if "_hooks" in name and isinstance(value, dict):
            vars(clone)[name] = type(value)()
    clone._compiled_call_impl = None
    vars(clone).pop("peft_config", None)
    clone._parameters, clone._buffers = dict(module._parameters), dict(module._buffers)
    clone._modules = {name: child and _without_adapter(child) for name, child in module._modules.items()}
    return clone
