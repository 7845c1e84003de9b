"""Example conversations as HTML, filtered by radio buttons without scripts."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

from PIL import Image

from lavic.evaluation.report.blocks import Candidate, Case, Gallery
from lavic.evaluation.report.elements import permalink, tag

THUMBNAIL = 192
"""Pixels of a photo's longer side: 96 CSS pixels at double density."""


def gallery(block: Gallery, key: str) -> str:
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
    other_models = [
        tag("li", f"{'✓' if right else '✗'} {escape(name)}", class_="good" if right else "bad")
        for name, right in case.others.items()
    ]
    conversation = tag("div", *turns, tag("ul", *other_models, class_="others") if other_models else "", class_="asked")
    tiles = tag("ol", *(_tile(candidate, rank) for rank, candidate in enumerate(case.candidates, 1)), class_="tiles")
    classes = " ".join(["case", _kind(case), *sorted(_outcomes(case, names))])
    link = permalink(case.anchor) if case.anchor else ""
    name = tag("small", escape(case.name), link) if case.name or link else ""
    heading = tag("h3", escape(verdict(case)), name)
    return tag("article", heading, conversation, tiles, class_=classes, id=case.anchor)


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
    classes = ("picked " if rank == 1 else "") + ("target" if candidate.target else "")
    return tag(
        "li",
        tag("div", picture, *marks, class_="photo"),
        tag("div", tag("i", style=width), class_="sure"),
        tag("b", percent(candidate.probability)),
        tag("span", escape(candidate.title), class_="title", title=f"{candidate.item}: {candidate.title}"),
        class_=classes.strip(),
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
            thumbnail = image.convert("RGB")
            thumbnail.thumbnail((THUMBNAIL, THUMBNAIL))
        buffer = io.BytesIO()
        thumbnail.save(buffer, "JPEG", quality=82)
        photo = buffer.getvalue()
    return f"data:image/jpeg;base64,{base64.b64encode(photo).decode('ascii')}"
