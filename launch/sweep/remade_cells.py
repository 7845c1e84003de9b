"""Cells whose results were made with other settings or files than now: moved to OUT/stale and rebuilt."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from lavic.errors import ConfigError
from lavic.launch.pipeline.dag import Layout
from lavic.launch.pipeline.settings import PipelineSettings
from lavic.launch.pipeline.stale_results import move_aside
from lavic.launch.pipeline.step_digest import StepInputs
from lavic.launch.sweep.arrays import TaskStatus
from lavic.launch.sweep.cells import SWEEP_STAGES, Sweep, SweepStage, cell_output, plan_cells

log = logging.getLogger(__name__)
Remade = dict[tuple[SweepStage, str], str]
"""Stage and cell -> why it is rebuilt."""


def remade_cells(
    pipeline: PipelineSettings,
    sweep: Sweep,
    inputs: Mapping[str, StepInputs],
    stages: Collection[SweepStage],
    statuses: Mapping[tuple[SweepStage, str], TaskStatus],
) -> Remade:
    """The cells that start from scratch. An evaluation does where its stage 2 does.

    Args:
        pipeline: Its settings, with --force and --keep.
        sweep: What is known of it.
        inputs: `stage/cell` -> what it would be made from now.
        stages: Those that are submitted.
        statuses: Of all cells.

    Raises:
        ConfigError: One of them is running or waiting, and --force names it or its stage 2 is rebuilt.
    """
    remade: Remade = {}
    for cell in plan_cells(pipeline):
        for stage in SWEEP_STAGES:
            key, status = f"{stage}/{cell.name}", statuses[stage, cell.name]
            is_active = status.state in ("running", "waiting")
            made_from = sweep.made.get(key)
            changes = "; ".join(made_from.differences(inputs[key])) if made_from and not pipeline.keep else ""
            tune_is_remade = stage == "evaluate" and ("tune", cell.name) in remade
            forced = stage in stages and stage in pipeline.force
            if is_active and (tune_is_remade or forced):
                raise ConfigError(
                    f"{stage} of {cell.name} is {status.state} ({status.job}) and would be rebuilt: "
                    f"`lavic submit cancel {pipeline.out} {stage}-{cell.name}`, or wait until it has ended"
                )
            if tune_is_remade or forced:
                remade[stage, cell.name] = "its stage 2 is rebuilt" if tune_is_remade else "--force"
            elif changes and is_active:
                log.warning("%s of %s continues as it was submitted, before a change: %s", stage, cell.name, changes)
            elif changes and stage in stages:
                remade[stage, cell.name] = changes
            elif changes:
                log.warning("%s of %s was made with other settings or files: %s", stage, cell.name, changes)
    return remade


def move_remade(pipeline: PipelineSettings, remade: Remade) -> None:
    """Moves what there is of the results of cells to OUT/stale."""
    layout = Layout(pipeline.out)
    for (stage, cell), reason in remade.items():
        if moved := move_aside(cell_output(layout.out, stage, cell), layout, f"{stage}-{cell}"):
            print(f"{stage:<16}{cell} is rebuilt ({reason}); the old result is now in {moved}", flush=True)


def with_kept(sweep: Sweep, inputs: Mapping[str, StepInputs], done: Sequence[str], *, keep: bool) -> Sweep:
    """The sweep with what finished cells were made from, where it is not known, or where --keep accepts them.

    `inputs` has what each `stage/cell` would be made from now, `done` are the finished ones.
    """
    made = dict(sweep.made)
    for key in done:
        made_from = made.get(key)
        if made_from is None or keep:
            made[key] = inputs[key]
        elif not made_from.results:
            made[key] = replace(made_from, results=inputs[key].results)
    return replace(sweep, made=made)
