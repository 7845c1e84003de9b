"""`lavic evaluate compare`: finished evaluations side by side, from their folders alone."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PositiveInt

from lavic.config import Positional, Seed, flatten, parse, settings
from lavic.errors import ConfigError, DataError
from lavic.evaluation import compare
from lavic.evaluation.assessment import RANDOM
from lavic.evaluation.predictions import PredictionSet, read_predictions
from lavic.launch.evaluation.results import PARTIAL, RESULTS
from lavic.storage.atomic import atomic_write
from lavic.storage.json_text import parse_json
from lavic.storage.output_folder import lock_output_folder
from lavic.storage.text_files import read_text

DESCRIPTION = """Compares finished evaluations of the same conversations: metrics with intervals, paired differences to
the first, exact tests adjusted for their number. Reads results.json and predictions.jsonl of each folder, nothing else.

  lavic evaluate compare evaluation-a evaluation-b
  lavic evaluate compare evaluation@lavic evaluation@bm25
  lavic evaluate compare lavic=seed-0 lavic=seed-1 lavic=seed-2 titles=titles-0 titles=titles-1 titles=titles-2

Folders with one NAME are seeds of one system and are pooled: their mean, its interval over conversations and seeds."""

COMPARISON = "comparison.json"


@settings
class CompareSettings:
    """Compare finished evaluations."""

    evaluations: Annotated[tuple[str, ...], Positional]
    """Folders of `lavic evaluate`, each FOLDER, NAME=FOLDER or NAME=FOLDER@ARM; by default the main arm."""
    test: str | None = None
    """Name of the test set; by default the main one of each folder."""
    out: Path | None = None
    """Folder for comparison.json."""
    draws: PositiveInt = 10_000
    """Number of bootstrap resamples."""
    level: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Confidence level of the intervals."""
    seed: Seed = 0
    """Seed of the resamples."""


def main(argv: Sequence[str]) -> int:
    """Runs the command."""
    chosen = parse(CompareSettings, argv, command="evaluate compare", description=DESCRIPTION)
    systems: dict[str, list[compare.Seed]] = {}
    for text in chosen.evaluations:
        name, seed = _read(text, chosen.test)
        if name == text and name in systems:
            raise ConfigError(f"{text}: given twice: folders are seeds of one system where they have one NAME=")
        systems.setdefault(name, []).append(seed)
    if sum(map(len, systems.values())) < 2:
        raise ConfigError("name at least two evaluations to compare")
    results = compare.compare_systems(systems, draws=chosen.draws, level=chosen.level, seed=chosen.seed)
    results["settings"] = flatten(chosen)
    print(comparison_table(results))
    if chosen.out is not None:
        with lock_output_folder(chosen.out):
            atomic_write(chosen.out / COMPARISON, json.dumps(results, indent=2) + "\n")
        print(f"\n{chosen.out / COMPARISON}")
    return 0


def _read(text: str, test: str | None) -> tuple[str, compare.Seed]:
    """[NAME=]FOLDER[@ARM]. Without a name each is a system of its own, named by its words."""
    name, equals, path = text.partition("=")
    if not equals or not re.fullmatch(r"[\w-]+", name):
        name, path = text, text
    folder, separator, arm = path.rpartition("@")
    if not separator or Path(path).is_dir():
        folder, arm = path, ""
    return name, read_seed(Path(folder), arm or None, test)


def read_seed(folder: Path, arm: str | None = None, test: str | None = None) -> compare.Seed:
    """An arm of a finished evaluation on a test set, by default the main ones.

    Raises:
        ConfigError: It has no such arm or test set.
        DataError: It is not a finished evaluation.
    """
    results = read_results(folder)
    arm, test = arm or results["main"], test or results["main_set"]
    if test not in results["sets"]:
        raise ConfigError(f"{folder}: no test set {test}; it has: {', '.join(results['sets'])}")
    if arm not in results["sets"][test]["arms"]:
        raise ConfigError(f"{folder}: no arm {arm} on {test}; it has: {', '.join(results['sets'][test]['arms'])}")
    rows = read_predictions(folder).get(test)
    if rows is None:
        if arm != RANDOM:
            raise DataError(f"{folder}: no predictions of {test}: evaluate again")
        rows = PredictionSet(name=test)
    if not rows.ids:
        raise ConfigError(f"{folder}: an evaluation of {RANDOM} alone has no predictions: add the arm list_order to it")
    if arm != RANDOM and arm not in rows.rankings:
        raise DataError(f"{folder}: no predictions of {arm}: evaluate again")
    return compare.Seed(source=str(folder), rows=rows, arm=arm)


def read_results(folder: Path) -> dict[str, Any]:
    """`results.json` of a finished evaluation.

    Raises:
        DataError: There is none, or of another version.
    """
    path = folder / RESULTS
    if not path.is_file():
        reason = f"some arms have not run, see {PARTIAL}" if (folder / PARTIAL).is_file() else f"no {RESULTS}"
        raise DataError(f"{folder}: not a finished evaluation ({reason})")
    try:
        results = parse_json(read_text(path))
        _ = results["main"], results["main_set"], {name: part["arms"] for name, part in results["sets"].items()}
        return dict(results)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise DataError(f"{path}: not the results of this version of lavic: evaluate again") from None


def comparison_table(results: Mapping[str, Any]) -> str:
    """The comparison for a terminal."""
    systems, main = results["systems"], results["main"]
    width = max(len("system"), *map(len, systems))
    level = f"[{results['settings']['level']:.0%} interval]"
    lines = [
        f"{results['conversations']:,} conversations, {results['clusters']:,} clusters",
        f"  {'system':<{width}}  seeds  HitRatio@1  {level:<16}     MRR  NDCG@10  {main} minus it",
    ]
    for name, system in systems.items():
        metrics = system["metrics"]
        hits, mrr, ndcg = metrics["hit_rate"], metrics["mrr"]["value"], metrics["ndcg_at_10"]["value"]
        line = f"  {name:<{width}}  {system['seeds']:>5}  {hits['value']:>10.3f}  {_interval(hits):<16}"
        line += f"  {mrr:>6.3f}  {ndcg:>7.3f}"
        if against := results["against"].get(name):
            line += f"  {against['difference']['value']:+.3f} {_interval(against['difference'], '+')}"
            line += f", p {against['p_holm']:.4f} ({against['test']}, Holm)" if "p_holm" in against else ""
        lines.append(line)
    return "\n".join(lines)


def _interval(value: Mapping[str, float], sign: str = "") -> str:
    return f"[{value['low']:{sign}.3f}, {value['high']:{sign}.3f}]"
