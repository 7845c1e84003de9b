"""`lavic evaluate`: all metrics of a tuned bundle with intervals, beside its controls and baselines.

OUT/report.html        the results as a page
OUT/predictions.jsonl  a line per test set, arm and conversation: the ranking with its probabilities
OUT/results.json       all numbers; written last
OUT/rankings/          rankings of a run that has not finished; the same command resumes from them
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial

from lavic.config import flatten, parse
from lavic.distributed.context import DistributedContext
from lavic.errors import ConfigError
from lavic.launch.evaluation.results import RESULTS
from lavic.launch.evaluation.run import run
from lavic.launch.evaluation.settings import FREE, EvaluateSettings
from lavic.launch.evaluation.setup.evaluation_setup import EvaluationSetup
from lavic.launch.evaluation.summary import dry_run_text
from lavic.model.config import ModelSettings
from lavic.model.dims import weights_estimate
from lavic.storage.output_folder import lock_output_folder

DESCRIPTION = """Evaluate a tuned bundle on held-out conversations, beside controls that each lack one of its inputs
(tokens shuffled between candidates, the model before stage 2), baselines (list order, random) and other bundles; or,
without a bundle, the baselines and upper bounds of any file in the LaViC format.

  lavic evaluate --bundle runs/tune/bundle --store store --test test.jsonl --out evaluation
  lavic evaluate --bundle runs/tune/bundle --store store --test items=test.jsonl combinations=test_combinations.jsonl \\
      --compare text_only=runs/titles/bundle --shards shards --runs runs/distill runs/tune --out evaluation
  lavic evaluate --test test.jsonl --candidates candidates_st --items item2meta_train.json --train train.jsonl \\
      --arms random list_order popularity repeat_last bm25 dense --out baselines

  lavic evaluate --test test.jsonl --run theirs=answers.jsonl ours=ranking.run --out others
  lavic evaluate compare evaluation-a evaluation-b

Writes OUT/results.json (all metrics, with intervals over clusters of dependent conversations, paired differences and
exact tests), OUT/predictions.jsonl (all rankings), OUT/report.html (the results as a page), OUT/trec/ and OUT/beir/
(runs, qrels and the test set in the forms of TREC and BEIR). 'lavic evaluate compare --help' explains the comparison of
finished evaluations."""

SETTINGS = EvaluateSettings
resolve = partial(parse, EvaluateSettings, command="evaluate", description=DESCRIPTION)
"""The settings of a command line; see `lavic.cli.command_module`."""
_PATIENCE_S = 7 * 24 * 3600.0
"""How long ranks wait for rank 0, which ranks with the arms without a model and asks the chat model."""


def is_complete(settings: EvaluateSettings) -> bool:
    """Whether the evaluation is complete: the results are written last."""
    return (settings.out / RESULTS).is_file()


def estimate(settings: EvaluateSettings) -> str:
    """What a rank loads, as text; empty where the bundle is not there yet and no base model is named."""
    name = settings.model.name
    if name is None and settings.bundle is not None and (settings.bundle / "bundle.json").is_file():
        from lavic.model.bundle import BundleInfo

        name = BundleInfo.read(settings.bundle).base
    if name is None:
        return ""
    return weights_estimate(ModelSettings(name=name, dtype=settings.dtype), lambda shape: shape.loaded("language"))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    if argv and argv[0] == "compare":
        from lavic.launch.evaluation import compare

        return compare.main(argv[1:])
    chosen = resolve(argv)
    if chosen.average_orders and (chosen.orders == 1 or chosen.decode == "generate"):
        requirement = (
            "--orders N, at least 2" if chosen.orders == 1 else "--decode likelihood, which gives probabilities"
        )
        raise ConfigError(f"--average-orders needs {requirement}")
    world = DistributedContext.from_env()
    if chosen.dry_run:
        print(f"{dry_run_text(chosen, EvaluationSetup.prepare(chosen))}\n{estimate(chosen)}".rstrip())
        return 0
    if world.must_start(chosen.nproc):
        from lavic.launch.ranks import local

        return local.run("evaluate", list(argv or ()), chosen.nproc)
    setup = EvaluationSetup.prepare(chosen)
    with lock_output_folder(chosen.out) if world.is_main else nullcontext():
        if world.is_main and not chosen.overwrite:
            refuse_other_settings(chosen)
        with world.process_group(timeout_s=_PATIENCE_S) if world.size > 1 else nullcontext():
            return run(chosen, setup, world)


def refuse_other_settings(chosen: EvaluateSettings) -> None:
    """Raises ConfigError if `--out` holds results of other settings."""
    path = chosen.out / RESULTS
    try:
        recorded = json.loads(path.read_text("utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # no results, or none that can be read
    current = json.loads(json.dumps(flatten(chosen), default=str))
    changed = [key for key in current if key in recorded and recorded[key] != current[key] and not key.startswith(FREE)]
    if changed:
        changes = "; ".join(f"{key} was {recorded[key]}, is {current[key]}" for key in changed[:3])
        raise ConfigError(f"{path}: results of other settings ({changes}): use another --out, or --overwrite them")
