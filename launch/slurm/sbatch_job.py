"""A step as a batch job: which script runs it, what it asks of the cluster, in which words sbatch is told."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

from lavic.errors import ConfigError
from lavic.launch.cli_args import absolute
from lavic.launch.pipeline.dag import Layout, Step
from lavic.launch.pipeline.settings import PipelineSettings, Stage, StageSettings

SCRIPTS: dict[Stage, str] = {
    "crawl": "crawl.sbatch",
    "verify": "cpu.sbatch",
    "describe": "describe.sbatch",
    "distill": "train.sbatch",
    "embed": "embed.sbatch",
    "tune": "train.sbatch",
    "evaluate": "evaluate.sbatch",
}
"""The batch script that runs a stage."""


@dataclass(frozen=True)
class Batch:
    """One job, ready for sbatch."""

    name: str
    asked: StageSettings
    """What it asks of the cluster."""
    options: tuple[str, ...]
    """Of sbatch, each `--name=value`."""
    script: Path
    command: tuple[str, ...]
    """What the script runs: the words after `lavic`."""
    env: dict[str, str]
    """Variables of the job over those of the caller."""
    logs: Path
    """Folder of the logs."""

    def words(
        self, after: Sequence[str] = (), kind: Literal["afterok", "afterany"] = "afterok", mark: str = ""
    ) -> list[str]:
        """The words after `sbatch`, for a job that starts when the jobs `after` have ended well, or in any way.

        Args:
            after: Ids of jobs.
            kind: How they must have ended.
            mark: To be found in the job's comment, beside what the site or the user puts there.
        """
        waits = (f"--dependency={kind}:{':'.join(after)}",) if after else ()
        comments = [word.partition("=")[2] for word in self.options if word.startswith("--comment=")]
        comment = (f"--comment={' '.join([*comments[-1:], mark])}",) if mark else ()
        return [*self.options, *waits, *comment, str(self.script), *self.command]

    def log(self, job: str) -> Path:
        """Where the job of that id writes."""
        return self.logs / f"{self.name}-{job}.log"


def batch(step: Step, chosen: PipelineSettings, more: Sequence[str] = ()) -> Batch:
    """The job of a step.

    Args:
        step: What it does.
        chosen: The pipeline.
        more: Further words for the command.
    """
    command = (step.stage, *step.words, *more)
    return _batch(step.name, SCRIPTS[step.stage], command, getattr(chosen, step.stage), chosen)


def closing(chosen: PipelineSettings) -> Batch:
    """The job behind all others, however they end: it looks at them and closes the pipeline's MLflow run."""
    asked = StageSettings(time="00:15:00")
    return _batch("status", "cpu.sbatch", ("submit", "status", str(Layout(chosen.out).out)), asked, chosen)


def _batch(name: str, script: str, command: tuple[str, ...], asked: StageSettings, chosen: PipelineSettings) -> Batch:
    logs = Layout(chosen.out).logs
    partition, account = asked.partition or chosen.slurm.partition, asked.account or chosen.slurm.account
    named = {
        "job-name": f"lavic-{name}",
        # %j is the job's id to SLURM; a name's own % is doubled
        "output": f"{logs}/{name}-".replace("%", "%%") + "%j.log",
        "nodes": asked.nodes,
        "gpus-per-node": asked.gpus,
        "cpus-per-task": asked.cpus,
        "mem": asked.memory,
        "time": asked.time,
        "partition": partition,
        "account": account,
    }
    options = [f"--{name}={value}" for name, value in named.items() if value is not None]
    # A job whose predecessor failed goes away instead of waiting for ever.
    options += ["--export=ALL", "--kill-on-invalid-dep=yes", *chosen.slurm.options, *asked.options]
    return Batch(
        name=name,
        asked=asked,
        options=tuple(options),
        script=scripts(chosen) / script,
        command=command,
        env=_env(chosen, asked),
        logs=logs,
    )


def scripts(chosen: PipelineSettings) -> Path:
    """The folder of the batch scripts.

    Raises:
        ConfigError: `slurm.scripts` holds none.
    """
    named = chosen.slurm.scripts
    if named is None:
        here = Path("slurm")
        return absolute(here if (here / "env.sh").is_file() else Path(str(resources.files("lavic.slurm"))))
    for name in {*SCRIPTS.values(), "env.sh"}:
        if not (named / name).is_file():
            raise ConfigError(f"slurm.scripts {named}: has no {name}; copy the folder that came with lavic")
    return absolute(named)


def _env(chosen: PipelineSettings, asked: StageSettings) -> dict[str, str]:
    env = {"LAVIC_SLURM": str(scripts(chosen)), "LAVIC_LOGS": str(Layout(chosen.out).logs)}
    if sys.prefix != sys.base_prefix and "LAVIC_VENV" not in os.environ:
        # the jobs run in the environment that submits them
        env["LAVIC_VENV"] = sys.prefix
    if asked.ranks:
        env["RANKS_PER_NODE"] = str(asked.ranks)
    return {**env, **chosen.slurm.env}
