"""The sections of a report, from the data of `results.json`, `captions.json` and journals."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lavic.evaluation.report.blocks import (
    Bar,
    Bars,
    Block,
    Candidate,
    Case,
    Curves,
    Gallery,
    Number,
    Numbers,
    Section,
    Table,
    Text,
)
from lavic.evaluation.report.charts import Level, Series
from lavic.evaluation.test_set import TestSet
from lavic.metrics.ranking_metrics import HELP, LABELS

if TYPE_CHECKING:
    from lavic.recommend.ranked_list import RankedList

TONES = ("main", "second", "third", "muted")
TABLE_METRICS = (
    "hit_rate",
    "hit_rate_in_list",
    "recall_micro",
    "recall_at_3",
    "mrr",
    "ndcg_at_10",
    "valid_ratio",
)
"""Metrics in the tables; `results.json` has all."""

REFERENCES = ("words", "words_before_tuning", "base_photos")
"""Arms that get the photos in another form: not controls, but references for what words or all image tokens reach."""

MAX_TILES = 10
"""Candidates shown of a case, and any target behind them."""


def summary(results: Mapping[str, Any], *more: Number) -> Section:
    """The main model's hit rate beside the best control's, then what the caller adds."""
    test_set = results["sets"][results["main_set"]]
    main, names = results["main"], results["labels"]
    hit_rates = {arm: metrics["hit_rate"] for arm, metrics in test_set["arms"].items()}
    controls = [arm for arm in hit_rates if arm not in (main, *REFERENCES)]
    numbers = [_number(hit_rates[main], f"HitRatio@1, {names[main]['label']}", "main")]
    if controls:
        best = max(controls, key=lambda arm: hit_rates[arm]["value"])
        numbers.append(_number(hit_rates[best], f"best control: {names[best]['label']}", "muted"))
    numbers += [_number(hit_rates[arm], names[arm]["label"]) for arm in REFERENCES if arm in hit_rates]
    for name, other in results["sets"].items():
        if name != results["main_set"] and main in other["arms"]:
            numbers.append(_number(other["arms"][main]["hit_rate"], f"on {readable(name).lower()}"))
    if test_set["ceiling"]["row"]["value"] < 1:
        numbers.append(_number(test_set["ceiling"]["row"], "upper bound: lists that contain a target"))
    lead = f"{test_set['conversations']:,} conversations, {test_set['list_length']:.3g} candidates each on average."
    return Section(title="Summary", lead=lead, blocks=(Numbers(items=(*numbers, *more)),))


def test_set_sections(results: Mapping[str, Any]) -> tuple[Section, ...]:
    """Hit rates, metrics and comparisons of each test set, the main one first."""
    return tuple(_test_set(name, results) for name in results["sets"])


def description_number(scores: Mapping[str, Mapping[str, float]]) -> Number:
    """The description perplexity after stage 1, for `summary`; `scores` as for `descriptions`."""
    others = [
        f"{scores[key]['perplexity']:.2f} {source}"
        for key, source in (("full", "from all tokens"), ("cls_before", "before stage 1"))
        if key in scores
    ]
    value = f"{scores['cls_after']['perplexity']:.2f}"
    return Number(value=value, label="description perplexity from five tokens", note=", ".join(others))


def descriptions(scores: Mapping[str, Mapping[str, float]]) -> Section:
    """Description perplexity from all tokens, and from five tokens before and after stage 1.

    Args:
        scores: `captions.json` of a stage-1 run: `full`, `cls_before`, `cls_after`, each with a `perplexity`.
    """
    rows = {
        "full": ("All tokens", "the teacher's input", "second"),
        "cls_before": ("Five tokens, before stage 1", "", "muted"),
        "cls_after": ("Five tokens, after stage 1", "", "main"),
    }
    bars = tuple(
        Bar(name=name, note=note, tone=tone, value=scores[key]["perplexity"])
        for key, (name, note, tone) in rows.items()
        if key in scores
    )
    return Section(
        title="Descriptions from five tokens",
        lead="Perplexity of the descriptions of validation photos; lower is better.",
        blocks=(Bars(rows=bars, digits=2),),
    )


def training(
    charts: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]], levels: Mapping[str, Mapping[str, float]] = {}
) -> Section | None:
    """Validation perplexity by step.

    Args:
        charts: Title -> run name -> journal records (`read_journal`); runs without a validation are left out.
        levels: Title -> name -> value of a horizontal reference line.

    Returns:
        None if no journal has a validation.
    """
    blocks: list[Block] = []
    for title, lines in charts.items():
        series = []
        for (name, records), tone in zip(lines.items(), _tones(), strict=False):
            points = [(r["step"], r["valid_perplexity"]) for r in records if r.get("valid_perplexity") is not None]
            if points:
                series.append(Series(name=name, points=tuple(points), tone=tone))
        if series:
            dashed = tuple(Level(name=name, value=value) for name, value in levels.get(title, {}).items())
            blocks.append(Curves(series=tuple(series), y_name=title, levels=dashed))
    if not blocks:
        return None
    return Section(title="Training", lead="Validation perplexity by optimizer step.", blocks=tuple(blocks))


def gallery(
    test_set: TestSet,
    rankings: Sequence[RankedList | None],
    *,
    title: Callable[[str], str],
    photo: Callable[[str], bytes | None],
    others: Mapping[str, Sequence[RankedList | None]],
    count: int = 24,
    seed: int = 0,
) -> Section | None:
    """Example conversations: hits and misses of the main model, in equal numbers where possible.

    Args:
        test_set: The conversations.
        rankings: The main model's ranking of each conversation; one without probabilities is not shown.
        title: The title of an item.
        photo: The encoded photo of an item, or None.
        others: Label of another model -> its ranking of each conversation.
        count: Maximum number of examples.
        seed: Seed of the sample.

    Returns:
        None if there is nothing to show.
    """
    shown = {row: ranking for row, ranking in enumerate(rankings) if ranking and ranking.ids and ranking.probabilities}
    rows = list(shown)
    hit = {row: ranking.ids[0] in test_set.conversations[row].targets for row, ranking in shown.items()}
    rng = random.Random(seed)
    pools = [[row for row in rows if hit[row] is kind] for kind in (False, True)]
    for pool in pools:
        rng.shuffle(pool)
    wrong, right = pools
    half = max(count // 2, count - len(right))
    sample = wrong[:half]
    sample += right[: count - len(sample)]
    rng.shuffle(sample)
    if not sample:
        return None
    cases = tuple(_case(test_set, row, shown[row], title, photo, others) for row in sample)
    hits = sum(hit.values())
    lead = (
        f"{len(sample)} of {len(rows):,} conversations, sampled from {hits:,} hits and {len(rows) - hits:,} misses in "
        "equal numbers where possible, not in their true proportion. Candidates are sorted by probability."
    )
    return Section(title="Conversations", lead=lead, blocks=(Gallery(cases=cases),))


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


def _test_set(name: str, results: Mapping[str, Any]) -> Section:
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


def _case(
    test_set: TestSet,
    row: int,
    ranking: RankedList,
    title: Callable[[str], str],
    photo: Callable[[str], bytes | None],
    others: Mapping[str, Sequence[RankedList | None]],
) -> Case:
    conversation = test_set.conversations[row]
    targets = set(conversation.targets)
    scored = list(zip(ranking.ids, ranking.probabilities, strict=True))
    shown = [pair for index, pair in enumerate(scored) if index < MAX_TILES or pair[0] in targets]
    return Case(
        name=f"{test_set.file.name}:{conversation.line}",
        anchor=f"row-{conversation.line}",
        turns=tuple((turn.role, turn.text) for turn in conversation.turns),
        candidates=tuple(
            Candidate(item=item, title=title(item), photo=photo(item), probability=p, target=item in targets)
            for item, p in shown
        ),
        others={
            name: (other := ranked[row]) is not None and bool(other.ids) and other.ids[0] in targets
            for name, ranked in others.items()
        },
    )


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


def _tones() -> list[str]:
    return [*TONES, *["muted"] * 8]
