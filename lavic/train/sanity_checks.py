"""What must hold of a run, whatever it learns: looked at before the first step, at every save, and when a step fails.

The checks are collective, so that a fault that one rank sees ends all of them with the same line.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lavic.distributed.context import DistributedContext
from lavic.errors import LavicError

if TYPE_CHECKING:
    from peft import PeftModel

    from lavic.model.config import Kind
    from lavic.train.input.data_loader import Minibatch, Samples

SIDES: Mapping[str, tuple[str, ...]] = {
    "vision": (".vision_tower.", ".multi_modal_projector."),
    "language": (".language_model.",),
}
"""What each stage trains; everything else of the model is frozen in it."""

LOSS_TOLERANCE = 1e-3
"""Most that the loss of a saved model may differ from that of the trained one, nats per token."""
COMPARED = 64
"""Validation samples that a saved model is compared on, from all over the set. Weights that lost their last digits push
the losses of single tokens up and down: over few tokens that may even out, and pass for the same model."""


class Guards:
    """Checks of one task under one engine.

    A task says with an attribute `trains` which side of the model its stage trains, a key of `SIDES`; of a task without
    it the sides are not checked.
    """

    def __init__(self, task: nn.Module, trained: Mapping[str, nn.Parameter], world: DistributedContext) -> None:
        """Watches the gradients from here on.

        Args:
            task: What is trained.
            trained: Its trainable parameters by name.
            world: The ranks.
        """
        self._task, self._trained, self._world = task, dict(trained), world
        self._silent = set(self._trained)  # those without a gradient since the last check
        self._steps = self._saved = 0
        self._frozen: list[int] = []
        self._hooks = [self._watch(name, parameter) for name, parameter in self._trained.items()]

    def check_frozen(self) -> None:
        """Before DeepSpeed has the task, which gives every rank the weights of rank 0. Collective.

        Raises:
            LavicError: The ranks hold different frozen weights.
        """
        digests = self._world.all_gather_object(hashlib.sha256(repr(checksums(self._task)).encode()).hexdigest())
        different = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        if different:
            raise LavicError(
                f"rank {different[0]} holds other frozen weights than rank 0: do all machines read the same model "
                "folder?"
            )

    def check_start(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Before the first step. Collective.

        Args:
            groups: The optimizer's parameter groups.

        Raises:
            LavicError: A group is empty, the frozen side has a trainable parameter, or the side to be trained has none.
        """
        problem = _sides(self._task, self._trained)
        if not groups or not all(group["params"] for group in groups):
            problem = "the optimizer has an empty parameter group"
        self._raise_any(problem)
        self._frozen = checksums(self._task)

    def before_update(self) -> None:
        """When the gradients of a step are there; looks at them before the first update. Collective.

        Raises:
            LavicError: A trainable parameter got no gradient on some rank: it would never be trained right, and may
                leave the other ranks waiting.
        """
        if not self._steps:
            self._check_gradients()
        self._steps += 1

    def check_save(self) -> None:
        """At every save. Collective.

        Raises:
            LavicError: Since the last save a trainable parameter got no gradient on some rank, the frozen weights are
                not what they were, or the adapter has not learnt anything.
        """
        if self._steps == self._saved:
            return
        self._check_gradients()
        self._saved, self._silent = self._steps, set(self._trained)
        problem = None
        if self._frozen and checksums(self._task) != self._frozen:
            problem = "weights that should be frozen have changed"
        last = [p for name, p in self._trained.items() if "lora_B" in name]
        if last and not any(p.count_nonzero() for p in last):
            problem = f"nothing was learnt in {self._steps} steps: every LoRA B is still zero; is --loop.lr too small?"
        self._raise_any(problem)

    def close(self) -> None:
        """Watches no longer."""
        for hook in self._hooks:
            hook.remove()

    def _watch(self, name: str, parameter: nn.Parameter) -> torch.utils.hooks.RemovableHandle:
        return parameter.register_post_accumulate_grad_hook(lambda _: self._silent.discard(name))

    def _check_gradients(self) -> None:
        silent = sorted({name for names in self._world.all_gather_object(self._silent) for name in names})
        if silent:
            raise LavicError(
                f"{len(silent)} of {len(self._trained)} trainable parameters got no gradient (first: {silent[0]}): "
                "they sit on a part of the model that the loss does not reach"
            )

    def _raise_any(self, problem: str | None) -> None:
        for rank, found in enumerate(self._world.all_gather_object(problem)):
            if found:
                raise LavicError(f"rank {rank}: {found}" if self._world.size > 1 else found)


def checksums(task: nn.Module) -> list[int]:
    """A number for each frozen parameter, the sum of its bit patterns: it changes with almost any change of a weight.

    One pass over the weights where they are; of a 7B model on a GPU some milliseconds.
    """
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [
        p.detach().contiguous().view(whole[p.element_size()]).sum(dtype=torch.int64)
        for p in task.parameters()
        if not p.requires_grad and p.numel()
    ]
    return torch.stack(sums).tolist() if sums else []


def _sides(task: nn.Module, trained: Mapping[str, nn.Parameter]) -> str | None:
    """What is wrong with what a task trains."""
    side = getattr(task, "trains", None)
    if side is None:
        return None
    for name in trained:
        if "lora_" not in name or not any(part in f".{name}" for part in SIDES[side]):
            return f"{name} would be trained: this stage trains LoRA on {_parts(side)} alone"
    for part in SIDES[side]:
        if not any(part in f".{name}" for name in trained):
            return f"nothing of {part.strip('.')} would be trained: do the LoRA targets match the model?"
    return None


def _parts(side: str) -> str:
    return " and ".join(part.strip(".") for part in SIDES[side])


# --- the saved bundle -----------------------------------------------------------------------------------


def check_bundle(
    folder: Path,
    model: PeftModel,
    task: nn.Module,
    samples: Samples[Any],
    world: DistributedContext,
    *,
    vision: Path | None,
) -> None:
    """After a bundle was saved: it holds what was trained, and nothing else has changed. Collective; rank 0 looks.

    Args:
        folder: The bundle.
        model: The trained model.
        task: Its task, which says what it trains; as a bundle is loaded it must give the losses that it gives now.
        samples: What it was validated on.
        world: The ranks.
        vision: In stage 2, the folder of the vision adapter that stage 1 made; None where there is none.

    Raises:
        LavicError: The bundle is not what it should be.
    """
    problem = None
    if world.is_main:
        try:
            problem = _compare(folder, model, task, samples, vision)
        except Exception as e:  # it must not leave the other ranks waiting
            problem = f"{type(e).__name__}: {e}"
    if problem := world.broadcast_object(problem):
        raise LavicError(f"{folder}: {problem}; this is a fault of the program, do not use the bundle")


def _compare(folder: Path, model: PeftModel, task: nn.Module, samples: Samples[Any], vision: Path | None) -> str | None:
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    from lavic.model.lora import WEIGHTS

    kind: Kind = task.trains  # type: ignore[assignment]
    saved = load_file(folder / f"{kind}_adapter" / WEIGHTS)
    trained = {name: p.detach().cpu() for name, p in get_peft_model_state_dict(model).items()}
    if odd := sorted(saved.keys() ^ trained.keys()):
        return f"{len(odd)} weights are saved or trained, but not both (first: {odd[0]})"
    for name, weight in trained.items():
        if not torch.equal(saved[name].to(weight.dtype), weight):  # float32 is saved of what is bfloat16 here
            return f"{name} was not saved as it was trained"
    if not any(weight.count_nonzero() for name, weight in saved.items() if "lora_B" in name):
        return "every LoRA B is zero"
    for side, parts in SIDES.items():
        file = folder / f"{side}_adapter" / WEIGHTS
        strange = [n for n in load_file(file) if not any(p in n for p in parts)] if file.is_file() else []
        if strange:
            return f"its {side} adapter holds {strange[0]}"
    if kind == "language":
        kept = folder / "vision_adapter" / WEIGHTS
        if (vision is None) == kept.is_file() or (vision and kept.read_bytes() != (vision / WEIGHTS).read_bytes()):
            return "its vision adapter is not the one that stage 2 began with"
    return _compare_losses(folder, kind, task, samples)


@torch.no_grad()
def _compare_losses(folder: Path, kind: Kind, task: nn.Module, samples: Samples[Any]) -> str | None:
    """Loads the saved adapter as a bundle's is loaded, and compares the losses of some validation samples."""
    from lavic.model.lora import install

    loaded = _without_adapter(task)
    loaded.model = install(loaded.model, folder / f"{kind}_adapter")
    loaded.eval()
    was_training, device = task.training, next(task.parameters()).device
    task.eval()
    try:
        # evenly spaced ones first; the others only where some of these have no target
        places = dict.fromkeys([*(n * len(samples) // COMPARED for n in range(COMPARED)), *range(len(samples))])
        single = (samples.collate([samples[n]]) for n in places if n < len(samples))
        batches = islice((batch for batch in single if sum(batch.targets)), COMPARED)
        losses = [torch.stack([task(batch), loaded(batch)]) for batch in (b.to(device) for b in batches)]
    finally:
        task.train(was_training)
    if not losses:
        return None
    trained, saved = torch.cat(losses, 1).double().mean(1).tolist()  # of a target token, as in the validation
    if not abs(trained - saved) <= LOSS_TOLERANCE:
        return (
            f"as loaded its loss is {saved:.6f}, that of the model which was validated {trained:.6f}, on "
            f"{len(losses)} validation samples: it is not the same model"
        )
    return None


def _without_adapter(module: nn.Module) -> nn.Module:
    """A copy of a module tree that shares its tensors, without PEFT's layers and without hooks."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    if isinstance(module, PeftModel):
        module = module.get_base_model()
    elif isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    twin = copy.copy(module)
    for name, value in vars(module).items():
        if "_hooks" in name and isinstance(value, dict):
            vars(twin)[name] = type(value)()
    twin._compiled_call_impl = None
    vars(twin).pop("peft_config", None)
    twin._parameters, twin._buffers = dict(module._parameters), dict(module._buffers)
    twin._modules = {name: child and _without_adapter(child) for name, child in module._modules.items()}
    return twin


# --- a step that failed ---------------------------------------------------------------------------------


def blame(
    task: nn.Module, micros: Sequence[Minibatch], losses: Sequence[torch.Tensor], world: DistributedContext
) -> str:
    """The samples whose loss, or else whose gradient, is not finite, with their ranks. Collective.

    Args:
        task: Weights as they were when the step began.
        micros: This rank's micro-batches of the step.
        losses: Of each, the losses of its target tokens.
        world: The ranks.
    """
    own = [key for micro, loss in zip(micros, losses, strict=True) for key in _not_finite(micro, loss)]
    named = world.all_gather_object(own)
    if not any(named):
        # a gradient can be: of the micro-batches that give one by themselves
        trained = [p for p in task.parameters() if p.requires_grad]
        device = trained[0].device
        for micro in micros:
            gradients = torch.autograd.grad(task(micro.to(device)).sum(), trained, allow_unused=True)
            if not all(g.isfinite().all() for g in gradients if g is not None):
                own += micro.keys
        named = world.all_gather_object(own)
    if not any(named):  # they only fail together
        named = world.all_gather_object([key for micro in micros for key in micro.keys])
    said = [f"{_some(keys)} on rank {rank}" for rank, keys in enumerate(named) if keys]
    return "; ".join(said[:4]) + (f"; and {len(said) - 4} more ranks" if len(said) > 4 else "")


def _not_finite(micro: Minibatch, losses: torch.Tensor) -> list[str]:
    parts = losses.split(list(micro.targets))
    return [key for key, part in zip(micro.keys, parts, strict=True) if not part.isfinite().all()]


def _some(keys: Sequence[str]) -> str:
    return ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
