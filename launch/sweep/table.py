"""`lavic submit table`: the finished cells of a sweep as one table, seeds pooled, with intervals."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PositiveInt

from lavic.config import Positional, Seed, parse, settings
from lavic.errors import ConfigError
from lavic.evaluation import compare
from lavic.evaluation.predictions import PredictionSet
from lavic.launch.evaluation.compare import read_results, read_seed
from lavic.launch.pipeline.dag import Layout
from lavic.launch.sweep.cells import Sweep, cell_output, is_complete
from lavic.storage.atomic import atomic_write

DESCRIPTION = """Puts the finished evaluations of a sweep into one table: each arm on each category and candidate list,
and over all categories together. Seeds are pooled: a value is their mean, and its interval is over clusters of
conversations and over seeds. Writes OUT/table.json and OUT/table.md.

  lavic submit table /shared/lavic"""

METRICS = ("hit_rate", "recall_micro", "mrr", "ndcg_at_10", "valid_ratio")
HEADS = ("HitRatio@1", "Recall@1 micro", "MRR", "NDCG@10", "ValidRatio")
ALL = "all"
"""The row of all categories together."""


@settings
class TableSettings:
    """Which sweep."""

    out: Annotated[Path, Positional]
    """The pipeline's folder."""
    draws: PositiveInt = 10_000
    """Number of bootstrap resamples."""
    level: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Confidence level of the intervals."""
    seed: Seed = 0
    """Seed of the resamples."""


def main(argv: Sequence[str]) -> int:
    """Runs the command."""
    chosen = parse(TableSettings, argv, command="submit table", description=DESCRIPTION)
    out = Layout(chosen.out).out
    table = make_table(out, draws=chosen.draws, level=chosen.level, seed=chosen.seed)
    text = as_markdown(table)
    atomic_write(out / "table.json", json.dumps(table, indent=2) + "\n")
    atomic_write(out / "table.md", text + "\n")
    print(text)
    print(f"\n{out / 'table.md'}")
    return 0


def make_table(out: Path, *, draws: int = 10_000, level: float = 0.95, seed: int = 0) -> dict[str, Any]:
    """The table of a sweep.

    Returns:
        `rows`: category, candidates, arm, seeds, conversations, `ceiling` of the list (row and micro), `metrics` with
        intervals, `spread` between seeds; `missing`: the cells without an evaluation.

    Raises:
        ConfigError: There is no sweep, or nothing of it is finished.
        DataError: A cell's results cannot be read.
    """
    sweep = Sweep.read(out)
    if not sweep.cells:
        raise ConfigError(f"{out}: no sweep: give the --out of a `lavic submit` with `sweep`")
    finished = [name for name in sweep.cells if is_complete(out, "evaluate", name)]
    if not finished:
        raise ConfigError(f"{out}: none of the {len(sweep.cells)} cells is evaluated yet: see `lavic submit status`")
    groups: dict[tuple[str, str], dict[str, dict[int, compare.Seed]]] = defaultdict(lambda: defaultdict(dict))
    for name in finished:
        cell, folder = sweep.parts[name], cell_output(out, "evaluate", name)
        results = read_results(folder)
        for arm in results["sets"][results["main_set"]]["arms"]:
            groups[cell.category, cell.candidates][arm][cell.seed] = read_seed(folder, arm)
    rows = [
        _row(category, candidates, arm, list(seeds.values()), draws=draws, level=level, seed=seed)
        for category, candidates, arms in _with_all(groups)
        for arm, seeds in arms.items()
    ]
    return {
        "rows": rows,
        "missing": [name for name in sweep.cells if name not in finished],
        "settings": {"draws": draws, "level": level, "seed": seed},
    }


Group = Mapping[str, Mapping[int, compare.Seed]]
"""Arm -> seed -> its evaluation."""


def _with_all(groups: Mapping[tuple[str, str], Group]) -> Iterator[tuple[str, str, Group]]:
    """The groups, and behind those of each candidate list its categories together, by the seeds that all have."""
    for candidates in dict.fromkeys(key for _, key in groups):
        parts = {category: group for (category, key), group in groups.items() if key == candidates}
        for category, group in parts.items():
            yield category, candidates, group
        if len(parts) < 2:
            continue
        first, *other_groups = parts.values()
        shared = [arm for arm in first if all(arm in other for other in other_groups)]
        joined: dict[str, dict[int, compare.Seed]] = {}
        for arm in shared:
            seeds = [seed for seed in first[arm] if all(seed in other[arm] for other in other_groups)]
            if seeds:
                joined[arm] = {
                    seed: _joined({category: group[arm][seed] for category, group in parts.items()}) for seed in seeds
                }
        yield ALL, candidates, joined


def _joined(seeds: Mapping[str, compare.Seed]) -> compare.Seed:
    """The conversations of several categories as one set."""
    ids: list[str] = []
    joined = PredictionSet(name=ALL, ids=ids)
    arm = next(iter(seeds.values())).arm
    has_rows = all(arm in seed.rows.rankings for seed in seeds.values())
    for category, seed in seeds.items():
        offset = max(joined.clusters, default=-1) + 1
        ids += [f"{category}/{id}" for id in seed.rows.ids]
        joined.targets.extend(seed.rows.targets)
        joined.lists.extend(seed.rows.lists)
        joined.clusters.extend(offset + number for number in seed.rows.clusters)
        if has_rows:
            joined.rankings.setdefault(arm, []).extend(seed.rows.rankings[arm])
    return compare.Seed(source=", ".join(seed.source for seed in seeds.values()), rows=joined, arm=arm)


def _row(
    category: str, candidates: str, arm: str, seeds: Sequence[compare.Seed], *, draws: int, level: float, seed: int
) -> dict[str, Any]:
    results = compare.compare_systems({arm: seeds}, draws=draws, level=level, seed=seed)
    system = results["systems"][arm]
    return {
        "category": category,
        "candidates": candidates,
        "arm": arm,
        "seeds": system["seeds"],
        "conversations": results["conversations"],
        "ceiling": {kind: interval["value"] for kind, interval in system["ceiling"].items()},
        "metrics": system["metrics"],
        **({"spread": system["spread"]} if "spread" in system else {}),
    }


def as_markdown(table: Mapping[str, Any]) -> str:
    """The table as text."""
    lines = [
        "| category | candidates | arm | seeds | n | ceiling | " + " | ".join(HEADS) + " |",
        "|" + "---|" * (6 + len(HEADS)),
    ]
    for row in table["rows"]:
        cells = [row["category"], row["candidates"].removeprefix("candidates_"), row["arm"], str(row["seeds"])]
        cells += [f"{row['conversations']:,}", f"{row['ceiling']['row']:.3f}"]
        cells += [_cell(row["metrics"].get(metric)) for metric in METRICS]
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    lines.append(f"Intervals: {table['settings']['level']:.0%}, over clusters of conversations and over seeds.")
    if table["missing"]:
        lines.append(f"Not evaluated yet: {', '.join(table['missing'])}.")
    return "\n".join(lines)


def _cell(interval: Mapping[str, float | None] | None) -> str:
    if interval is None or interval["value"] is None:
        return "–"
    return f"{interval['value']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"
