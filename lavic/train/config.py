"""Settings of the training loop."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from lavic.config import Seed, settings
from lavic.errors import ConfigError


@settings
class LoopSettings:
    """Settings of the training loop."""

    epochs: PositiveFloat = 1.0
    """Passes over the training set; rounded up to a full step."""
    steps: PositiveInt | None = None
    """Optimizer steps; overrides `epochs`."""
    global_batch_size: PositiveInt = 32
    """Samples of one optimizer step, over all ranks."""
    micro_batch: PositiveInt | None = None
    """Maximum samples per forward pass and rank; gradients are accumulated. None: a rank's full share of the step."""
    micro_tokens: PositiveInt | None = None
    """Maximum tokens per forward pass and rank, with padding and the cost of photos in the vision tower. The samples of
    a step are then grouped by length: little padding, equal work on each rank, as many micro-steps as needed. None:
    only `micro_batch` limits a forward pass."""
    activation_checkpointing: bool = False
    """Keep only the input of each layer and recompute the rest in the backward pass: a third more compute for a tenth
    of the memory. The results are the same."""
    compile: bool = False
    """Compile the layers with `torch.compile`: takes a minute at the start; steps are faster, and losses differ in the
    last digits."""
    lr: PositiveFloat = 1e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: cosine decay to zero, or constant."""
    warmup: NonNegativeFloat = 0.03
    """Steps of linear warm-up; a number below 1 is their share of all steps."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay of AdamW."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Largest gradient norm; 0 disables clipping."""
    eval_every: NonNegativeInt = 0
    """Steps between validations; 0 validates before the first step and after the last."""
    early_stopping_patience: NonNegativeInt = 0
    """Validations without an improvement of the metric in `select`, after which training stops early; 0 disables early
    stopping. Needs `eval_every`."""
    save_every: PositiveInt = 100
    """Steps between checkpoints; they are also written before a validation, after the last step and on a stop
    request."""
    save_total_limit: PositiveInt = 2
    """Checkpoints to keep; older ones are removed."""
    log_every: PositiveInt = 1
    """Steps between journal entries."""
    seed: Seed = 0
    """Seed of new weights, sample order, random choices and dropout."""
    num_workers: NonNegativeInt = 0
    """Data loader processes per rank; 0 prepares samples in the rank's process, between the steps."""
    skip_samples: Path | None = None
    """A text file of sample keys to exclude from training, one per line, as in error messages. Each is replaced by the
    next sample in the order."""
    max_skipped: NonNegativeInt = 0
    """Number of steps of the run that may be skipped because loss or gradient is not finite. A skipped step changes no
    weight."""
    hang_warn_minutes: PositiveFloat = 5.0
    """Minutes that ranks wait for another rank before they report which rank is missing, and where each rank is."""
    flight_recorder: bool = False
    """Keep each rank's last 2,000 collectives and write them to OUT/flight-recorder when a collective hangs;
    `torchfrtrace OUT/flight-recorder -p rank_` compares them."""

    def split_batch(self, ranks: int) -> tuple[int, int]:
        """Splits a step's batch: returns the samples per forward pass and rank, and the number of forward passes.

        Raises:
            ConfigError: The ranks would get unequal shares, or `early_stopping_patience` lacks `eval_every`.
        """
        if self.early_stopping_patience and not self.eval_every:
            raise ConfigError(
                f"--loop.early-stopping-patience {self.early_stopping_patience} counts validations, and without "
                "--loop.eval-every there is only the one after the last step: set --loop.eval-every N"
            )
        if self.global_batch_size % ranks:
            raise ConfigError(
                f"--loop.global-batch-size {self.global_batch_size} cannot be shared by {ranks} processes: use a "
                f"multiple of {ranks}"
            )
        share = self.global_batch_size // ranks
        micro_batch = min(self.micro_batch or share, share)
        return micro_batch, math.ceil(share / micro_batch)

    def total_steps(self, samples: int) -> int:
        """Optimizer steps of a run on `samples` training samples."""
        return self.steps or math.ceil(self.epochs * samples / self.global_batch_size)

    def learning_rate(self, step: int, total: int) -> float:
        """The learning rate of a step, counted from 1."""
        warmup = self.warmup if self.warmup >= 1 else math.ceil(self.warmup * total)
        if step <= warmup:
            return self.lr * (step / warmup)
        if self.schedule == "constant":
            return self.lr
        return self.lr * (1 + math.cos(math.pi * (step - warmup - 1) / max(1, total - warmup))) / 2
