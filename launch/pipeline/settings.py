"""Settings of a pipeline: its stages, their input files, and the SLURM resources of each."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, PositiveInt, field_validator

from lavic.cli import command_module
from lavic.config import Seed, parse_values, settings
from lavic.config.cli_args import absolute, absolute_pattern, to_args
from lavic.config.loader import value_at
from lavic.config.schema import Keys, Schema
from lavic.errors import LavicError
from lavic.tracking.settings import TrackingSettings

Stage = Literal["crawl", "verify", "describe", "distill", "embed", "tune-retriever", "retrieve", "tune", "evaluate"]
STAGES: tuple[Stage, ...] = get_args(Stage)
RETRIEVAL: tuple[Stage, ...] = ("tune-retriever", "retrieve")
"""Stages that a pipeline has only if it names them; otherwise the conversations must have candidate lists."""

BASE_MODEL = ("model", "name")
"""A setting of a stage that is a path only where it names a folder."""


@settings
class PhotoSettings:
    """The photos of one set."""

    items: tuple[str, ...] = ()
    """Catalogue files, as `lavic crawl --items` takes them."""
    ids: Path | None = None
    """Only the items in this file, one id a line."""
    described: bool = False
    """The catalogue has descriptions of these photos: `describe` skips the set."""
    expected: int | None = Field(default=None, ge=1)
    """About how many photos there are: for the dry run's estimates, until the set is crawled."""


@settings
class PhotosSettings:
    """The two sets of photos."""

    train: PhotoSettings = PhotoSettings()
    """The catalogue. The item store holds these, and those of `valid` that are not among them."""
    valid: PhotoSettings = PhotoSettings()
    """Validation set of stage 1; a photo of `train` that is here too is not trained on."""


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
    """One stage: its settings, and the SLURM resources of its job."""

    config: str | None = None
    """The command's yaml file, or the name of a shipped one."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """More of the command's settings, which override its yaml file, in the same form: {loop: {steps: 100}}."""
    nodes: PositiveInt = 1
    """Number of nodes."""
    gpus: int = Field(default=0, ge=0)
    """GPUs per node. `describe` with an endpoint and `retrieve` without `dense` and `tokens` load no model: they get
    none."""
    ranks: PositiveInt | None = None
    """Processes per node; by default one per GPU, or one."""
    cpus: PositiveInt = 1
    """CPU cores per node."""
    memory: str | None = None
    """Memory per node, such as `64G`; by default the partition's."""
    time: str = "24:00:00"
    """Time limit in SLURM's format: 90 (minutes), 12:00:00, 2-00:00:00."""
    partition: str | None = None
    """Overrides `slurm.partition`."""
    account: str | None = None
    """Overrides `slurm.account`."""
    options: tuple[str, ...] = ()
    """More options for this stage's sbatch; they override `slurm.options`."""

    @field_validator("time", mode="before")
    @classmethod
    def _quoted(cls, value: object) -> object:
        if not isinstance(value, str):
            raise ValueError("put the time in quotes, as '12:00:00': yaml reads it as a number of seconds")
        if not re.fullmatch(r"(\d+-)?\d+(:\d\d){0,2}", value):
            raise ValueError("not a time limit of SLURM: use 90 (minutes), 12:00:00 or 2-00:00:00")
        return value

    @property
    def ranks_per_node(self) -> int:
        """Processes per node."""
        return self.ranks or self.gpus or 1


@settings
class SweepSettings:
    """Stage 2 and evaluation once for each category, candidate list and seed; the other stages once."""

    categories: tuple[str, ...] = ()
    """Each replaces `{category}` in the files of `conversations`."""
    candidates: tuple[str, ...] = ()
    """Keys of the candidate lists, such as [candidates_st, candidates_gpt_large]."""
    seeds: tuple[Seed, ...] = Field(default=(0,), min_length=1)
    """Seeds of stage 2."""
    at_once: PositiveInt | None = None
    """Maximum number of tasks of an array that run at once; by default as many as SLURM starts."""


@settings
class SlurmSettings:
    """SLURM settings of all jobs."""

    partition: str | None = None
    """Partition; by default the cluster's default."""
    account: str | None = None
    """Account that is charged."""
    options: tuple[str, ...] = ()
    """More options for every sbatch, each as --name=value, such as --qos=long or --exclude=n7."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables of every job, such as {HF_HOME: /shared/huggingface}; slurm/env.sh lists those it reads."""
    scripts: Path | None = None
    """Folder of the batch scripts and env.sh; by default ./slurm, else the one installed with lavic."""


@settings
class PipelineSettings:
    """The pipeline, from photo links to an evaluated recommender, as SLURM jobs that depend on each other."""

    out: Path
    """Folder for everything, on a file system that all nodes share."""
    stages: tuple[Stage, ...] = Field(default=tuple(stage for stage in STAGES if stage not in RETRIEVAL), min_length=1)
    """The stages of the pipeline. With `retrieve`, candidates are searched for in the whole catalogue; with
    `tune-retriever` also by photos."""
    photos: PhotosSettings = PhotosSettings()
    """The catalogue."""
    conversations: ConversationSettings = ConversationSettings()
    """The conversations."""
    crawl: StageSettings = StageSettings(cpus=16)
    """`lavic crawl`, once for each set."""
    verify: StageSettings = StageSettings(cpus=8, time="12:00:00")
    """`lavic verify`, once for each set."""
    describe: StageSettings = StageSettings(gpus=8, cpus=64)
    """`lavic describe`, once for each set whose photos the catalogue does not describe."""
    distill: StageSettings = StageSettings(gpus=8, cpus=64)
    """`lavic distill`."""
    embed: StageSettings = StageSettings(gpus=8, cpus=64)
    """`lavic embed`."""
    tune_retriever: StageSettings = StageSettings(gpus=8, cpus=64, time="12:00:00")
    """`lavic tune-retriever`."""
    retrieve: StageSettings = StageSettings(gpus=1, cpus=16, time="12:00:00")
    """`lavic retrieve`, of all conversations: one process, or on several nodes Ray."""
    tune: StageSettings = StageSettings(gpus=8, cpus=64)
    """`lavic tune`."""
    evaluate: StageSettings = StageSettings(gpus=8, cpus=64, time="12:00:00")
    """`lavic evaluate`."""
    sweep: SweepSettings = SweepSettings()
    """Stage 2 and evaluation as arrays, for several categories, candidate lists and seeds."""
    slurm: SlurmSettings = SlurmSettings()
    """SLURM settings of all jobs."""
    tracking: TrackingSettings = TrackingSettings()
    """Where the stages' runs are recorded, under one parent run. By default MLFLOW_TRACKING_URI, else OUT/mlflow.db."""
    dry_run: bool = False
    """Print every job and script that would be submitted, and submit nothing."""
    only: tuple[Stage, ...] = ()
    """Submit only these stages; what they need must be done or running."""
    from_: Stage | None = None
    """Submit this stage and all later ones."""
    force: tuple[Stage, ...] = ()
    """Run these stages again although they are done, and those that depend on them."""
    keep: bool = False
    """Keep results that were made with other settings or inputs, instead of running their stages again."""
    wait: bool = False
    """Watch the status until every job has ended; exit code 1 if a step failed."""


def stage_settings(pipeline: PipelineSettings, stage: Stage) -> StageSettings:
    """The settings of a stage."""
    settings: StageSettings = getattr(pipeline, field_of(stage))
    return settings


def stage_of(step_name: str) -> str:
    """The stage of a step: its name without that of a set of photos."""
    return step_name if step_name in STAGES else step_name.rpartition("-")[0]


def field_of(stage: Stage) -> str:
    """The name of a stage among the pipeline's settings."""
    return stage.replace("-", "_")


def with_absolute_paths(pipeline: PipelineSettings) -> PipelineSettings:
    """The settings with absolute paths, also in the stages' settings and of what their yaml files name."""

    def file(path: Path | None) -> Path | None:
        return absolute(path) if path else None

    def photos(split: PhotoSettings) -> PhotoSettings:
        return replace(split, items=tuple(absolute_pattern(item) for item in split.items), ids=file(split.ids))

    conversations = pipeline.conversations
    tests = (named_test(text) for text in conversations.test)
    test = tuple(f"{name}={path}" if name else str(path) for name, path in tests)
    stages: dict[str, Any] = {
        field_of(stage): _stage_with_absolute_paths(stage, stage_settings(pipeline, stage)) for stage in STAGES
    }
    return replace(
        pipeline,
        out=absolute(pipeline.out),
        photos=PhotosSettings(train=photos(pipeline.photos.train), valid=photos(pipeline.photos.valid)),
        conversations=replace(
            conversations, train=file(conversations.train), valid=file(conversations.valid), test=test
        ),
        slurm=replace(pipeline.slurm, scripts=file(pipeline.slurm.scripts)),
        **stages,
    )


def _stage_with_absolute_paths(stage: Stage, settings: StageSettings) -> StageSettings:
    if settings.config and Path(settings.config).is_file():
        settings = replace(settings, config=str(absolute(Path(settings.config))))
    relative = {keys: str(absolute(path)) for keys, path in named_paths(stage, settings) if not path.is_absolute()}
    return replace(settings, settings=_merged(settings.settings, relative)) if relative else settings


def named_paths(stage: Stage, settings: StageSettings) -> Iterator[tuple[Keys, Path]]:
    """The files and folders that a stage's settings or its yaml file name."""
    values = stage_values(stage, settings)
    schema = Schema(command_module(stage).SETTINGS, stage)
    for keys, leaf in schema.leaves.items():
        value = value_at(values, keys)
        is_base_model = keys == BASE_MODEL and value != "mini" and Path(str(value)).expanduser().is_dir()
        if value and (leaf.type is Path or is_base_model) and value != schema.defaults.get(keys):
            yield keys, Path(value)


def stage_values(stage: Stage, settings: StageSettings) -> dict[str, Any]:
    """A stage's settings with those of its yaml file and the defaults; empty where they are not valid."""
    args = [*(["--config", settings.config] if settings.config else []), *to_args(settings.settings)]
    try:
        return parse_values(command_module(stage).SETTINGS, args, command=stage)
    except LavicError:  # reported with the step's name when the step's settings are resolved
        return {}


def _merged(settings: Mapping[str, Any], changes: Mapping[Keys, str]) -> dict[str, Any]:
    """Nested settings with some values replaced or added."""
    nested: dict[str, Any] = {}
    for key, value in settings.items():
        name = key.replace("-", "_")
        nested_changes = {keys[1:]: path for keys, path in changes.items() if keys[0] == name and keys[1:]}
        nested[name] = _merged(value, nested_changes) if isinstance(value, Mapping) else value
    for keys, path in changes.items():
        group = nested
        for key in keys[:-1]:
            group = group.setdefault(key, {})
        group[keys[-1]] = path
    return nested


def named_test(text: str) -> tuple[str, Path]:
    """NAME=FILE or FILE, as `lavic evaluate --test` parses it."""
    name, equals, file = text.partition("=")
    return (name, absolute(Path(file))) if equals and "/" not in name else ("", absolute(Path(text)))
