"""One evaluation: every rank ranks, rank 0 computes and writes the results."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

from lavic.config import flatten
from lavic.config.secrets import redact
from lavic.distributed.context import DistributedContext
from lavic.evaluation.predictions import FILE, write_predictions
from lavic.evaluation.report import findings
from lavic.evaluation.saved_rankings import FOLDER, SavedRankings
from lavic.launch.evaluation import report
from lavic.launch.evaluation.arm_rankings import rank_arms
from lavic.launch.evaluation.exchange_files import write_exchange_files
from lavic.launch.evaluation.lineage import lineage, record_lineage
from lavic.launch.evaluation.results import PARTIAL, RESULTS, PartialResults, add_model_arms, compute_results
from lavic.launch.evaluation.summary import results_table
from lavic.storage.atomic import atomic_write
from lavic.tracking.tracker import Tracker

if TYPE_CHECKING:
    from lavic.launch.evaluation.settings import EvaluateSettings
    from lavic.launch.evaluation.setup.evaluation_setup import EvaluationSetup


def run(chosen: EvaluateSettings, setup: EvaluationSetup, world: DistributedContext) -> int:
    """Ranks on every rank; rank 0 computes and writes the results."""
    start = time.monotonic()
    node = world.node_rank if world.local_rank == 0 else None
    with Tracker.open(chosen.out, chosen.tracking, main=world.is_main, node=node) as tracker:
        tracker.start("evaluate", flatten(chosen))
        if world.is_main:
            made_from = lineage(setup)
            record_lineage(tracker, chosen, setup, made_from)
        saved = SavedRankings(chosen.out / FOLDER if world.is_main else None)
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
        report.write_page(chosen, setup, ranked.rankings, results)
        file = chosen.out / (PARTIAL if ranked.failed else RESULTS)
        atomic_write(file, json.dumps(results, indent=2) + "\n")
        for name, test_set in results["sets"].items():
            for arm, metrics in test_set["arms"].items():
                values = {f"{name}/{arm}/{metric}": interval["value"] for metric, interval in metrics.items()}
                tracker.log(0, **{key: value for key, value in values.items() if value is not None})
        for path in (file, chosen.out / report.FILE):
            tracker.artifact(path)
        if warning := findings.first_line(results):
            print(f"{warning}\n")
        print(results_table(results))
        print(f"\n{chosen.out / 'report.html'}")
        if ranked.failed:
            raise PartialResults(ranked.failed, file)
        saved.remove()
    return 0
