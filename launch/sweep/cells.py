"""The cells of a sweep: each trains and evaluates one category with one candidate list and one seed.

OUT/runs/tune/<cell>            stage 2
OUT/evaluation/<cell>           its evaluation
OUT/sweep/<stage>/<index>.yaml  the settings of a cell's task
OUT/sweep.json                  the cells with their index, and the arrays that were submitted
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import yaml

from lavic.config.cli_args import to_args
from lavic.errors import ConfigError
from lavic.launch.pipeline.dag import Layout, Step, config_args
from lavic.launch.pipeline.digest_cache import DigestCache
from lavic.launch.pipeline.job_registry import Submission, read_json_file
from lavic.launch.pipeline.pipeline_status import resolve_settings
from lavic.launch.pipeline.settings import PipelineSettings, named_test
from lavic.launch.pipeline.step_digest import StepInputs, current_inputs
from lavic.storage.atomic import atomic_write

SweepStage = Literal["tune", "evaluate"]
SWEEP_STAGES: tuple[SweepStage, ...] = ("tune", "evaluate")
"""The stages that run once for each cell; the others run once."""
FILE = "sweep.json"
TASK = "@TASK@"
"""In a job's arguments: the index of the array's task (see slurm/job.sh)."""
CATEGORY = "{category}"
"""In the paths of `conversations`: the cell's category."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a sweep."""

    category: str
    """Empty if the sweep has no categories."""
    candidates: str
    seed: int

    @property
    def name(self) -> str:
        """Name of its folders: `all_beauty-st-0`."""
        parts = (self.category, self.candidates.removeprefix("candidates_"), str(self.seed))
        return "-".join(part for part in parts if part)


@dataclass(frozen=True, kw_only=True)
class Array(Submission):
    """An array of jobs that was submitted."""

    stage: SweepStage
    indexes: tuple[int, ...]
    """Indexes of the array's cells."""

    def log(self, out: Path, index: int) -> str:
        """The log file of a task."""
        return str(Layout(out).logs / f"{self.stage}-{self.id}_{index}.log")


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The state of a sweep: `sweep.json`."""

    cells: dict[str, int] = field(default_factory=dict)
    """Name -> index, which never changes."""
    parts: dict[str, Cell] = field(default_factory=dict)
    """Name -> its category, candidate list and seed."""
    arrays: list[Array] = field(default_factory=list)
    """In the order of their submission."""
    made: dict[str, StepInputs] = field(default_factory=dict)
    """`stage/cell` -> its inputs at the last submission."""

    @classmethod
    def read(cls, out: Path) -> Sweep:
        """Reads a pipeline's sweep; an empty one without a file.

        Raises:
            DataError: The file is broken.
        """

        def parse(body: Any) -> Sweep:
            return cls(
                cells={name: int(index) for name, index in body["cells"].items()},
                parts={name: Cell(**parts) for name, parts in body["parts"].items()},
                arrays=[Array(**{**array, "indexes": tuple(array["indexes"])}) for array in body["arrays"]],
                made={key: StepInputs(**inputs) for key, inputs in body["made"].items()},
            )

        return read_json_file(out / FILE, parse) or cls()

    def write(self, out: Path) -> None:
        """Writes the file."""
        atomic_write(out / FILE, json.dumps(asdict(self), indent=1) + "\n")


def is_sweep(pipeline: PipelineSettings) -> bool:
    """Whether stage 2 and evaluation run once for each cell."""
    return bool(pipeline.sweep.categories or pipeline.sweep.candidates)


def plan_cells(pipeline: PipelineSettings) -> list[Cell]:
    """All cells of a sweep.

    Raises:
        ConfigError: Its settings do not fit the files.
    """
    sweep, files = pipeline.sweep, pipeline.conversations
    if not sweep.candidates:
        raise ConfigError("sweep.candidates: name the keys of the candidate lists, such as [candidates_st]")
    if not sweep.seeds:
        raise ConfigError("sweep.seeds: name at least one seed")
    for name in (*sweep.categories, *sweep.candidates):
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise ConfigError(f"sweep: {name!r} is not a name: use letters, digits, - and _")
    required_files = {"train": files.train, "valid": files.valid, "test": " ".join(files.test) or None}
    for key, file in required_files.items():
        if file is None:
            raise ConfigError(f"conversations.{key} is missing: set it to the file of each category")
        if sweep.categories and CATEGORY not in str(file):
            raise ConfigError(f"conversations.{key}: a sweep of categories needs {CATEGORY} in it, for their files")
    cells = [
        Cell(category=category, candidates=key, seed=seed)
        for category, key, seed in product(sweep.categories or ("",), sweep.candidates, dict.fromkeys(sweep.seeds))
    ]
    if len({cell.name for cell in cells}) < len(cells):
        raise ConfigError("sweep: two cells have one name: remove repeated categories or candidate lists")
    return cells


def cell_output(out: Path, stage: SweepStage, name: str) -> Path:
    """The folder of a cell's result."""
    layout = Layout(out)
    return {"tune": layout.tune, "evaluate": layout.evaluation}[stage] / name


def cell_settings(pipeline: PipelineSettings, stage: SweepStage, cell: Cell) -> dict[str, Any]:
    """The settings that a cell adds to its command's."""
    layout, files = Layout(pipeline.out), pipeline.conversations

    def file(path: object) -> str:
        return str(path).replace(CATEGORY, cell.category)

    if stage == "tune":
        return {
            "store": str(layout.store),
            "train": file(files.train),
            "valid": file(files.valid),
            "out": str(cell_output(layout.out, "tune", cell.name)),
            "candidates": cell.candidates,
            "loop": {"seed": cell.seed},
        }
    tests = [named_test(file(text)) for text in files.test]
    return {
        "bundle": str(cell_output(layout.out, "tune", cell.name) / "bundle"),
        "store": str(layout.store),
        "test": [f"{name}={path}" if name else str(path) for name, path in tests],
        "runs": [str(cell_output(layout.out, "tune", cell.name))],
        "shards": [str(layout.shards("train"))],
        "out": str(cell_output(layout.out, "evaluate", cell.name)),
        "candidates": cell.candidates,
    }


def cell_inputs(pipeline: PipelineSettings, stage: SweepStage, cell: Cell) -> list[Path]:
    """The conversation files that a cell reads."""
    values = cell_settings(pipeline, stage, cell)
    if stage == "tune":
        return [Path(values["train"]), Path(values["valid"])]
    return [named_test(text)[1] for text in values["test"]]


def settings_file(out: Path, stage: SweepStage, index: int | str) -> Path:
    """The settings file of a cell's task."""
    return Layout(out).out / "sweep" / stage / f"{index}.yaml"


def task_args(pipeline: PipelineSettings, stage: SweepStage, cell: Cell | None = None) -> list[str]:
    """The arguments of a task after `lavic STAGE`: the stage's yaml file, the cell's, the user's settings.

    With a cell, its settings take the place of its file, which may not exist yet.
    """
    chosen = getattr(pipeline, stage)
    reserved_keys = {"tune": {"store", "train", "valid", "out", "candidates"}}.get(
        stage, {"bundle", "store", "test", "runs", "shards", "out", "candidates"}
    )
    for key, value in chosen.settings.items():
        if key.replace("-", "_") in reserved_keys or (key == "loop" and isinstance(value, Mapping) and "seed" in value):
            raise ConfigError(f"{stage}.settings.{key}: the sweep fills that in; remove it")
    values = cell_settings(pipeline, stage, cell) if cell else {"config": settings_file(pipeline.out, stage, TASK)}
    return [*config_args(chosen), *to_args(values), *to_args(chosen.settings)]


def resolve_cell(pipeline: PipelineSettings, stage: SweepStage, cell: Cell) -> Any:
    """All settings of a cell's command.

    Raises:
        ConfigError: One is wrong; names the cell.
    """
    step = replace(cell_step(pipeline, stage, cell), args=tuple(task_args(pipeline, stage, cell)))
    return resolve_settings(step, pipeline)


def cell_step(pipeline: PipelineSettings, stage: SweepStage, cell: Cell) -> Step:
    """A cell's task as a step."""
    output = cell_output(pipeline.out, stage, cell.name)
    inputs = tuple(map(str, cell_inputs(pipeline, stage, cell)))
    return Step(name=f"{stage} of {cell.name}", stage=stage, output=output, inputs=inputs)


def missing_files(pipeline: PipelineSettings, stages: Iterable[SweepStage]) -> list[str]:
    """Conversation files of cells that are missing: a line for each."""
    return [
        f"{stage} of {cell.name} reads {file}: no such file"
        for stage in stages
        for cell in plan_cells(pipeline)
        for file in cell_inputs(pipeline, stage, cell)
        if not file.is_file()
    ]


def write_settings(
    pipeline: PipelineSettings, stage: SweepStage, cell: Cell, index: int, tracking: Mapping[str, Any]
) -> None:
    """Writes the settings of a cell's task."""
    values = cell_settings(pipeline, stage, cell)
    path = settings_file(pipeline.out, stage, index)
    path.parent.mkdir(parents=True, exist_ok=True)
    header = f"# lavic {stage}\n# {cell.name}\n"
    atomic_write(path, header + yaml.safe_dump({**values, **tracking}, sort_keys=False, allow_unicode=True))


def wanted_inputs(
    pipeline: PipelineSettings, stage: SweepStage, cell: Cell, cache: DigestCache, results: Mapping[str, str]
) -> StepInputs:
    """The current inputs of a cell's result; `results` has the item store's digest, as `embed`, if it is complete."""
    step = cell_step(pipeline, stage, cell)
    inputs = current_inputs(step, resolve_cell(pipeline, stage, cell), cache, results)
    return replace(
        inputs, settings=json.loads(json.dumps(inputs.settings, default=str))
    )  # as they are read from the file


def is_complete(out: Path, stage: SweepStage, name: str) -> bool:
    """Whether a cell's result is complete."""
    folder = cell_output(out, stage, name)
    return (folder / {"tune": "result.json", "evaluate": "results.json"}[stage]).is_file()
