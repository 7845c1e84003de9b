"""A task of numbers instead of photos, and a run of it as a program, so that tests can start, kill and compare runs."""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from lavic.distributed.context import DistributedContext
from lavic.distributed.failure import exit_process
from lavic.distributed.signals import StopRequest
from lavic.errors import LavicError
from lavic.tracking.tracker import Tracker
from lavic.train.callbacks.best_model import BestModel
from lavic.train.callbacks.callback import Callback
from lavic.train.callbacks.checkpointer import Checkpointer
from lavic.train.callbacks.console import ConsoleLogger
from lavic.train.callbacks.journal import JournalLogger
from lavic.train.callbacks.stop_on_signal import StopOnSignal
from lavic.train.callbacks.throughput import ThroughputMonitor
from lavic.train.checkpoint import CheckpointManager
from lavic.train.config import LoopSettings
from lavic.train.deepspeed.engine import Engine
from lavic.train.input.sample_denylist import apply_denylist
from lavic.train.trainer import Trainer

WIDTH, WORDS = 16, 11


@dataclass(frozen=True)
class ToySample:
    key: str
    inputs: torch.Tensor
    labels: torch.Tensor

    @property
    def length(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class ToyBatch:
    keys: tuple[str, ...]
    targets: tuple[int, ...]
    tokens: int
    inputs: torch.Tensor
    labels: torch.Tensor

    @property
    def padded(self) -> int:
        return self.tokens

    def to(self, device: torch.device) -> ToyBatch:
        return replace(self, inputs=self.inputs.to(device), labels=self.labels.to(device))


class ToyData:
    """Sample p has 0 to 6 target tokens, unlike its neighbours: averaging over samples instead of tokens is wrong."""

    def __init__(self, n: int, seed: int, *, poison: int | None = None, slow: float = 0.0) -> None:
        self.n, self.seed, self.poison, self.slow = n, seed, poison, slow

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, position: int) -> ToySample:
        time.sleep(self.slow)
        index = (position * 11 + position // self.n) % self.n
        random = torch.Generator().manual_seed(self.seed * 100_003 + index)
        inputs = torch.randn(index % 7, WIDTH, generator=random)
        if position == self.poison:
            inputs = torch.full((3, WIDTH), float("nan"))
        return ToySample(f"toy-{position}", inputs, inputs.nan_to_num().sum(-1).abs().long() % WORDS)

    @property
    def overhead(self) -> int:
        return 1

    def key(self, position: int) -> str:
        return f"toy-{position}"

    def lengths(self, positions: Sequence[int]) -> list[int]:
        return [self[position].length if position != self.poison else 3 for position in positions]

    def collate(self, samples: Sequence[ToySample]) -> ToyBatch:
        return ToyBatch(
            keys=tuple(s.key for s in samples),
            targets=tuple(s.length for s in samples),
            tokens=sum(s.length for s in samples),
            inputs=torch.cat([s.inputs for s in samples]),
            labels=torch.cat([s.labels for s in samples]),
        )


class ToyTask(nn.Module):
    """Two trained layers on a frozen one; `dropout` draws random numbers as LoRA does."""

    def __init__(self, dropout: float = 0.0, idle: bool = False) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.first = nn.Linear(WIDTH, 24)
        self.second = nn.Linear(24, WORDS)
        self.dropout = nn.Dropout(dropout)
        if idle:
            self.idle = nn.Linear(2, 2)

    def forward(self, batch: ToyBatch) -> torch.Tensor:
        hidden = torch.tanh(self.first(self.dropout(self.base(batch.inputs.to(self.base.weight.dtype)))))
        return nn.functional.cross_entropy(self.second(hidden).float(), batch.labels, reduction="none")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Faults and settings of a run."""

    dropout: float = 0.0
    idle: bool = False
    poison: int | None = None
    """The inputs of the sample at this position are NaN."""
    slow: float = 0.0
    """Seconds per sample."""
    signal: str = ""
    """A signal that rank 0 sends to itself, see `at`."""
    at: int = 0
    """The step of this process in which `signal` is sent."""
    bf16: bool = False
    """Weights and inputs."""
    odd: bool = False
    """Rank 1 has other frozen weights than rank 0."""
    no_room: int = 0
    """Largest file size of rank 0 in bytes, as a full disk; 0 for no limit."""


class SignallingEngine(Engine):
    """An engine that sends rank 0 a signal in the middle of a step."""

    options = Options()
    taken = 0

    def backward(self, loss: torch.Tensor, *, last: bool = True) -> None:
        self.taken += last
        if last and self.taken == self.options.at and self._world.is_main:
            os.kill(os.getpid(), getattr(signal, self.options.signal))
        super().backward(loss, last=last)


def make_callbacks(stop: StopRequest, checkpoints: CheckpointManager, tracker: Tracker) -> list[Callback]:
    """The callbacks of the commands, without watchdog and bundle."""
    return [
        StopOnSignal(stop),
        Checkpointer(checkpoints),
        BestModel(),
        JournalLogger(tracker),
        ConsoleLogger(),
        ThroughputMonitor(),
    ]


def train(folder: Path, loop: LoopSettings, options: Options, world: DistributedContext) -> None:
    """Starts or resumes a run in `folder`."""
    if options.no_room and world.is_main:
        resource.setrlimit(resource.RLIMIT_FSIZE, (options.no_room, resource.RLIM_INFINITY))
    data = ToyData(40, 1, poison=options.poison, slow=options.slow)
    task = ToyTask(options.dropout, options.idle)
    if options.bf16:
        task.bfloat16()
    if options.odd and world.rank == 1:
        task.base.weight.data[0, 0] += 1.0
    engine = SignallingEngine(task, world, loop)
    engine.options = options
    tracker = Tracker.open(folder, main=world.is_main)
    checkpoints = CheckpointManager(folder / "checkpoints", world, keep=loop.save_total_limit, identity={"data": "toy"})
    train_set = apply_denylist(data, loop.skip_samples, tracker, world)
    with StopRequest() as stop:
        callbacks = make_callbacks(stop, checkpoints, tracker)
        state = Trainer(engine, train_set, ToyData(13, 2), loop, world, callbacks).fit()
    if world.is_main:
        weights = {name: p.tolist() for name, p in engine.task.named_parameters()}
        (folder / "end.json").write_text(json.dumps({"best": state.best_loss, "weights": weights}))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--loop", type=json.loads, default={})
    parser.add_argument("--options", type=json.loads, default={})
    args = parser.parse_args()
    loop, world = LoopSettings(**args.loop), DistributedContext.from_env()
    try:
        loop.split_batch(world.size)
        world.init_process_group(timeout_s=60)
        train(args.folder, loop, Options(**args.options), world)
    except LavicError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    finally:
        world.destroy_process_group()
    return 0


if __name__ == "__main__":
    exit_process(main())
