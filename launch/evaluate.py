"""`lavic evaluate`: all metrics of a tuned bundle with intervals, beside its controls and baselines.

OUT/report.html        the results as a page
OUT/predictions.jsonl  a line per test set, arm and conversation: the ranking with its probabilities
OUT/results.json       all numbers; written last
OUT/rankings/          rankings of a run that has not finished; the same command goes on with them
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
from lavic.config import Seed, flatten, parse, settings
from lavic.config.secrets import redact
from lavic.data.remote_shards import CacheSettings
from lavic.distributed.context import DistributedContext
from lavic.endpoint.settings import NO_EFFECT
from lavic.errors import ConfigError
from lavic.evaluation.chat import ChatSettings, chat_section
from lavic.evaluation.model_arms.model_rankings import Decode
from lavic.evaluation.predictions import FILE, write_predictions
from lavic.evaluation.report import findings
from lavic.evaluation.report import sections as report_sections
from lavic.evaluation.saved_rankings import FOLDER, SavedRankings
from lavic.evaluation.test_set import ClusterBy
from lavic.launch.evaluation.arm_rankings import rank_arms
from lavic.launch.evaluation.exchange_files import write_exchange_files
from lavic.launch.evaluation.lineage import lineage, record_lineage
from lavic.launch.evaluation.results import PARTIAL, RESULTS, PartialResults, add_model_arms, compute_results
from lavic.launch.evaluation.setup import ArmName, EvaluationSetup
from lavic.launch.evaluation.summary import dry_run_text, results_table
from lavic.model.config import BaseModelSettings, ModelSettings
from lavic.model.dims import weights_estimate
from lavic.recommend.retrieval.catalogue import TextSettings
from lavic.recommend.retrieval.vectors.sentence_encoder import DenseSettings
from lavic.storage.atomic import atomic_write
from lavic.storage.output_folder import lock_output_folder
from lavic.tracking.settings import TrackingSettings
from lavic.tracking.tracker import Tracker

if TYPE_CHECKING:
    from lavic.launch.evaluation.arm_rankings import Rankings

DESCRIPTION = """Evaluate a tuned bundle on held-out conversations, beside controls that each lack one of its inputs
(tokens shuffled between candidates, the model before stage 2), baselines (list order, random) and other bundles; or,
without a bundle, the baselines and upper bounds of any file in the released format.

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


_PATIENCE_S = 7 * 24 * 3600.0
"""How long ranks wait for rank 0, which ranks with the arms without a model and asks the chat model."""
FINDINGS = (findings.controls, findings.order_bias, findings.calibration, findings.groups)
"""Sections of the report that not every evaluation has."""
FREE = (
    *("nproc", "dry_run", "overwrite", "tokens_per_batch", "tracking.", "model.", "cache."),
    *(f"chat.{name}" for name in NO_EFFECT),
)
"""Settings, or groups of them, that do not change the results."""


@settings
class EvaluateSettings:
    """Evaluate a tuned bundle beside its controls and baselines."""

    bundle: Path | None = None
    """The bundle that `lavic tune` made: RUN/bundle. Arms that use no model need none."""
    store: Path | None = None
    """The item store that it was tuned on, from `lavic embed`."""
    test: tuple[str, ...]
    """Conversation files, each FILE or NAME=FILE; the first is the main test set."""
    out: Path
    """Folder for results.json, predictions.jsonl and report.html."""
    compare: tuple[str, ...] = ()
    """Other bundles to compare with, each NAME=BUNDLE or NAME=BUNDLE@STORE, such as text_only=runs/titles/bundle."""
    run: tuple[str, ...] = ()
    """Rankings of other systems, each NAME=FILE: a TREC run, or rows of the released format with `recommended_*` or
    `response_*`, of which FILE@KEY chooses one. NAME@SET=FILE: of another test set than the main one."""
    arms: tuple[ArmName, ...] = ()
    """The model of --bundle, its controls and baselines; by default lavic, shuffled, blank, noise, before_tuning,
    list_order and random, without a bundle list_order and random. `popularity` needs --train, `bm25`, `dense` and
    `chat` need --items, `chat` also --chat.url and --chat.model, `words` and `words_before_tuning` need --words or
    --shards with descriptions, `base_photos` needs --shards."""
    candidates: str = "candidates_st"
    """Key of the candidate list to rank."""
    top: PositiveInt | None = None
    """Rank only the first so many of each list, such as 10 of the 100 that `lavic retrieve` finds; by default all."""
    missing: Literal["refuse", "drop"] = "refuse"
    """A candidate that is not in the store is an error, or is dropped from its list and counted."""
    decode: Decode = "likelihood"
    """`likelihood` ranks the whole list by the probability of each ID; `generate` generates text and parses the ID from
    it, as the released scripts do, which gives one item and no ranking."""
    orders: PositiveInt = 1
    """Number of orders in which a model ranks each list, the file's and random ones; of several, results and report say
    how much the answers depend on the order."""
    average_orders: bool = False
    """Score the mean of a candidate's probabilities over these orders, instead of those in the file's order."""
    photo_context: PositiveInt | None = None
    """Longest prompt of the arm `base_photos`, tokens; by default, and at most, the base model's context. A list whose
    photos do not fit is ranked in groups, whose winners meet again."""
    tokens_per_item: PositiveInt | None = None
    """Number of item tokens per candidate, the first ones; by default as in tuning."""
    train: Path | None = None
    """Training conversations, for the popularity baseline."""
    items: tuple[str, ...] = ()
    """Catalogue files with the candidates' titles and texts, for the arms `bm25`, `dense` and `chat`."""
    text: TextSettings = TextSettings()
    """The candidates' texts, for these arms."""
    dense: DenseSettings = DenseSettings()
    """The sentence encoder of the baseline `dense`."""
    chat: ChatSettings = ChatSettings()
    """The model of the arm `chat`."""
    words: Path | None = None
    """Photos as text, for the `words` arms: a jsonl file of {"id", "look"}; by default the descriptions of --shards."""
    shards: tuple[Path, ...] = ()
    """Sets of shards with the candidates' photos, for the report's gallery, `base_photos` and the `words` arms."""
    cache: CacheSettings = CacheSettings()
    """Copies of shards, where `shards` are in an object store."""
    runs: tuple[str, ...] = ()
    """Run folders of stages 1 and 2, each RUN or NAME=RUN, for the report's validation curves."""
    gallery: NonNegativeInt = 24
    """Number of example conversations in the report."""
    title: str = "LaViC evaluation"
    """Heading of the report."""
    cluster: ClusterBy = "both"
    """Conversations that are resampled together for the intervals: those that share a submission or a target (both),
    only a submission, only a target, or none."""
    draws: PositiveInt = 10_000
    """Number of bootstrap resamples."""
    level: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Confidence level of the intervals."""
    seed: Seed = 0
    """Seed of shuffles, resamples and the gallery's sample."""
    limit: PositiveInt | None = None
    """Evaluate only the first conversations of each file, at most this many."""
    model: BaseModelSettings = BaseModelSettings()
    """The base model of --bundle."""
    tokens_per_batch: PositiveInt = 8192
    """Maximum tokens of a batch; memory and speed depend on it, results do not."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the weights. `auto`: bfloat16 on a GPU, float32 on a CPU."""
    nproc: PositiveInt = 1
    """Number of local processes; ignored under torchrun and srun."""
    overwrite: bool = False
    """Replace results of other settings in --out."""
    dry_run: bool = False
    """Check the inputs and print what would be ranked, without loading a model or writing."""
    tracking: TrackingSettings = TrackingSettings()
    """Where the results are recorded besides OUT."""


SETTINGS = EvaluateSettings
"""The command's settings, for `lavic.cli.command_module`."""


def resolve(argv: Sequence[str] | None) -> EvaluateSettings:
    """The settings of a command line."""
    return parse(EvaluateSettings, argv, command="evaluate", description=DESCRIPTION)


def is_complete(settings: EvaluateSettings) -> bool:
    """Whether the results stand: they are written last."""
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
        why = "--orders N, at least 2" if chosen.orders == 1 else "--decode likelihood, which gives probabilities"
        raise ConfigError(f"--average-orders needs {why}")
    world = DistributedContext.from_env()
    if chosen.dry_run:
        print(f"{dry_run_text(chosen, EvaluationSetup.prepare(chosen))}\n{estimate(chosen)}".rstrip())
        return 0
    if chosen.nproc > 1 and world.size == 1:
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
        before = json.loads(path.read_text("utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # no results, or none that can be read
    now = json.loads(json.dumps(flatten(chosen), default=str))
    changed = [key for key in now if key in before and before[key] != now[key] and not key.startswith(FREE)]
    if changed:
        what = "; ".join(f"{key} was {before[key]}, is {now[key]}" for key in changed[:3])
        raise ConfigError(f"{path}: results of other settings ({what}): use another --out, or --overwrite them")


def run(chosen: EvaluateSettings, setup: EvaluationSetup, world: DistributedContext) -> int:
    """Ranks on every rank; rank 0 computes and writes the results."""
    start = time.monotonic()
    node = world.node_rank if world.local_rank == 0 else None
    with Tracker.open(chosen.out, chosen.tracking, main=world.is_main, node=node) as tracker:
        tracker.start("evaluate", flatten(chosen))
        if world.is_main:
            made_from = lineage(setup)
            record_lineage(tracker, chosen, setup, made_from)
        saved = SavedRankings(chosen.out / FOLDER)
        ranked = rank_arms(chosen, setup, world, saved)
        if ranked is None:
            return 0
        setup = setup.without(ranked.failed)
        # The results are written last: with them, all files are of one evaluation.
        for name in (RESULTS, PARTIAL):
            (chosen.out / name).unlink(missing_ok=True)
        write_predictions(chosen.out / FILE, setup.test_sets, ranked.rankings, chosen.cluster)
        write_exchange_files(chosen.out, setup.test_sets, ranked.rankings, title=setup.title, text=setup.text)
        results = compute_results(chosen, setup, ranked.rankings)
        add_model_arms(results, chosen, setup, ranked.models)
        if ranked.chat is not None:
            results["chat"] = ranked.chat.as_dict(setup.test_sets)
        if ranked.failed:
            results["not_run"] = {arm: redact(str(error)) for arm, error in ranked.failed.items()}
        results["lineage"] = made_from
        results["seconds"] = round(time.monotonic() - start, 2)
        _write_report(chosen, setup, ranked.rankings, results)
        file = chosen.out / (PARTIAL if ranked.failed else RESULTS)
        atomic_write(file, json.dumps(results, indent=2) + "\n")
        for name, test_set in results["sets"].items():
            for arm, metrics in test_set["arms"].items():
                values = {f"{name}/{arm}/{metric}": interval["value"] for metric, interval in metrics.items()}
                tracker.log(0, **{key: value for key, value in values.items() if value is not None})
        for path in (file, chosen.out / "report.html"):
            tracker.artifact(path)
        if warning := findings.first_line(results):
            print(f"{warning}\n")
        print(results_table(results))
        print(f"\n{chosen.out / 'report.html'}")
        if ranked.failed:
            raise PartialResults(ranked.failed, file)
        saved.remove()
    return 0


def _write_report(
    chosen: EvaluateSettings,
    setup: EvaluationSetup,
    rankings: Rankings,
    results: Mapping[str, Any],
) -> None:
    from lavic.evaluation.report.blocks import Report
    from lavic.evaluation.report.page import write_report

    test_set, main = setup.test_sets[0], setup.main
    by_arm = rankings[test_set.name]
    gallery = None
    if setup.store is not None:
        gallery = report_sections.gallery(
            test_set,
            by_arm.get(main, ()),
            title=setup.store.title,
            photo=setup.photo,
            others={setup.labels[arm]["label"]: ranked for arm, ranked in by_arm.items() if arm != main},
            count=chosen.gallery,
            seed=chosen.seed,
        )
    sections = [
        report_sections.summary(results, *setup.training.numbers),
        *report_sections.test_set_sections(results),
        *filter(None, (part(results) for part in FINDINGS)),
        *([chat_section(results["chat"])] if "chat" in results else []),
        *setup.training.sections,
        *([gallery] if gallery else []),
        report_sections.method(results),
    ]
    facts = {
        **({"Base model": setup.info.base, "Bundle": str(chosen.bundle)} if setup.info else {}),
        **({"Item store": f"{chosen.store} ({len(setup.store):,} items)"} if setup.store else {}),
        "Conversations": ", ".join(str(test_set.file) for test_set in setup.test_sets),
        "Created": f"{time.strftime('%Y-%m-%d %H:%M')}, lavic {__version__}",
    }
    lead = "Baselines without a model rank the candidate lists of held-out conversations."
    if setup.arms:
        lead = (
            "The tuned model, its controls and baselines rank the candidate lists of held-out conversations. Each "
            "control lacks one of the model's inputs: if a control scores as high, the model does not use that input."
        )
    warning = findings.first_line(results)
    report = Report(title=chosen.title, lead=lead, warning=warning, facts=facts, sections=tuple(sections))
    write_report(report, chosen.out / "report.html")
