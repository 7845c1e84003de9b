"""`lavic evaluate`: every metric of a tuned bundle with its intervals, beside the controls that tell what it rests on.

OUT/report.html        to look at
OUT/predictions.jsonl  one line per set, arm and conversation: the ranking with its probabilities
OUT/results.json       every number; written last
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from lavic import __version__
from lavic.config.loader import Seed, flatten, parse, settings
from lavic.distributed.context import World
from lavic.errors import ConfigError
from lavic.evaluation.arms import Decode, compete
from lavic.evaluation.assessment import RANDOM, assess
from lavic.evaluation.baselines import list_order, popularity
from lavic.evaluation.none_of_these import judge_none
from lavic.evaluation.report import sections as report_sections
from lavic.evaluation.test_set import Clusters, Trial
from lavic.launch.evaluation.setup import ArmName, Contest
from lavic.launch.evaluation.summary import outline, table
from lavic.model.config import BaseModelSettings
from lavic.storage.atomic import encoded, write_whole, written_aside
from lavic.storage.output_folder import hold
from lavic.tracking.run_metadata import versions
from lavic.tracking.settings import TrackingSettings
from lavic.tracking.tracker import Tracker
from lavic.train.run_folder import digest_files

if TYPE_CHECKING:
    from lavic.recommend.ranker import Ranking


DESCRIPTION = """Measure a tuned bundle on held-out conversations, beside controls that each lack one thing it has: the
tokens shuffled between the candidates, the model before stage 2, the list's order, chance, and any other bundle.

  lavic evaluate --bundle runs/tune/bundle --store store --test test.jsonl --out evaluation
  lavic evaluate --bundle runs/tune/bundle --store store --test items=test.jsonl combinations=test_combinations.jsonl \\
      --compare text_only=runs/titles/bundle --shards shards --runs runs/distill runs/tune --out evaluation

Writes OUT/results.json (every metric of every arm, with intervals over clusters of dependent conversations, paired
differences and exact tests), OUT/predictions.jsonl (every ranking) and OUT/report.html (to look at)."""


FREE = ("nproc", "dry_run", "overwrite", "tokens_per_batch", "tracking.", "model.")
"""Settings, or groups of them, that do not change the results."""


@settings
class EvaluateSettings:
    """Evaluate a tuned bundle beside its controls."""

    bundle: Path
    """The bundle that `lavic tune` made: RUN/bundle."""
    store: Path
    """The item store that it was tuned on, from `lavic embed`."""
    test: tuple[str, ...]
    """Conversation files, each FILE or NAME=FILE. Every one is reported; the first is the main one."""
    out: Path
    """Folder for results.json, predictions.jsonl and report.html."""
    compare: tuple[str, ...] = ()
    """Other bundles on the same lists, each NAME=BUNDLE or NAME=BUNDLE@STORE, such as text_only=runs/titles/bundle."""
    arms: tuple[ArmName, ...] = ("lavic", "shuffled", "before_tuning", "list_order", "random")
    """What is measured of --bundle. `popularity` wants --train, `words` and `words_before_tuning` want --words."""
    candidates: str = "candidates_st"
    """Which list of the conversations is ranked."""
    missing: Literal["refuse", "drop"] = "refuse"
    """What happens to a candidate that is not in the store: an error, or it is left out of its list (and counted)."""
    decode: Decode = "likelihood"
    """`likelihood` ranks the whole list by the probability of each ID; `generate` lets the model write freely and reads
    the ID out of it, as the released scripts do: there is no ranking behind that one item."""
    tokens_per_item: PositiveInt | None = None
    """Item tokens shown of each candidate of --bundle, its first ones; by default as many as it was tuned on."""
    train: Path | None = None
    """Training conversations, for the popularity baseline."""
    words: Path | None = None
    """Looks in words, for the `words` arms: a jsonl file of {"id", "look"}."""
    shards: tuple[Path, ...] = ()
    """Sets of shards with the candidates' photos, for the report's gallery."""
    runs: tuple[str, ...] = ()
    """Run folders of stages 1 and 2, each RUN or NAME=RUN: their validation curves go into the report."""
    gallery: NonNegativeInt = 24
    """Conversations shown in the report."""
    title: str = "Does it recommend by looking?"
    """Heading of the report."""
    cluster: Clusters = "both"
    """Conversations that count as one group for the intervals: those that share a submission or a target (both), only
    either, or none."""
    draws: PositiveInt = 10_000
    """Bootstrap resamples."""
    level: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Level of the intervals."""
    seed: Seed = 0
    """Of shuffles, resamples and the gallery's choice."""
    limit: PositiveInt | None = None
    """Only the first so many conversations of each file."""
    model: BaseModelSettings = BaseModelSettings()
    """The base model of --bundle."""
    tokens_per_batch: PositiveInt = 8192
    """Prompts read together, tokens; memory and speed depend on it, results do not."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the weights. `auto`: bfloat16 on a GPU, float32 on a CPU."""
    nproc: PositiveInt = 1
    """Processes on this machine; inside torchrun or srun their number counts."""
    overwrite: bool = False
    """Replace the results of an evaluation with other settings in --out."""
    dry_run: bool = False
    """Check every input, print what would be ranked and stop; no model is loaded and nothing is written."""
    tracking: TrackingSettings = TrackingSettings()
    """Where the numbers are recorded besides OUT."""


SETTINGS = EvaluateSettings
"""The command's settings, for `lavic.cli.settings_class`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    chosen = parse(EvaluateSettings, argv, command="evaluate", description=DESCRIPTION)
    world = World.from_env()
    if chosen.dry_run:
        print(outline(chosen, Contest.prepare(chosen)))
        return 0
    if chosen.nproc > 1 and world.size == 1:
        from lavic.launch.ranks import local

        return local.run("evaluate", list(argv or ()), chosen.nproc)
    contest = Contest.prepare(chosen)
    with hold(chosen.out) if world.is_main else nullcontext():
        if world.is_main and not chosen.overwrite:
            refuse_other_settings(chosen)
        with world.together() if world.size > 1 else nullcontext():
            return run(chosen, contest, world)


def refuse_other_settings(chosen: EvaluateSettings) -> None:
    """Keeps the results of another evaluation.

    Raises:
        ConfigError: `--out` holds results of other settings.
    """
    path = chosen.out / "results.json"
    try:
        before = json.loads(path.read_text("utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # none, or what an evaluation that was cut short has left
    now = json.loads(json.dumps(flatten(chosen), default=str))
    changed = [key for key in now if key in before and before[key] != now[key] and not key.startswith(FREE)]
    if changed:
        what = "; ".join(f"{key} was {before[key]}, is {now[key]}" for key in changed[:3])
        raise ConfigError(f"{path}: results of other settings ({what}): use another --out, or --overwrite them")


def run(chosen: EvaluateSettings, contest: Contest, world: World) -> int:
    """Ranks, measures, writes. Rank 0 writes; the others only rank."""
    began = time.monotonic()
    node = world.node if world.local_rank == 0 else None
    with Tracker.open(chosen.out, chosen.tracking, main=world.is_main, node=node) as tracker:
        tracker.start("evaluate", flatten(chosen))
        for trial in contest.trials:
            tracker.dataset(trial.name, trial.sha256, trial.file, context="evaluation")
        if world.is_main:
            manifest = chosen.store / "manifest.json"
            tracker.dataset("item store", digest_files([manifest]), chosen.store, manifest=manifest)
            if contest.popular is not None and chosen.train is not None:
                tracker.dataset("training set", digest_files([chosen.train]), chosen.train, context="popularity")
        found = compete(
            contest.arms,
            contest.trials,
            world,
            decode=chosen.decode,
            tokens_per_batch=chosen.tokens_per_batch,
            dtype=chosen.dtype,
            seed=chosen.seed,
        )
        if not world.is_main:
            return 0
        # results.json is written last, and means that all three are of one evaluation
        (chosen.out / "results.json").unlink(missing_ok=True)
        _write_predictions(chosen.out / "predictions.jsonl", contest.trials, found)
        results = measure_all(chosen, contest, found)
        results["seconds"] = round(time.monotonic() - began, 2)
        _write_report(chosen, contest, found, results)
        write_whole(chosen.out / "results.json", json.dumps(results, indent=2) + "\n")
        for name, trial in results["sets"].items():
            for arm, metrics in trial["arms"].items():
                tracker.log(0, **{f"{name}/{arm}/{metric}": one["value"] for metric, one in metrics.items()})
        for file in ("results.json", "report.html"):
            tracker.artifact(chosen.out / file)
    print(table(results))
    print(f"\n{chosen.out / 'report.html'}")
    return 0


def measure_all(
    chosen: EvaluateSettings, contest: Contest, found: Mapping[str, Mapping[str, Sequence[Ranking]]]
) -> dict[str, Any]:
    """What `results.json` holds; `hit_rate` is the main set in short."""
    sets: dict[str, Any] = {}
    main = contest.arms[0].name
    for trial in contest.trials:
        ids = {arm: [ranking.ids for ranking in rankings] for arm, rankings in found[trial.name].items()}
        if contest.popular is not None:
            ids["popularity"] = [popularity(listed, contest.popular, seed=chosen.seed) for listed in trial.lists]
        if "list_order" in chosen.arms:
            ids["list_order"] = [list_order(listed) for listed in trial.lists]
        sets[trial.name] = assess(
            trial,
            ids,
            main=main,
            random=RANDOM in chosen.arms,
            cluster=chosen.cluster,
            draws=chosen.draws,
            level=chosen.level,
            seed=chosen.seed,
        )
        none = {arm: judge_none(trial, rankings) for arm, rankings in found[trial.name].items()}
        if told := {arm: of for arm, of in none.items() if of is not None}:
            sets[trial.name]["none"] = told
    first = contest.trials[0].name
    short = {arm: of["hit_rate"] for arm, of in sets[first]["arms"].items()}
    return {
        "hit_rate": {arm: {key: one[key] for key in ("value", "low", "high", "n")} for arm, one in short.items()},
        "main": main,
        "main_set": first,
        "arms": contest.labels,
        "sets": sets,
        "base": contest.info.base,
        "settings": flatten(chosen),
        "versions": versions("lavic", "torch", "transformers"),
    }


def _write_predictions(
    path: Path, trials: Sequence[Trial], found: Mapping[str, Mapping[str, Sequence[Ranking]]]
) -> None:
    with written_aside(path) as file:
        for trial in trials:
            for arm, rankings in found[trial.name].items():
                for conversation, listed, ranking in zip(trial.conversations, trial.lists, rankings, strict=True):
                    line = {
                        "set": trial.name,
                        "arm": arm,
                        "id": conversation.id,
                        "targets": conversation.targets,
                        "candidates": listed,
                        "ranking": ranking.ids,
                        "logprobs": [round(value, 6) for value in ranking.logprobs],
                        "probabilities": [round(value, 8) for value in ranking.probabilities],
                        **({} if ranking.text is None else {"text": ranking.text}),
                        **({} if ranking.none is None else {"none": round(ranking.none, 8)}),
                    }
                    file.write(encoded(json.dumps(line, ensure_ascii=False)) + b"\n")


def _write_report(
    chosen: EvaluateSettings,
    contest: Contest,
    found: Mapping[str, Mapping[str, Sequence[Ranking]]],
    results: Mapping[str, Any],
) -> None:
    from lavic.evaluation.report.blocks import Report
    from lavic.evaluation.report.page import write_report

    trial, main = contest.trials[0], contest.arms[0]
    ranked = found[trial.name]
    shown = report_sections.gallery(
        trial,
        ranked[main.name],
        title=contest.store.title,
        photo=contest.photo,
        others={
            contest.labels[arm]["label"]: [ranking.ids for ranking in rankings]
            for arm, rankings in ranked.items()
            if arm != main.name
        },
        count=chosen.gallery,
        seed=chosen.seed,
    )
    sections = [
        report_sections.key_numbers(results, *contest.past.numbers),
        *report_sections.trial_sections(results),
        *contest.past.sections,
        *([shown] if shown else []),
        report_sections.method(results),
    ]
    facts = {
        "Base model": contest.info.base,
        "Bundle": str(chosen.bundle),
        "Item store": f"{chosen.store} ({len(contest.store):,} items)",
        "Conversations": ", ".join(str(one.file) for one in contest.trials),
        "Made": f"{time.strftime('%Y-%m-%d %H:%M')}, lavic {__version__}",
    }
    lead = (
        "Candidate lists of held-out conversations, ranked by the tuned model, and by controls that lack one thing it "
        "has. Where a control does as well, that thing was not used."
    )
    report = Report(title=chosen.title, lead=lead, facts=facts, sections=tuple(sections))
    write_report(report, chosen.out / "report.html")
