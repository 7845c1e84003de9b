"""Renders a report as a self-contained HTML file, without scripts, in light and dark mode."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from PIL import Image

from lavic.evaluation.report.blocks import (
    Bars,
    Block,
    Candidate,
    Case,
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
from lavic.storage.atomic import atomic_write

THUMBNAIL = 192
"""Pixels of a photo's longer side: 96 CSS pixels at double density."""


def write_report(report: Report, path: Path) -> Path:
    """Writes the page to `path`, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, render(report))
    return path


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


def tag(name: str, *children: str, **attributes: str) -> str:
    """An element. Children are HTML; attributes are escaped, and may end in _ (`class_`, `for_`)."""
    written = "".join(f' {key.rstrip("_")}="{escape(text)}"' for key, text in attributes.items() if text)
    return f"<{name}{written}>{''.join(children)}</{name}>"


def _anchors(titles: Sequence[str]) -> list[str]:
    """Addresses of sections inside the page, from their titles: they stay when other sections come or go."""
    anchors: list[str] = []
    for title in titles:
        anchor = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"
        while anchor in anchors:
            anchor += "-"
        anchors.append(anchor)
    return anchors


def _permalink(anchor: str) -> str:
    """A link of an element to itself."""
    return tag("a", "#", class_="permalink", href=f"#{anchor}", title="Link to this place")


def _section(index: int, part: Section, anchor: str) -> str:
    lead = tag("p", escape(part.lead), class_="lead") if part.lead else ""
    blocks = (_block(block, f"{index}-{n}") for n, block in enumerate(part.blocks))
    return tag("section", tag("h2", escape(part.title), _permalink(anchor)), lead, *blocks, id=anchor)


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
            bins = [(row.confidence, row.hit_rate, row.count) for row in block.bins]
            return reliability(bins, name=block.name, tone=block.tone)
        case Gallery():
            return _gallery(block, key)


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
        main, _, small = text.partition("\n")
        inner = escape(main) + (tag("small", escape(small)) if small else "")
        return tag("td", inner) if column else tag("th", inner, scope="row")

    heads = [tag("th", escape(name), title=block.hints.get(name, ""), scope="col") for name in block.columns]
    rows = [
        tag(
            "tr", *(cell(text, column) for column, text in enumerate(row)), class_="strong" if n in block.strong else ""
        )
        for n, row in enumerate(block.rows)
    ]
    table = tag("table", tag("thead", tag("tr", *heads)), tag("tbody", *rows))
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


def _gallery(block: Gallery, key: str) -> str:
    """Cases filtered by radio buttons, without scripts: a rule for each button hides the cases that it leaves out."""
    names = list(dict.fromkeys(name for case in block.cases for name in case.others))
    choices: list[tuple[str, str, int]] = [("all", "All", len(block.cases))]
    choices += [(kind, kind.capitalize(), sum(_kind(case) == kind for case in block.cases)) for kind in _KINDS]
    rows = [("", choices)]
    for number, name in enumerate(names):
        counts = [sum(kind in _outcomes(case, names) for case in block.cases) for kind in _against(number)]
        pair = zip(_against(number), ("won", "lost"), counts, strict=True)
        rows.append((f"Against {name}:", [(value, label, count) for value, label, count in pair]))
    inputs, lines, rules = [], [], []
    for title, options in rows:
        labels = []
        for value, label, count in options:
            button = f"show-{key}-{value}"
            checked = " checked" if value == "all" else ""
            inputs.append(f'<input type="radio" name="show-{key}" id="{button}"{checked}>')
            labels.append(tag("label", f"{label} <b>{count}</b>", for_=button))
            rules.append(f'#{button}:checked ~ .filters [for="{button}"] {{ {_CHOSEN} }}')
            rules.append(f'#{button}:focus-visible ~ .filters [for="{button}"] {{ {_FOCUSED} }}')
            if value != "all":
                rules.append(f"#{button}:checked ~ .cases > :not(.{value}) {{ display: none; }}")
        lines.append(tag("div", tag("span", escape(title)) if title else "", *labels, class_="filter"))
    cases = tag("div", *(_case(case, names) for case in block.cases), class_="cases")
    return tag(
        "div", tag("style", "\n".join(rules)), *inputs, tag("div", *lines, class_="filters"), cases, class_="gallery"
    )


_KINDS = ("right", "wrong")
_CHOSEN = "background: var(--ink); border-color: var(--ink); color: var(--paper);"
_FOCUSED = "outline: 2px solid var(--main); outline-offset: 2px;"


def _kind(case: Case) -> str:
    return "right" if case.right else "wrong"


def _against(number: int) -> tuple[str, str]:
    """Classes of cases that were won and lost against a model, by its number."""
    return f"won-{number}", f"lost-{number}"


def _outcomes(case: Case, names: Sequence[str]) -> set[str]:
    """Against which models a case was won (only the main model is right) or lost (only the other one is)."""
    return {_against(names.index(name))[right] for name, right in case.others.items() if right != case.right}


def _case(case: Case, names: Sequence[str]) -> str:
    turns = [tag("div", tag("span", role), tag("p", escape(text)), class_=f"turn {role}") for role, text in case.turns]
    others = [
        tag("li", f"{'✓' if right else '✗'} {escape(name)}", class_="good" if right else "bad")
        for name, right in case.others.items()
    ]
    asked = tag("div", *turns, tag("ul", *others, class_="others") if others else "", class_="asked")
    tiles = tag("ol", *(_tile(candidate, rank) for rank, candidate in enumerate(case.candidates, 1)), class_="tiles")
    kind = " ".join(["case", _kind(case), *sorted(_outcomes(case, names))])
    link = _permalink(case.anchor) if case.anchor else ""
    name = tag("small", escape(case.name), link) if case.name or link else ""
    heading = tag("h3", escape(verdict(case)), name)
    return tag("article", heading, asked, tiles, class_=kind, id=case.anchor)


def verdict(case: Case) -> str:
    """Whether the first candidate is right, its probability, and the rank of the target."""
    if not case.candidates:
        return "✗ No answer"
    confidence = percent(case.candidates[0].probability)
    if case.right:
        return f"✓ Right ({confidence})"
    for rank, candidate in enumerate(case.candidates, 1):
        if candidate.target:
            return f"✗ Wrong ({confidence}): the target has rank {rank} ({percent(candidate.probability)})"
    return f"✗ Wrong ({confidence}): the target is not in the list"


def _tile(candidate: Candidate, rank: int) -> str:
    marks = []
    if rank == 1:
        marks.append(tag("span", "rank 1", class_="mark pick"))
    if candidate.target:
        marks.append(tag("span", "✓ target", class_="mark target"))
    picture = tag("div", "no photo", class_="missing")
    if candidate.photo is not None:
        picture = f'<img alt="{escape(candidate.title)}" loading="lazy" src="{data_uri(candidate.photo)}">'
    width = f"width:{100 * max(0.0, min(1.0, candidate.probability)):.1f}%"
    kind = ("picked " if rank == 1 else "") + ("target" if candidate.target else "")
    return tag(
        "li",
        tag("div", picture, *marks, class_="photo"),
        tag("div", tag("i", style=width), class_="sure"),
        tag("b", percent(candidate.probability)),
        tag("span", escape(candidate.title), class_="title", title=f"{candidate.item}: {candidate.title}"),
        class_=kind.strip(),
    )


def percent(probability: float) -> str:
    """97 %, 0.4 %, <0.1 %: never rounded to 0 or 100."""
    if 0 < probability < 0.001:
        return "<0.1 %"
    if probability < 0.1 or 0.995 <= probability < 1:
        return f"{min(probability, 0.999):.1%}".replace("%", " %")
    return f"{probability:.0%}".replace("%", " %")


def data_uri(photo: bytes) -> str:
    """An image as a data URI of a small JPEG; a small JPEG is used as it is."""
    if len(photo) > 12_000 or photo[:2] != b"\xff\xd8":
        with Image.open(io.BytesIO(photo)) as image:
            small = image.convert("RGB")
            small.thumbnail((THUMBNAIL, THUMBNAIL))
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=82)
        photo = buffer.getvalue()
    return f"data:image/jpeg;base64,{base64.b64encode(photo).decode('ascii')}"
