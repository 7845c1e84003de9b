"""The report's sections on the runs that made a bundle, from `captions.json` and journals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lavic.evaluation.report.blocks import Bar, Bars, Block, Curves, Number, Section
from lavic.evaluation.report.charts import Level, Series

TONES = ("main", "second", "third", "muted")


def description_number(scores: Mapping[str, Mapping[str, float]]) -> Number:
    """The description perplexity after stage 1, for `summary`; `scores` as for `descriptions`."""
    notes = [
        f"{scores[key]['perplexity']:.2f} {source}"
        for key, source in (("full", "from all tokens"), ("cls_before", "before stage 1"))
        if key in scores
    ]
    value = f"{scores['cls_after']['perplexity']:.2f}"
    return Number(value=value, label="description perplexity from five tokens", note=", ".join(notes))


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
        for number, (name, records) in enumerate(lines.items()):
            points = [(r["step"], r["valid_perplexity"]) for r in records if r.get("valid_perplexity") is not None]
            if points:
                series.append(Series(name=name, points=tuple(points), tone=TONES[min(number, len(TONES) - 1)]))
        if series:
            dashed = tuple(Level(name=name, value=value) for name, value in levels.get(title, {}).items())
            blocks.append(Curves(series=tuple(series), y_name=title, levels=dashed))
    if not blocks:
        return None
    return Section(title="Training", lead="Validation perplexity by optimizer step.", blocks=tuple(blocks))
