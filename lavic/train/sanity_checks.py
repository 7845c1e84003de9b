"""Invariants of a run, checked before the first step, at the first update and at every save.

The checks are collective: a problem on one rank ends all ranks with the same message.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lavic.distributed.context import DistributedContext
from lavic.errors import LavicError

TRAINED_PARTS: Mapping[str, tuple[str, ...]] = {
    "vision": (".vision_tower.", ".multi_modal_projector."),
    "language": (".language_model.",),
}
"""Parts of the model that each kind of adapter trains; everything else is frozen."""


class SanityChecks:
    """Checks a task and its engine.

    A task's attribute `trains` is the kind of adapter that it trains, a key of `TRAINED_PARTS`; without it, the parts
    are not checked.
    """

    def __init__(self, task: nn.Module, trained: Mapping[str, nn.Parameter], world: DistributedContext) -> None:
        self._task, self._trained, self._world = task, dict(trained), world
        self._without_gradient = set(self._trained)
        """Parameters without a gradient since the last check."""
        self._steps = self._saved_step = 0
        self._frozen_checksums: list[int] = []
        self._hooks = [self._watch(name, parameter) for name, parameter in self._trained.items()]

    def check_frozen(self) -> None:
        """Before DeepSpeed broadcasts the weights of rank 0. Collective.

        Raises:
            LavicError: The ranks have different frozen weights.
        """
        digests = self._world.all_gather_object(
            hashlib.sha256(repr(parameter_checksums(self._task)).encode()).hexdigest()
        )
        different = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        if different:
            raise LavicError(
                f"rank {different[0]} has other frozen weights than rank 0: do all machines read the same model folder?"
            )

    def check_start(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Before the first step. Collective.

        Raises:
            LavicError: A group is empty, a frozen part has a trainable parameter, or a part to be trained has none.
        """
        problem = _find_misplaced(self._task, self._trained)
        if not groups or not all(group["params"] for group in groups):
            problem = "the optimizer has an empty parameter group"
        self._raise_on_all_ranks(problem)
        self._frozen_checksums = parameter_checksums(self._task)

    def before_update(self) -> None:
        """Before an update; before the first one, checks that every parameter has a gradient. Collective.

        Raises:
            LavicError: A trainable parameter got no gradient on some rank, so that other ranks may hang.
        """
        if not self._steps:
            self._check_gradients()
        self._steps += 1

    def check_save(self) -> None:
        """At every save. Collective.

        Raises:
            LavicError: Since the last save a trainable parameter got no gradient on some rank or the frozen weights
                changed, or every LoRA B is still zero.
        """
        if self._steps == self._saved_step:
            return
        self._check_gradients()
        self._saved_step, self._without_gradient = self._steps, set(self._trained)
        problem = None
        if self._frozen_checksums and parameter_checksums(self._task) != self._frozen_checksums:
            problem = "weights that should be frozen have changed"
        lora_b = [p for name, p in self._trained.items() if "lora_B" in name]
        if lora_b and not any(p.count_nonzero() for p in lora_b):
            problem = f"nothing was trained in {self._steps} steps: every LoRA B is still zero; is --loop.lr too small?"
        self._raise_on_all_ranks(problem)

    def close(self) -> None:
        """Removes the gradient hooks."""
        for hook in self._hooks:
            hook.remove()

    def _watch(self, name: str, parameter: nn.Parameter) -> torch.utils.hooks.RemovableHandle:
        return parameter.register_post_accumulate_grad_hook(lambda _: self._without_gradient.discard(name))

    def _check_gradients(self) -> None:
        missing = sorted({name for names in self._world.all_gather_object(self._without_gradient) for name in names})
        if missing:
            raise LavicError(
                f"{len(missing)} of {len(self._trained)} trainable parameters got no gradient (first: {missing[0]}): "
                "the loss does not depend on their part of the model; check the LoRA targets"
            )

    def _raise_on_all_ranks(self, problem: str | None) -> None:
        for rank, message in enumerate(self._world.all_gather_object(problem)):
            if message:
                raise LavicError(f"rank {rank}: {message}" if self._world.size > 1 else message)


def parameter_checksums(task: nn.Module) -> list[int]:
    """The sum of the bit patterns of each frozen parameter, which changes with almost any change of a weight.

    A pass over the weights on their device takes milliseconds for a 7B model on a GPU.
    """
    integer_types = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    checksums = [
        p.detach().contiguous().view(integer_types[p.element_size()]).sum(dtype=torch.int64)
        for p in task.parameters()
        if not p.requires_grad and p.numel()
    ]
    return torch.stack(checksums).tolist() if checksums else []


def _find_misplaced(task: nn.Module, trained: Mapping[str, nn.Parameter]) -> str | None:
    """The problem of the set of trainable parameters, or None."""
    kind = getattr(task, "trains", None)
    if kind is None:
        return None
    for name in trained:
        if "lora_" not in name or not any(part in f".{name}" for part in TRAINED_PARTS[kind]):
            parts = " and ".join(part.strip(".") for part in TRAINED_PARTS[kind])
            return f"{name} is trainable: this stage trains LoRA on {parts} alone"
    for part in TRAINED_PARTS[kind]:
        if not any(part in f".{name}" for name in trained):
            return f"nothing of {part.strip('.')} is trainable: do the LoRA targets match the model?"
    return None
