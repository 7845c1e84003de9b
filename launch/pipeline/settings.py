"""The settings of a pipeline: which stages, from which files, with what of the cluster."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, PositiveInt, field_validator

from lavic.config import settings
from lavic.tracking.settings import TrackingSettings

Stage = Literal["crawl", "verify", "describe", "distill", "embed", "tune", "evaluate"]
STAGES: tuple[Stage, ...] = get_args(Stage)


@settings
class PhotoSettings:
    """Photos of one set."""

    items: tuple[str, ...] = ()
    """Catalogue files, as `lavic crawl --items` takes them."""
    ids: Path | None = None
    """Only the items in this file, one id a line."""
    described: bool = False
    """The catalogue brings descriptions of these photos: `describe` leaves the set alone."""
    expected: int | None = Field(default=None, ge=1)
    """About how many photos there are: for the dry run's arithmetic, until the set stands."""


@settings
class PhotosSettings:
    """The two sets of photos."""

    train: PhotoSettings = PhotoSettings()
    """The catalogue. The item store holds these, and those of `valid` that are not among them."""
    valid: PhotoSettings = PhotoSettings()
    """What validates stage 1; a photo of `train` that is here too is not trained on."""


@settings
class ConversationSettings:
    """The conversations of stage 2."""

    train: Path | None = None
    """Conversations to tune on, jsonl."""
    valid: Path | None = None
    """Conversations to validate with, jsonl."""
    test: tuple[str, ...] = ()
    """Conversation files to evaluate on, each FILE or NAME=FILE; the first is the main one."""


@settings
class StageSettings:
    """One stage: its settings, and what its job asks the cluster for."""

    config: str | None = None
    """The command's yaml file, or the name of a shipped one."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """More of the command's settings, over its yaml file's, in the same form: {loop: {steps: 100}}."""
    nodes: PositiveInt = 1
    """Nodes."""
    gpus: int = Field(default=0, ge=0)
    """GPUs of each node."""
    ranks: PositiveInt | None = None
    """Processes on each node; by default one for each of its GPUs, or one."""
    cpus: PositiveInt = 1
    """Cores of each node."""
    memory: str | None = None
    """Memory of each node, as `64G`; by default what the partition gives."""
    time: str = "24:00:00"
    """Longest time, as SLURM writes it: 90 (minutes), 12:00:00, 2-00:00:00."""
    partition: str | None = None
    """Instead of `slurm.partition`."""
    account: str | None = None
    """Instead of `slurm.account`."""
    options: tuple[str, ...] = ()
    """More words for this stage's sbatch, after `slurm.options`, which they win over."""

    @field_validator("time", mode="before")
    @classmethod
    def _quoted(cls, value: object) -> object:
        if not isinstance(value, str):
            raise ValueError("put the time in quotes, as '12:00:00': yaml takes it for a number of seconds")
        if not re.fullmatch(r"(\d+-)?\d+(:\d\d){0,2}", value):
            raise ValueError("not a time as SLURM writes it: 90 (minutes), 12:00:00, 2-00:00:00")
        return value

    @property
    def ranks_per_node(self) -> int:
        """Processes on each node."""
        return self.ranks or self.gpus or 1


@settings
class SlurmSettings:
    """What all jobs share."""

    partition: str | None = None
    """Where the jobs run; by default the cluster's default."""
    account: str | None = None
    """Who pays."""
    options: tuple[str, ...] = ()
    """More words for every sbatch, each as --name=value, such as --qos=long or --exclude=n7."""
    env: dict[str, str] = Field(default_factory=dict)
    """Variables for every job, such as {HF_HOME: /shared/huggingface}; see slurm/env.sh for those it reads."""
    scripts: Path | None = None
    """Folder of the batch scripts and env.sh; by default `slurm` here, or else the one that came with lavic."""


@settings
class PipelineSettings:
    """The pipeline, from links to a measured recommender, as SLURM jobs that wait for each other."""

    out: Path
    """Folder for everything, seen by all nodes."""
    stages: tuple[Stage, ...] = STAGES
    """Which stages there are."""
    photos: PhotosSettings = PhotosSettings()
    """The catalogue."""
    conversations: ConversationSettings = ConversationSettings()
    """The conversations."""
    crawl: StageSettings = StageSettings(cpus=16)
    """`lavic crawl`, once for each set."""
    verify: StageSettings = StageSettings(cpus=8, time="12:00:00")
    """`lavic verify`, once for each set."""
    describe: StageSettings = StageSettings(gpus=8, cpus=64)
    """`lavic describe`, once for each set that the catalogue does not describe."""
    distill: StageSettings = StageSettings(gpus=8, cpus=64)
    """`lavic distill`."""
    embed: StageSettings = StageSettings(gpus=8, cpus=64)
    """`lavic embed`."""
    tune: StageSettings = StageSettings(gpus=8, cpus=64)
    """`lavic tune`."""
    evaluate: StageSettings = StageSettings(gpus=8, cpus=64, time="12:00:00")
    """`lavic evaluate`."""
    slurm: SlurmSettings = SlurmSettings()
    """What all jobs share."""
    tracking: TrackingSettings = TrackingSettings()
    """Where the stages are recorded, all under one parent run. By default MLFLOW_TRACKING_URI, else OUT/mlflow.db."""
    dry_run: bool = False
    """Print what would be submitted, with every script, and submit nothing."""
    only: tuple[Stage, ...] = ()
    """Submit these stages alone; what they need must stand or be under way."""
    from_: Stage | None = None
    """Submit this stage and those after it."""
    force: tuple[Stage, ...] = ()
    """Make these stages again though they are done, and what depends on them."""
    keep: bool = False
    """Accept results that were made with other settings or inputs than are given now, instead of making them again."""
    wait: bool = False
    """Stay until every job has ended; exit code 1 when a step failed."""
