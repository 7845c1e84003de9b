"""The parts of a report as data: numbers, tables, bars, curves and examples. `page` renders them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lavic.evaluation.report.charts import Level, Series


@dataclass(frozen=True, kw_only=True)
class Number:
    """A key figure."""

    value: str
    label: str
    note: str = ""
    tone: str = ""
    """"" or one of main, good, bad, muted."""


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """A row of key figures."""

    items: tuple[Number, ...]


@dataclass(frozen=True, kw_only=True)
class Text:
    """Plain paragraphs."""

    paragraphs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table; numbers are right-aligned."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    """The text after a line break in a cell is small."""
    hints: Mapping[str, str] = field(default_factory=dict)
    """Column name -> its description, as a tooltip."""
    strong: tuple[int, ...] = ()
    """Indices of highlighted rows."""
    prose: bool = False
    """Cells are sentences: left-aligned and wrapped."""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A row of `Bars`."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    note: str = ""
    tone: str = "muted"
    """main, second, third or muted."""


@dataclass(frozen=True, kw_only=True)
class Bars:
    """A bar chart with intervals."""

    rows: tuple[Bar, ...]
    title: str = ""
    scale: float | None = None
    """Value at the right end of the axis; None: the largest value."""
    mark: float | None = None
    """Value of a dashed line through all rows, such as an upper bound."""
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
class Reliability:
    """A plot of hit rate over confidence."""

    name: str
    bins: tuple[tuple[float, float, int], ...]
    """(mean confidence, hit rate, number of answers) of answers of similar confidence, by ascending confidence."""
    tone: str = "main"
    """main, second, third or muted."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """An item of a case's list."""

    item: str
    title: str
    photo: bytes | None
    """An encoded image, or None."""
    probability: float
    target: bool


@dataclass(frozen=True, kw_only=True)
class Case:
    """A conversation and its ranked candidates."""

    turns: tuple[tuple[str, str], ...]
    """(role, text), oldest first; roles as in `lavic.data`: "seeker" or "comment"."""
    candidates: tuple[Candidate, ...]
    """Best first."""
    others: Mapping[str, bool] = field(default_factory=dict)
    """Other models -> whether their first item is a target."""
    name: str = ""
    anchor: str = ""
    """The part of the case's address behind #, the same in every report on the file; empty: it has none."""

    @property
    def right(self) -> bool:
        """Whether the first candidate is a target."""
        return bool(self.candidates) and self.candidates[0].target


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Cases, filtered by the reader: all, right or wrong, and won or lost against another model."""

    cases: tuple[Case, ...]


Block = Numbers | Text | Table | Bars | Curves | Reliability | Gallery


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading, a lead sentence, and blocks."""

    title: str
    lead: str = ""
    blocks: tuple[Block, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Report:
    """The whole page."""

    title: str
    lead: str = ""
    warning: str = ""
    """Above everything else."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Facts under the title: model, files, versions, time."""
    sections: tuple[Section, ...] = ()
