"""The sections of a report, from plain data: what `results.json`, `captions.json` and journals hold."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lavic.evaluation.assessment import RANDOM
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
from lavic.evaluation.test_set import Trial
from lavic.metrics.ranking_metrics import HELP, LABELS

TONES = ("main", "second", "third", "muted")
SHOWN = ("hit_rate", "hit_rate_in_list", "released_recall_at_1", "recall_at_3", "mrr", "ndcg_at_10", "valid_ratio")
"""Metrics in the report's tables; `results.json` has all."""

TOLD = ("words", "words_before_tuning")
"""Arms that are told in words what the photos show: no controls, but how far reading would go."""

TILES = 10
"""Candidates shown of a case; a target further down is shown as well."""


def key_numbers(results: Mapping[str, Any], *more: Number) -> Section:
    """The first thing to read: the main arm's hit rate beside the best control's, then what the caller adds."""
    trial = results["sets"][results["main_set"]]
    main, names = results["main"], results["arms"]
    controls = {arm: of["hit_rate"] for arm, of in trial["arms"].items() if arm not in (main, *TOLD)}
    numbers = [_number(trial["arms"][main]["hit_rate"], f"HitRatio@1, {names[main]['label']}", "main")]
    if controls:
        best = max(controls, key=lambda arm: controls[arm]["value"])
        numbers.append(_number(controls[best], f"best control: {names[best]['label']}", "muted"))
    numbers += [_number(trial["arms"][arm]["hit_rate"], names[arm]["label"]) for arm in TOLD if arm in trial["arms"]]
    for name, other in results["sets"].items():
        if name != results["main_set"]:
            numbers.append(_number(other["arms"][main]["hit_rate"], f"on {spoken(name).lower()}"))
    if trial["ceiling"]["value"] < 1:
        numbers.append(_number(trial["ceiling"], "ceiling: lists that hold a target"))
    lead = f"{trial['conversations']:,} conversations, {trial['list_length']:.3g} candidates each on average."
    return Section(title="In short", lead=lead, blocks=(Numbers(items=(*numbers, *more)),))


def trial_sections(results: Mapping[str, Any]) -> tuple[Section, ...]:
    """Hit rates, all metrics and the comparisons of every test set, the main one first."""
    return tuple(_trial(name, results) for name in results["sets"])


def caption_number(scores: Mapping[str, Mapping[str, float]]) -> Number:
    """The same in one figure, for `key_numbers`."""
    others = [
        f"{scores[key]['perplexity']:.2f} {words}"
        for key, words in (("full", "from all tokens"), ("cls_before", "before stage 1"))
        if key in scores
    ]
    value = f"{scores['cls_after']['perplexity']:.2f}"
    return Number(value=value, label="description perplexity from five tokens", note=", ".join(others))


def captions(scores: Mapping[str, Mapping[str, float]]) -> Section:
    """What five tokens say of a photo: description perplexity from all tokens, and from five before and after stage 1.

    Args:
        scores: `captions.json` of a stage-1 run: `full`, `cls_before`, `cls_after`, each with a `perplexity`.
    """
    rows = {
        "full": ("All tokens", "the teacher's view of the photo", "second"),
        "cls_before": ("Five tokens, before stage 1", "", "muted"),
        "cls_after": ("Five tokens, after stage 1", "", "main"),
    }
    bars = tuple(
        Bar(name=name, note=note, tone=tone, value=scores[key]["perplexity"])
        for key, (name, note, tone) in rows.items()
        if key in scores
    )
    return Section(
        title="What five tokens say",
        lead="Perplexity of the descriptions of validation photos; lower is better, 1 is certainty.",
        blocks=(Bars(rows=bars, digits=2),),
    )


def training(
    charts: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]], levels: Mapping[str, Mapping[str, float]] = {}
) -> Section | None:
    """Validation perplexity by step.

    Args:
        charts: Title -> line name -> journal records (`read_journal`); lines without a validation are left out.
        levels: Title -> name -> value of a line to compare with.

    Returns:
        None where no journal holds a validation.
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
    trial: Trial,
    rankings: Sequence[Any],
    *,
    title: Callable[[str], str],
    photo: Callable[[str], bytes | None],
    others: Mapping[str, Sequence[Sequence[str]]],
    count: int = 24,
    seed: int = 0,
) -> Section | None:
    """Conversations to look at, right and wrong in equal parts where there are as many.

    Args:
        trial: The conversations.
        rankings: Of the arm shown: objects with `ids` and `probabilities`, one per conversation.
        title: Of an item.
        photo: Of an item, encoded; None where there is none.
        others: Name of another arm -> its ranked ids per conversation: was it right there?
        count: How many at most.
        seed: Of the choice.

    Returns:
        None where there is nothing to show.
    """
    rows = [row for row, ranking in enumerate(rankings) if ranking.ids and ranking.probabilities]
    hit = {row: rankings[row].ids[0] in trial.conversations[row].targets for row in rows}
    rng = random.Random(seed)
    pools = [[row for row in rows if hit[row] is kind] for kind in (False, True)]
    for pool in pools:
        rng.shuffle(pool)
    wrong, right = pools
    half = max(count // 2, count - len(right))
    chosen = wrong[:half]
    chosen += right[: count - len(chosen)]
    rng.shuffle(chosen)
    if not chosen:
        return None
    cases = tuple(_case(trial, row, rankings[row], title, photo, others) for row in chosen)
    lead = (
        f"{len(chosen)} of {len(rows):,} conversations, drawn at random from the right ({sum(hit.values()):,}) and "
        f"the wrong ({len(rows) - sum(hit.values()):,}) ones, in equal numbers where possible, so not in true "
        "proportion. Candidates stand in the model's order, each with its probability."
    )
    return Section(title="Conversations", lead=lead, blocks=(Gallery(cases=cases),))


def method(results: Mapping[str, Any]) -> Section:
    """How the numbers were made, in words."""
    chosen = results["settings"]
    dependence = {
        "both": "conversations that share a submission or a target, directly or through others, are resampled together",
        "submission": "conversations that share a submission are resampled together",
        "target": "conversations that share a target are resampled together",
        "none": "every conversation is resampled for itself",
    }[chosen["cluster"]]
    how = {
        "likelihood": "Each candidate is scored with the probability that the model answers with exactly its ID; the "
        "list is ranked by it.",
        "generate": "The model writes freely, greedily; the first ID in what it writes is its answer.",
    }[chosen["decode"]]
    words = [
        how,
        f"Intervals are {chosen['level']:.0%} percentile bootstrap intervals over {chosen['draws']:,} resamples; "
        f"{dependence}. The random arm's value is its exact expectation, its range is where a random picker's score "
        "falls on these lists.",
        "Differences are paired: both arms are resampled with the same conversations. McNemar's exact test looks at "
        "the conversations that only one of two arms got right; its p is adjusted for the number of arms after Holm.",
    ]
    hints = {LABELS[name]: text for name, text in HELP.items()}
    table = Table(columns=("Metric", "Meaning"), rows=tuple((name, text) for name, text in hints.items()), prose=True)
    return Section(title="How it was measured", blocks=(Text(paragraphs=tuple(words)), table))


def spoken(name: str) -> str:
    """held_out_items -> Held out items."""
    return name.replace("_", " ").capitalize()


def _trial(name: str, results: Mapping[str, Any]) -> Section:
    trial, labels, main = results["sets"][name], results["arms"], results["main"]
    rows, cells = [], []
    best = trial["ceiling"]["value"]
    columns = [metric for metric in SHOWN if metric != "hit_rate_in_list" or best < 1]
    for arm, metrics in trial["arms"].items():
        one = metrics["hit_rate"]
        tone = "main" if arm == main else "muted"
        label, note = labels[arm]["label"], labels[arm]["note"]
        rows.append(Bar(name=label, note=note, tone=tone, value=one["value"], low=one["low"], high=one["high"]))
        cells.append((label, *(_cell(metrics[metric]) for metric in columns)))
    blocks: list[Block] = [
        Bars(
            title="HitRatio@1"
            if best == 1
            else f"HitRatio@1; dashed: the ceiling, {best:.3f} of the lists hold a target",
            rows=tuple(rows),
            scale=_scale([best * (best < 1), *(row.high or row.value for row in rows)]),
            mark=best if best < 1 else None,
        ),
        Table(
            columns=("Arm", *(LABELS[metric] for metric in columns)),
            rows=tuple(cells),
            hints={LABELS[metric]: HELP[metric] for metric in columns},
            strong=tuple(place for place, arm in enumerate(trial["arms"]) if arm == main),
        ),
    ]
    if trial["against"]:
        blocks.append(_against(trial["against"], labels, labels[main]["label"]))
    title = f"Hit rate: {spoken(name).lower()}" if len(results["sets"]) > 1 else "Hit rate"
    parts = [
        f"{trial['conversations']:,} conversations in {trial['clusters']:,} independent groups",
        f"ceiling {trial['ceiling']['value']:.3f}",
        *(f"{count:,} {kind.replace('_', ' ')}" for kind, count in trial["left_out"].items()),
    ]
    return Section(title=title, lead="; ".join(parts) + ".", blocks=tuple(blocks))


def _against(against: Mapping[str, Any], labels: Mapping[str, Any], main: str) -> Table:
    rows = []
    for arm, row in against.items():
        counts = (f"{row['first_only']:,}", f"{row['second_only']:,}") if arm != RANDOM else ("", "")
        rows.append((labels[arm]["label"], _cell(row["difference"], sign="+"), *counts, _p(row.get("p_holm"))))
    columns = (f"{main} against", "Difference", f"only {main} right", "only the other right", "McNemar p")
    return Table(columns=columns, rows=tuple(rows), hints={"McNemar p": "exact, two-sided, adjusted after Holm"})


def _scale(values: Sequence[float]) -> float:
    """The right edge for shares: 1, or the next tenth where all are small."""
    highest = max(value for value in values if value == value)
    return 1.0 if highest > 0.5 else math.ceil(10 * highest + 1e-9) / 10


def _case(
    trial: Trial,
    row: int,
    ranking: Any,
    title: Callable[[str], str],
    photo: Callable[[str], bytes | None],
    others: Mapping[str, Sequence[Sequence[str]]],
) -> Case:
    conversation = trial.conversations[row]
    targets = set(conversation.targets)
    scored = list(zip(ranking.ids, ranking.probabilities, strict=True))
    shown = [pair for place, pair in enumerate(scored) if place < TILES or pair[0] in targets]
    return Case(
        name=f"{trial.file.name}:{conversation.line}",
        turns=tuple((turn.role, turn.text) for turn in conversation.turns),
        candidates=tuple(
            Candidate(item=item, title=title(item), photo=photo(item), probability=p, target=item in targets)
            for item, p in shown
        ),
        others={name: bool(ids[row]) and ids[row][0] in targets for name, ids in others.items()},
    )


def _number(one: Mapping[str, float], label: str, tone: str = "") -> Number:
    return Number(value=f"{one['value']:.3f}", label=label, note=f"{one['low']:.3f} – {one['high']:.3f}", tone=tone)


def _cell(one: Mapping[str, float], sign: str = "") -> str:
    between = " to " if sign else " – "
    text = f"{one['value']:{sign}.3f}\n{one['low']:{sign}.3f}{between}{one['high']:{sign}.3f}"
    return text.replace("-", "−")


def _p(p: float | None) -> str:
    if p is None:
        return ""
    return "< 0.0001" if p < 0.0001 else f"{p:.4f}"


def _tones() -> list[str]:
    return [*TONES, *["muted"] * 8]
