"""What a training stage is as a command: what it reads, trains and saves."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lavic.distributed.context import DistributedContext
from lavic.distributed.hang_watchdog import HangWatchdog
from lavic.distributed.signals import StopRequest
from lavic.tracking.tracker import Tracker
from lavic.train.run_folder import RunFolder

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from torch import nn

    from lavic.model.bundle import BundleInfo
    from lavic.model.loading import Backbone
    from lavic.train.evaluation import EvalResult, Scorer
    from lavic.train.input.data_loader import TaskDataset


@dataclass(frozen=True, kw_only=True)
class StageInput:
    """A file or set that a stage reads: recorded, and compared when a run is resumed."""

    name: str
    """For messages: "training set"."""
    path: Path
    digest: str
    """Digest of its content, whatever its name is."""
    manifest: Path | None = None
    """A small file that describes it; copied to the record."""
    context: str = ""
    """MLflow's word for what it is for: training, validation."""


@dataclass(kw_only=True)
class StageComponents:
    """What a stage trains, loaded."""

    backbone: Backbone
    model: PeftModel
    """The base model with the adapter in training."""
    task: nn.Module
    train: TaskDataset
    valid: TaskDataset
    vision: Path | None = None
    """In stage 2 the vision adapter that made the item store."""
    scorer: Scorer | None = None
    """Scores the model at each validation, beside its loss."""
    weights: Mapping[str, torch.Tensor] | None = None
    """The trained weights in full precision, on rank 0, when a bundle is saved; see `Engine.full_precision_weights`."""


@dataclass(kw_only=True)
class TrainingRun:
    """A run in progress; every rank has one."""

    world: DistributedContext
    folder: RunFolder
    tracker: Tracker
    stop: StopRequest
    watchdog: HangWatchdog
    components: StageComponents = field(init=False)


class TrainingStage(ABC):
    """One training stage. Made on every rank from its settings: reads and checks the inputs, loads no model yet."""

    command: ClassVar[str]
    input_keys: ClassVar[tuple[str, ...]]
    """Settings that name inputs: a resumed run compares their content, not their paths."""

    def __init__(self, settings: Any, world: DistributedContext) -> None:
        self.settings = settings

    @property
    def selecting_score(self) -> str | None:
        """Name of the score of `StageComponents.scorer` that selects the adapter; None: the loss does."""
        return None

    @abstractmethod
    def inputs(self) -> Iterator[StageInput]:
        """What it reads; called on rank 0 alone."""

    @abstractmethod
    def load(self, run: TrainingRun) -> StageComponents:
        """Loads model and data. Collective."""

    @abstractmethod
    def save_bundle(self, folder: Path, components: StageComponents) -> BundleInfo:
        """Writes the bundle; called on rank 0 alone."""

    def post_eval(self, run: TrainingRun, step: int, result: EvalResult, saved: bool) -> None:  # noqa: B027
        """Called on every rank after a validation; `saved`: the bundle now holds this adapter."""

    def result(self) -> Mapping[str, Any]:
        """More fields of result.json."""
        return {}

    def artifacts(self) -> Sequence[str]:
        """More files of the run's folder that are copied to the record."""
        return ()

    @abstractmethod
    def completion_message(self, folder: RunFolder) -> str:
        """Printed at the end: the result, and the next command."""
