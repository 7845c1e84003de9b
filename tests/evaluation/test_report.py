"""The report shows what it is given, whatever the given holds, and stands alone."""

from __future__ import annotations

import io
import itertools
import math
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lavic.evaluation.report.blocks import (
    Bar,
    Bars,
    Candidate,
    Case,
    Gallery,
    Number,
    Numbers,
    Report,
    Section,
    Table,
    Text,
)
from lavic.evaluation.report.charts import Level, Series, curves, interval_bar, log_ticks, spread_out, ticks
from lavic.evaluation.report.gallery_page import data_uri, percent, verdict
from lavic.evaluation.report.page import render
from lavic.evaluation.report.training import descriptions, training


class Outline(HTMLParser):
    """Checks that tags close in order, and gathers text and attributes."""

    VOID = frozenset({"meta", "img", "input"})

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.seen: list[str] = []
        self.words: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def outline(report: Report) -> Outline:
    parser = Outline()
    parser.feed(render(report))
    parser.close()
    assert parser.open == []
    return parser


def photo(width: int = 40, height: int = 30, mode: str = "RGB", kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((width, height), 60).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def case(*probabilities: float, target: int | None, **changes) -> Case:
    candidates = tuple(
        Candidate(item=f"i{n}", title=f"item {n}", photo=photo() if n % 2 else None, probability=p, target=n == target)
        for n, p in enumerate(probabilities)
    )
    return Case(turns=(("seeker", "a mug?"), ("comment", "blue")), candidates=candidates, **changes)


def test_text_from_data_never_becomes_markup():
    nasty = '<script>alert("x")</script>&amp;"\''
    blocks = (
        Text(paragraphs=(nasty,)),
        Numbers(items=(Number(value=nasty, label=nasty, note=nasty),)),
        Table(columns=(nasty, "b"), rows=((nasty, f"{nasty}\n{nasty}"),), hints={nasty: nasty}),
        Bars(title=nasty, rows=(Bar(name=nasty, note=nasty, value=0.5),)),
        Gallery(
            cases=(
                Case(
                    turns=(("seeker", nasty),),
                    candidates=(Candidate(item=nasty, title=nasty, photo=photo(), probability=1, target=True),),
                    others={nasty: True},
                    name=nasty,
                ),
            )
        ),
    )
    page = outline(
        Report(title=nasty, lead=nasty, facts={nasty: nasty}, sections=(Section(title=nasty, blocks=blocks),))
    )
    assert "script" not in page.seen
    assert sum(nasty in words for words in page.words) > 11
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert all((value or "").startswith(("data:", "#")) for name, value in page.attributes if name in ("src", "href"))


def test_gallery_marks_pick_and_target_and_counts_right_and_wrong():
    cases = (case(0.9, 0.1, target=0), case(0.6, 0.4, target=1), case(0.6, 0.4, target=None))
    page = outline(Report(title="t", sections=(Section(title="s", blocks=(Gallery(cases=cases),)),)))
    classes = [value for name, value in page.attributes if name == "class"]
    assert classes.count("case right") == 1
    assert classes.count("case wrong") == 2
    assert classes.count("mark pick") == 3
    assert classes.count("mark target") == 2
    assert classes.count("picked target") == 1
    text = " ".join(page.words)
    assert "All  3" in text
    assert "Right  1" in text
    assert "Wrong  2" in text


@pytest.mark.parametrize(
    ("probabilities", "target", "text"),
    [
        ((0.9, 0.1), 0, "✓ Right (90 %)"),
        ((0.6, 0.4), 1, "✗ Wrong (60 %): the target has rank 2 (40 %)"),
        ((0.6, 0.4), None, "✗ Wrong (60 %): the target is not in the list"),
        ((), None, "✗ No answer"),
    ],
)
def test_verdicts(probabilities: tuple[float, ...], target: int | None, text: str):
    assert verdict(case(*probabilities, target=target)) == text


@pytest.mark.parametrize(
    ("p", "text"),
    [
        (1.0, "100 %"),
        (0.9999, "99.9 %"),
        (0.996, "99.6 %"),
        (0.42, "42 %"),
        (0.029, "2.9 %"),
        (1e-9, "<0.1 %"),
        (0, "0.0 %"),
    ],
)
def test_percent_never_claims_certainty(p: float, text: str):
    assert percent(p) == text


def test_pictures_become_small_jpegs_whatever_they_were():
    for image in (photo(900, 1200), photo(64, 64, "P", "PNG"), photo(300, 200, "L", "GIF")):
        uri = data_uri(image)
        assert uri.startswith("data:image/jpeg;base64,/9j/")
        assert len(uri) < 30_000
    small = photo()
    assert len(data_uri(small)) == len("data:image/jpeg;base64,") + 4 * math.ceil(len(small) / 3)


def test_bar_and_whisker_lie_where_the_numbers_say():
    svg = interval_bar(0.5, 0.25, 0.75, scale=1.0, tone="main")
    assert 'width="50.000%"' in svg
    assert 'x1="25.000%" x2="75.000%"' in svg
    assert "whisker" not in interval_bar(0.5, None, None, scale=1.0, tone="main")
    assert "whisker" not in interval_bar(0.5, float("nan"), float("nan"), scale=1.0, tone="main")
    assert "level" not in svg
    assert 'class="level" x1="90.000%"' in interval_bar(0.5, 0.25, 0.75, scale=1.0, tone="main", mark=0.9)
    assert 'width="100.000%"' in interval_bar(3.0, None, None, scale=1.0, tone="main")


def test_curves_go_down_when_values_do():
    svg = curves([Series(name="a", points=((0, 4.0), (10, 2.0), (20, 1.0)))], x_name="step", y_name="ppl")
    path = re.search(r'class="line main" d="M([^"]+)"', svg)
    points = [tuple(map(float, pair.split())) for pair in path[1].split("L")]
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert [y for _, y in points] == sorted(y for _, y in points)  # down the page


def test_curves_choose_a_log_scale_for_a_wide_range_and_bear_holes():
    points = ((0, 900.0), (5, float("nan")), (10, 1.2))
    wide = curves([Series(name="a", points=points)], x_name="step", y_name="ppl", levels=[Level(name="all", value=1.1)])
    assert "(log scale)" in wide
    assert "nan" not in wide
    assert "(log scale)" not in curves([Series(name="a", points=((0, 2.0), (1, 1.2)))], x_name="s", y_name="p")
    with pytest.raises(ValueError, match="at least one finite point"):
        curves([Series(name="a", points=((0, float("nan")),))], x_name="s", y_name="p")


@given(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_ordered_and_inside(low: float, width: float):
    values = ticks(low, low + width)
    assert values == sorted(values)
    assert len(values) <= 7
    assert all(low - 1e-6 * width <= tick <= (low + width) * (1 + 1e-6) for tick in values)
    assert log_ticks(low, low + width) == sorted(log_ticks(low, low + width))


@given(st.lists(st.floats(0, 280), min_size=1, max_size=8))
def test_labels_never_cover_each_other(heights: list[float]):
    placed = sorted(spread_out(heights))
    assert all(b - a > 16.9 for a, b in itertools.pairwise(placed))


def test_training_leaves_out_what_was_never_validated():
    records = [{"step": 0, "valid_perplexity": 3.0}, {"step": 1, "loss": 1.0}, {"step": 2, "valid_perplexity": 2.0}]
    section = training({"one": {"a": records, "b": [{"step": 1, "loss": 2.0}]}, "two": {"c": []}})
    (block,) = section.blocks
    assert [line.points for line in block.series] == [((0, 3.0), (2, 2.0))]
    assert training({"two": {"c": []}}) is None


def test_captions_show_what_there_is():
    section = descriptions({"full": {"perplexity": 1.3}, "cls_after": {"perplexity": 1.4}})
    assert [(bar.name, bar.value) for bar in section.blocks[0].rows] == [
        ("All tokens", 1.3),
        ("Five tokens, after stage 1", 1.4),
    ]
