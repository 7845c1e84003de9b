"""A step as a SLURM job: its batch script, the resources it asks for, the arguments of sbatch."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from lavic.config.cli_args import absolute
from lavic.errors import ConfigError
from lavic.launch.pipeline.dag import Layout, Step
from lavic.launch.pipeline.settings import PipelineSettings, Stage, StageSettings, stage_settings

SCRIPTS: dict[Stage, str] = {
    "crawl": "crawl.sbatch",
    "verify": "cpu.sbatch",
    "describe": "gpu.sbatch",
    "distill": "gpu.sbatch",
    "embed": "gpu.sbatch",
    "tune-retriever": "gpu.sbatch",
    "retrieve": "cpu.sbatch",
    "tune": "gpu.sbatch",
    "evaluate": "gpu.sbatch",
}
"""The batch script of each stage; `retrieve` on several nodes takes that of `crawl`, which starts Ray."""


@dataclass(frozen=True)
class SbatchJob:
    """One job, ready for sbatch."""

    name: str
    resources: StageSettings
    options: tuple[str, ...]
    """Options of sbatch, each `--name=value`."""
    script: Path
    command: tuple[str, ...]
    """The arguments after `lavic` that the script runs."""
    env: dict[str, str]
    """Environment variables of the job besides the caller's."""
    logs: Path
    """Folder of the logs."""

    def args(
        self, after: Sequence[str] = (), kind: Literal["afterok", "afterany"] = "afterok", mark: str = ""
    ) -> list[str]:
        """The arguments after `sbatch`, for a job that starts after jobs that have ended as `kind` says.

        `mark` is added to the job's comment, after the site's or the user's own.
        """
        dependency = (f"--dependency={kind}:{':'.join(after)}",) if after else ()
        comments = [option.partition("=")[2] for option in self.options if option.startswith("--comment=")]
        comment = (f"--comment={' '.join([*comments[-1:], mark])}",) if mark else ()
        return [*self.options, *dependency, *comment, str(self.script), *self.command]

    def log(self, id: str) -> Path:
        """The log of the job with that id."""
        return self.logs / f"{self.name}-{id}.log"


def step_job(step: Step, pipeline: PipelineSettings, settings: Any, more_args: Sequence[str] = ()) -> SbatchJob:
    """The job of a step, whose command gets `more_args` too. Without a model to load, it asks for no GPU."""
    command = (step.stage, *step.args, *more_args)
    resources = stage_settings(pipeline, step.stage)
    if not getattr(settings, "needs_gpu", True):
        resources = replace(resources, gpus=0)
    on_ray = step.stage == "retrieve" and resources.nodes > 1
    script = SCRIPTS["crawl" if on_ray else step.stage]
    return _job(step.name, script, command, resources, pipeline)


def array_job(stage: Stage, args: Sequence[str], pipeline: PipelineSettings, indexes: Sequence[int]) -> SbatchJob:
    """An array of jobs of one stage, a task for each index; `args` are those after `lavic STAGE`."""
    job = _job(stage, SCRIPTS[stage], (stage, *args), getattr(pipeline, stage), pipeline)
    limit = f"%{pipeline.sweep.at_once}" if pipeline.sweep.at_once else ""
    logs = str(job.logs).replace("%", "%%")
    options = [option for option in job.options if not option.startswith("--output=")]
    array = (f"--array={','.join(map(str, indexes))}{limit}", f"--output={logs}/{stage}-%A_%a.log")
    return replace(job, options=(*array, *options))


def status_job(pipeline: PipelineSettings) -> SbatchJob:
    """The job after all others, however they end: `lavic submit status`, which closes the pipeline's MLflow run."""
    resources = StageSettings(time="00:15:00")
    return _job("status", "cpu.sbatch", ("submit", "status", str(Layout(pipeline.out).out)), resources, pipeline)


def _job(
    name: str, script: str, command: tuple[str, ...], resources: StageSettings, pipeline: PipelineSettings
) -> SbatchJob:
    logs = Layout(pipeline.out).logs
    values = {
        "job-name": f"lavic-{name}",
        # SLURM replaces %j by the job's id; a % in the name is doubled
        "output": f"{logs}/{name}-".replace("%", "%%") + "%j.log",
        "nodes": resources.nodes,
        "gpus-per-node": resources.gpus,
        "cpus-per-task": resources.cpus,
        "mem": resources.memory,
        "time": resources.time,
        "partition": resources.partition or pipeline.slurm.partition,
        "account": resources.account or pipeline.slurm.account,
    }
    options = [f"--{option}={value}" for option, value in values.items() if value is not None]
    # a job whose dependency failed is cancelled instead of waiting forever
    options += ["--export=ALL", "--kill-on-invalid-dep=yes", *pipeline.slurm.options, *resources.options]
    return SbatchJob(
        name=name,
        resources=resources,
        options=tuple(options),
        script=script_folder(pipeline) / script,
        command=command,
        env=_environment(pipeline, resources),
        logs=logs,
    )


def script_folder(pipeline: PipelineSettings) -> Path:
    """The folder of the batch scripts.

    Raises:
        ConfigError: A script is missing in `slurm.scripts`.
    """
    folder = pipeline.slurm.scripts
    if folder is None:
        local = Path("slurm")
        return absolute(local if (local / "env.sh").is_file() else Path(str(resources.files("lavic.slurm"))))
    for name in sorted({*SCRIPTS.values(), "env.sh"}):
        if not (folder / name).is_file():
            raise ConfigError(f"slurm.scripts {folder}: has no {name}; copy the folder `slurm` that came with lavic")
    return absolute(folder)


def _environment(pipeline: PipelineSettings, resources: StageSettings) -> dict[str, str]:
    env = {"LAVIC_SLURM": str(script_folder(pipeline)), "LAVIC_LOGS": str(Layout(pipeline.out).logs)}
    if sys.prefix != sys.base_prefix and "LAVIC_VENV" not in os.environ:
        # jobs run in the virtual environment that submits them
        env["LAVIC_VENV"] = sys.prefix
    if resources.ranks:
        env["RANKS_PER_NODE"] = str(resources.ranks)
    return {**env, **pipeline.slurm.env}
