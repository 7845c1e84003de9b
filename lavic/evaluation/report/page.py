"""Renders a report as a self-contained HTML file, without scripts, in light and dark mode."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from lavic.evaluation.report.blocks import (
    Bars,
    Block,
    Curves,
    Gallery,
    Numbers,
    Reliability,
    Report,
    Section,
    Table,
    Text,
)
from lavic.evaluation.report.charts import curves, interval_bar, reliability, short, ticks
from lavic.evaluation.report.elements import permalink, tag
from lavic.evaluation.report.gallery_page import gallery
from lavic.storage.atomic import atomic_write


def write_report(report: Report, path: Path) -> None:
    """Writes the page to `path`, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, render(report))


def render(report: Report) -> str:
    """The page as one string."""
    style = files("lavic.evaluation.report").joinpath("report.css").read_text("utf-8")
    anchors = _anchors([part.title for part in report.sections])
    links = [
        tag("a", escape(part.title), href=f"#{anchor}") for anchor, part in zip(anchors, report.sections, strict=True)
    ]
    facts = [tag("div", tag("dt", escape(key)), tag("dd", escape(value))) for key, value in report.facts.items()]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
    )
    body = (
        tag(
            "header",
            tag("p", escape(report.warning), class_="warning", role="alert") if report.warning else "",
            tag("p", "LaViC", class_="brand"),
            tag("h1", escape(report.title)),
            tag("p", escape(report.lead), class_="lead") if report.lead else "",
            tag("dl", *facts, class_="facts") if facts else "",
        ),
        tag("nav", *links) if len(links) > 1 else "",
        tag("main", *(_section(n, *pair) for n, pair in enumerate(zip(report.sections, anchors, strict=True), 1))),
    )
    page = tag(
        "html",
        tag("head", head, tag("title", escape(report.title)), tag("style", style)),
        tag("body", *body),
        lang="en",
    )
    return f"<!doctype html>\n{page}\n"


def _anchors(titles: Sequence[str]) -> list[str]:
    """Addresses of sections inside the page, from their titles: they stay when other sections come or go."""
    anchors: list[str] = []
    for title in titles:
        anchor = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"
        while anchor in anchors:
            anchor += "-"
        anchors.append(anchor)
    return anchors


def _section(index: int, section: Section, anchor: str) -> str:
    lead = tag("p", escape(section.lead), class_="lead") if section.lead else ""
    blocks = (_block(block, f"{index}-{n}") for n, block in enumerate(section.blocks))
    return tag("section", tag("h2", escape(section.title), permalink(anchor)), lead, *blocks, id=anchor)


def _block(block: Block, key: str) -> str:
    match block:
        case Numbers():
            return _numbers(block)
        case Text():
            return "".join(tag("p", escape(text)) for text in block.paragraphs)
        case Table():
            return _table(block)
        case Bars():
            return _bars(block)
        case Curves():
            return curves(block.series, x_name=block.x_name, y_name=block.y_name, levels=block.levels)
        case Reliability():
            return reliability(block.bins, name=block.name, tone=block.tone)
        case Gallery():
            return gallery(block, key)


def _numbers(block: Numbers) -> str:
    cards = [
        tag(
            "div",
            tag("strong", escape(item.value)),
            tag("span", escape(item.label), class_="label"),
            tag("span", escape(item.note), class_="note") if item.note else "",
            class_=f"number {item.tone}".strip(),
        )
        for item in block.items
    ]
    return tag("div", *cards, class_="numbers")


def _table(block: Table) -> str:
    def cell(text: str, column: int) -> str:
        main, _, note = text.partition("\n")
        inner = escape(main) + (tag("small", escape(note)) if note else "")
        return tag("td", inner) if column else tag("th", inner, scope="row")

    header_cells = [tag("th", escape(name), title=block.hints.get(name, ""), scope="col") for name in block.columns]
    rows = [
        tag(
            "tr", *(cell(text, column) for column, text in enumerate(row)), class_="strong" if n in block.strong else ""
        )
        for n, row in enumerate(block.rows)
    ]
    table = tag("table", tag("thead", tag("tr", *header_cells)), tag("tbody", *rows))
    return tag("div", table, class_="scroll prose" if block.prose else "scroll")


def _bars(block: Bars) -> str:
    scale = block.scale or max(max(row.value, row.high or 0.0) for row in block.rows) or 1.0
    rows = []
    for row in block.rows:
        interval = ""
        if row.low is not None and row.high is not None:
            interval = f"{row.low:.{block.digits}f} – {row.high:.{block.digits}f}"
        bar = interval_bar(row.value, row.low, row.high, scale=scale, tone=row.tone, mark=block.mark)
        rows.append(
            tag(
                "div",
                tag("div", escape(row.name), tag("small", escape(row.note)) if row.note else "", class_="who"),
                tag("div", bar, class_="plot"),
                tag(
                    "div",
                    tag("b", f"{row.value:.{block.digits}f}"),
                    tag("small", interval) if interval else "",
                    class_="what",
                ),
                class_=f"row {row.tone}",
            )
        )
    marks = [tag("span", short(tick), style=f"left:{100 * tick / scale:.2f}%") for tick in ticks(0, scale)]
    axis = tag("div", tag("div"), tag("div", *marks, class_="marks"), tag("div"), class_="row axis")
    caption = tag("figcaption", escape(block.title)) if block.title else ""
    return tag("figure", caption, *rows, axis, class_="bars")
