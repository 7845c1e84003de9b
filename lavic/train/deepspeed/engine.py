"""A task under DeepSpeed ZeRO-2: gradients and optimizer state are partitioned over the ranks, weights replicated."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import nn

from lavic.distributed.context import DistributedContext
from lavic.errors import ConfigError, LaunchError
from lavic.train.config import LoopSettings
from lavic.train.deepspeed.config import zero2_config
from lavic.train.sanity_checks import SanityChecks

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state of each weight."""


class Engine:
    """Runs a task's forward and backward passes and its optimizer steps.

    Every method is collective: all ranks call it, in the same order. The process group must exist already
    (`DistributedContext.start`).

    Args:
        task: Parameters that require a gradient are trained.
        extra: More keys for DeepSpeed, see `zero2_config`.

    Raises:
        ConfigError: There is nothing to train, or `extra` contradicts our settings.
        LaunchError: DeepSpeed is not installed.
        LavicError: The wrong parameters would be trained, see `SanityChecks.check_start`.

    Attributes:
        task: The module as given; trained in place.
        parameters: The trained parameters by name, in the module's order.
    """

    def __init__(
        self, task: nn.Module, world: DistributedContext, loop: LoopSettings, *, extra: Mapping[str, Any] | None = None
    ) -> None:
        self.task = task
        self.parameters = {name: p for name, p in task.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ConfigError(f"{type(task).__name__} has no trainable parameter: do the LoRA targets match the model?")
        self._world = world
        self._checks = SanityChecks(task, self.parameters, world)
        self._checks.check_frozen()  # before DeepSpeed broadcasts the weights of rank 0
        micro_batch, micro_steps = loop.split_batch(world.size)
        config = zero2_config(
            micro_batch=micro_batch,
            accumulation=micro_steps,
            clip=loop.max_grad_norm,
            bf16=any(p.dtype == torch.bfloat16 for p in task.parameters()),
            extra=extra,
        )
        # One group: DeepSpeed drops empty groups, and a scheduler then updates the wrong one (torch >= 2.10 raises).
        optimizer = torch.optim.AdamW(self.parameters.values(), lr=loop.lr, weight_decay=loop.weight_decay)
        deepspeed = _deepspeed(world.device())
        self._utils = deepspeed.utils
        # DeepSpeed requires the variable also in a process group that the caller has created without a launcher.
        with _changed(os.environ, "LOCAL_RANK", os.environ.get("LOCAL_RANK", str(world.local_rank))):
            try:
                self._engine, self._zero, *_ = deepspeed.initialize(model=task, optimizer=optimizer, config=config)
            except (AssertionError, ValueError, deepspeed.DeepSpeedConfigError) as error:
                if not extra:
                    raise
                reason = " ".join(str(error).split())[:300]
                raise ConfigError(f"--deepspeed: DeepSpeed does not accept these settings: {reason}") from error
        # Sums over the ranks, not means: dividing a bfloat16 gradient rounds it once more; `backward` divides the loss
        self._zero.gradient_average = False
        self.device: torch.device = self._engine.device
        self._checks.check_start(self._zero.param_groups)

    def forward(self, batch: Any) -> torch.Tensor:
        """The task's output for a batch."""
        return self._engine(batch)

    def backward(self, loss: torch.Tensor, *, last: bool = True) -> None:
        """Adds the gradient of `loss`; gradients are *averaged* over the ranks.

        Args:
            last: Whether this is the last micro-step before `step`.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss / self._world.size, scale_wrt_gas=False)

    def step(self, lr: float) -> float:
        """Clips the gradient, updates the weights on every rank and zeroes the gradients.

        Returns:
            The gradient's norm before clipping. Where it is not finite no weight was changed.

        Raises:
            LavicError: At the first step: a trainable parameter got no gradient on some rank.
        """
        self._checks.before_update()
        for group in self._zero.param_groups:
            group["lr"] = lr
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    def full_precision_weights(self) -> dict[str, torch.Tensor]:
        """The trained weights in float32: of a bfloat16 model the master weights.

        Returns:
            On rank 0, on the CPU, by the names of `parameters`; empty on the others.
        """
        masters = {name: self._utils.safe_get_full_fp32_param(p) for name, p in self.parameters.items()}
        return {name: master.cpu() for name, master in masters.items()} if self._world.is_main else {}

    def discard_gradients(self) -> None:
        """Drops the gradients of a step that is skipped, as DeepSpeed does on overflow."""
        checked = self._zero.check_grad_overflow
        self._zero.check_grad_overflow, self._zero.has_overflow = True, lambda *args, **kwargs: True
        try:
            self._engine.step()
        finally:
            self._zero.check_grad_overflow = checked
            del self._zero.has_overflow

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Everything that `load_state_dict` needs, unpartitioned.

        Returns:
            On rank 0, float32 on the CPU, by `<parameter>/weight`, `/exp_avg` and `/exp_avg_sq`; empty on the others.

        Raises:
            LavicError: A check failed, see `SanityChecks.check_save`.
        """
        self._checks.check_save()
        if not self._zero.optimizer.state:  # every step so far was skipped
            self._create_moments(0)
        tensors: dict[str, torch.Tensor] = {}
        for name, p in self.parameters.items():
            parts = {
                "weight": self._utils.safe_get_full_fp32_param(p),
                **{key: self._utils.safe_get_full_optimizer_state(p, key) for key in MOMENTS},
            }
            if self._world.is_main:
                tensors |= {f"{name}/{key}": value.cpu() for key, value in parts.items()}
        return tensors

    def load_state_dict(self, state: Mapping[str, torch.Tensor], *, steps: int) -> None:
        """Loads a `state_dict` of a run with any number of ranks.

        Args:
            state: The same on every rank.
            steps: Optimizer steps done, for Adam's bias correction.

        Raises:
            ConfigError: It belongs to other parameters.
        """
        expected = {f"{name}/{key}" for name in self.parameters for key in ("weight", *MOMENTS)}
        if unmatched := sorted(expected ^ set(state)):
            raise ConfigError(
                f"the checkpoint is of another model or other LoRA settings ({unmatched[0]} and {len(unmatched)} keys)"
            )
        self._create_moments(steps)
        for name, p in self.parameters.items():
            weight = state[f"{name}/weight"].to(self.device)
            if weight.shape != p.shape:
                raise ConfigError(f"the checkpoint's {name} is {list(weight.shape)}, this run's {list(p.shape)}")
            self._utils.safe_set_full_fp32_param(p, weight)
            p.data.copy_(weight)
            for key in MOMENTS:
                self._utils.safe_set_full_optimizer_state(p, state[f"{name}/{key}"].to(self.device), key)

    def _create_moments(self, steps: int) -> None:
        """Creates AdamW's state, which it would create at its first update, for `steps` updates done."""
        adam = self._zero.optimizer
        for group in adam.param_groups:
            (flat,) = group["params"]  # this rank's part of all weights
            moments = {key: torch.zeros_like(flat) for key in MOMENTS}
            adam.state[flat] = {"step": torch.tensor(float(steps)), **moments}
        self._zero._lazy_init_hp_params_optimizer_state()  # views of the moments, by parameter

    def close(self) -> None:
        """Removes DeepSpeed's hooks from the task, which can then be saved, merged or given to another engine."""
        self._checks.close()
        self._engine.destroy()


def _deepspeed(device: torch.device) -> Any:
    """Imports DeepSpeed without what ZeRO-2 training never uses.

    Each patch saves CPU time at the start of every rank (three runs each; the import takes 0.6 s with all of them):

    - The autotuner imports `mlflow`, where it is installed: 0.8 to 1.4 s.
    - The Muon optimizer module, which is imported only to recognize Muon, decorates kernels with `torch.compile`, which
      imports the compiler: 1.6 to 1.7 s. With TORCHDYNAMO_DISABLE the decorator does nothing.
    - DeepSpeed probes every compiled operator and on a CPU builds a shared-memory all-reduce (40 s once, with a C++
      compiler) that only tensor-parallel inference calls. With an empty list of operators it uses torch.distributed.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    with _changed(os.environ, "TORCHDYNAMO_DISABLE", "1"), _changed(sys.modules, "mlflow", None):
        try:
            import deepspeed
        except ImportError as e:
            raise LaunchError(f"training needs DeepSpeed ({e}): pip install 'lavic[train]'") from e
        with contextlib.suppress(ImportError):
            import deepspeed.runtime.zero.muon.muon_optimizer
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*torch.distributed.*is deprecated", category=FutureWarning)
    return deepspeed


@contextlib.contextmanager
def _changed(mapping: MutableMapping[str, Any], key: str, value: Any) -> Iterator[None]:
    """Sets a key of `os.environ` or `sys.modules` within a block; None in `sys.modules`: not importable."""
    if mapping is sys.modules and key in mapping:  # already imported
        yield
        return
    before = mapping.get(key)
    mapping[key] = value
    try:
        yield
    finally:
        if before is None:
            mapping.pop(key, None)
        else:
            mapping[key] = before
