"""A report as data: sections of numbers, tables, bars, curves and cases. `page` makes it a file; nothing here draws."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lavic.evaluation.report.charts import Level, Series


@dataclass(frozen=True, kw_only=True)
class Number:
    """One figure to remember."""

    value: str
    label: str
    note: str = ""
    tone: str = ""
    """"" or one of main, good, bad, muted."""


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """A row of figures."""

    items: tuple[Number, ...]


@dataclass(frozen=True, kw_only=True)
class Text:
    """Plain paragraphs."""

    paragraphs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Code:
    """Commands or a file, word for word."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Table:
    """Plain cells; numbers are aligned to the right."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    """A line break in a cell starts its small print."""
    hints: Mapping[str, str] = field(default_factory=dict)
    """Column name -> what it means, shown on hover and to screen readers."""
    strong: tuple[int, ...] = ()
    """Rows to set apart."""
    prose: bool = False
    """Cells are sentences: aligned to the left, and wrapped."""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One row of `Bars`."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    note: str = ""
    tone: str = "muted"
    """main, second, third or muted."""


@dataclass(frozen=True, kw_only=True)
class Bars:
    """Values side by side with their intervals."""

    rows: tuple[Bar, ...]
    title: str = ""
    scale: float | None = None
    """Data value of the right edge; None: the largest number shown."""
    mark: float | None = None
    """A dashed line through all rows, such as the best that can be reached."""
    digits: int = 3
    """Decimals of the printed values."""


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Lines over steps."""

    series: tuple[Series, ...]
    y_name: str
    x_name: str = "step"
    levels: tuple[Level, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One item of a case's list."""

    item: str
    title: str
    photo: bytes | None
    """An encoded picture, or None."""
    probability: float
    target: bool


@dataclass(frozen=True, kw_only=True)
class Case:
    """One conversation and what came of it."""

    turns: tuple[tuple[str, str], ...]
    """(role, text), oldest first; roles as in `lavic.data`: "seeker" or "comment"."""
    candidates: tuple[Candidate, ...]
    """Best first: the first one is the pick."""
    others: Mapping[str, bool] = field(default_factory=dict)
    """Other arms -> whether they were right in this conversation."""
    name: str = ""

    @property
    def right(self) -> bool:
        """Is the pick a target?"""
        return bool(self.candidates) and self.candidates[0].target


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Cases that the reader can look at, all or only the right or wrong ones."""

    cases: tuple[Case, ...]


Block = Numbers | Text | Code | Table | Bars | Curves | Gallery


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading, a sentence under it, and what it shows."""

    title: str
    lead: str = ""
    blocks: tuple[Block, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything on the page."""

    title: str
    lead: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Small print under the title: model, files, versions, time."""
    sections: tuple[Section, ...] = ()
