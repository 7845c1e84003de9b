"""The sections of a report that every evaluation has, from the data of `results.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lavic.evaluation.report.blocks import Bar, Bars, Block, Number, Numbers, Section, Table, Text
from lavic.metrics.ranking_metrics import HELP, LABELS

TABLE_METRICS = ("hit_rate", "hit_rate_in_list", "recall_micro", "recall_at_3", "mrr", "ndcg_at_10", "valid_ratio")
"""Metrics in the tables; `results.json` has all."""

REFERENCES = ("words", "words_before_tuning", "base_photos")
"""Arms that get the photos in another form: references for what words or all image tokens reach."""


def summary(results: Mapping[str, Any], *extra_numbers: Number) -> Section:
    """The main model's hit rate beside that of the best other arm, then what the caller adds."""
    test_set = results["sets"][results["main_set"]]
    main, names = results["main"], results["labels"]
    hit_rates = {arm: metrics["hit_rate"] for arm, metrics in test_set["arms"].items()}
    others = [arm for arm in hit_rates if arm not in (main, *REFERENCES)]
    numbers = [_number(hit_rates[main], f"HitRatio@1, {names[main]['label']}", "main")]
    if others:
        best = max(others, key=lambda arm: hit_rates[arm]["value"])
        numbers.append(_number(hit_rates[best], f"best of the others: {names[best]['label']}", "muted"))
    numbers += [_number(hit_rates[arm], names[arm]["label"]) for arm in REFERENCES if arm in hit_rates]
    for name, other in results["sets"].items():
        if name != results["main_set"] and main in other["arms"]:
            numbers.append(_number(other["arms"][main]["hit_rate"], f"on {readable(name).lower()}"))
    if test_set["ceiling"]["row"]["value"] < 1:
        numbers.append(_number(test_set["ceiling"]["row"], "upper bound: lists that contain a target"))
    lead = f"{test_set['conversations']:,} conversations, {test_set['list_length']:.3g} candidates each on average."
    return Section(title="Summary", lead=lead, blocks=(Numbers(items=(*numbers, *extra_numbers)),))


def method(results: Mapping[str, Any]) -> Section:
    """How the numbers are computed."""
    settings = results["settings"]
    dependence = {
        "both": "conversations that share a submission or a target, directly or through others, are resampled together",
        "submission": "conversations that share a submission are resampled together",
        "target": "conversations that share a target are resampled together",
        "none": "every conversation is resampled on its own",
    }[settings["cluster"]]
    scoring = {
        "likelihood": "Candidates are ranked by the probability that the model answers with exactly their ID.",
        "generate": "The model generates text greedily; the first ID in it is the answer.",
    }[settings["decode"]]
    paragraphs = (
        *([scoring] if results["base"] else []),
        "Candidates with equal scores have no order: every metric is its expectation over the orders of tied "
        "candidates. A conversation without a ranking is a miss and stays in the denominator.",
        f"Intervals are {settings['level']:.0%} percentile bootstrap intervals of {settings['draws']:,} resamples; "
        f"{dependence}. The value of the random baseline is its exact expectation, and its interval the range of the "
        "scores of random orders of these lists.",
        "Differences are paired: both models are resampled with the same conversations. McNemar's exact test uses the "
        "conversations that only one of the two models got right; p is adjusted for the number of comparisons (Holm).",
    )
    hints = {LABELS[name]: text for name, text in HELP.items()}
    table = Table(columns=("Metric", "Meaning"), rows=tuple((name, text) for name, text in hints.items()), prose=True)
    return Section(title="Method", blocks=(Text(paragraphs=paragraphs), table))


def readable(name: str) -> str:
    """held_out_items -> Held out items."""
    return name.replace("_", " ").capitalize()


def test_set_section(name: str, results: Mapping[str, Any]) -> Section:
    """Hit rates, metrics and comparisons of a test set."""
    test_set, labels, main = results["sets"][name], results["labels"], results["main"]
    rows, cells = [], []
    best = test_set["ceiling"]["row"]["value"]
    columns = [metric for metric in TABLE_METRICS if metric != "hit_rate_in_list" or best < 1]
    for arm, metrics in test_set["arms"].items():
        hit_rate = metrics["hit_rate"]
        tone = "main" if arm == main else "muted"
        label, note = labels[arm]["label"], labels[arm]["note"]
        values = {key: hit_rate[key] for key in ("value", "low", "high")}
        rows.append(Bar(name=label, note=note, tone=tone, **values))
        cells.append((label, *(_cell(metrics[metric]) for metric in columns)))
    blocks: list[Block] = [
        Bars(
            title="HitRatio@1"
            + (f"; dashed: upper bound, {best:.3f} of the lists contain a target" if best < 1 else ""),
            rows=tuple(rows),
            scale=_scale([best * (best < 1), *(row.high or row.value for row in rows)]),
            mark=best if best < 1 else None,
        ),
        Table(
            columns=("Model", *(LABELS[metric] for metric in columns)),
            rows=tuple(cells),
            hints={LABELS[metric]: HELP[metric] for metric in columns},
            strong=tuple(row for row, arm in enumerate(test_set["arms"]) if arm == main),
        ),
    ]
    if test_set["against"]:
        blocks.append(_comparisons(test_set["against"], labels, labels[main]["label"]))
    title = f"Hit rate: {readable(name).lower()}" if len(results["sets"]) > 1 else "Hit rate"
    parts = [
        f"{test_set['conversations']:,} conversations in {test_set['clusters']:,} independent clusters",
        f"upper bound {best:.3f}",
        *(f"{count:,} {kind.replace('_', ' ')}" for kind, count in test_set["left_out"].items()),
    ]
    return Section(title=title, lead="; ".join(parts) + ".", blocks=tuple(blocks))


def _comparisons(comparisons: Mapping[str, Any], labels: Mapping[str, Any], main: str) -> Table:
    rows = []
    for arm, row in comparisons.items():
        counts = (f"{row['first_only']:,}", f"{row['second_only']:,}") if "p" in row else ("", "")
        rows.append((labels[arm]["label"], _cell(row["difference"], sign="+"), *counts, _p(row.get("p_holm"))))
    columns = (f"{main} vs.", "Difference", f"only {main} right", "only the other right", "p")
    return Table(
        columns=columns,
        rows=tuple(rows),
        hints={"p": "McNemar's exact test, or a permutation test where ties are scored; two-sided, adjusted (Holm)"},
    )


def _scale(values: Sequence[float]) -> float:
    """The right end of an axis of shares: 1, or the next tenth if all are small."""
    highest = max(value for value in values if value == value)
    return 1.0 if highest > 0.5 else math.ceil(10 * highest + 1e-9) / 10


def _number(interval: Mapping[str, float], label: str, tone: str = "") -> Number:
    value, _, note = _cell(interval).partition("\n")
    return Number(value=value, label=label, note=note, tone=tone)


def _cell(interval: Mapping[str, float], sign: str = "") -> str:
    dash = " to " if sign else " – "
    if interval["value"] is None:
        return "\u2013"
    text = f"{interval['value']:{sign}.3f}\n{interval['low']:{sign}.3f}{dash}{interval['high']:{sign}.3f}"
    return text.replace("-", "−")


def _p(p: float | None) -> str:
    if p is None:
        return ""
    return "< 0.0001" if p < 0.0001 else f"{p:.4f}"
