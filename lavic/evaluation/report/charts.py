"""Charts as inline SVG, styled by the page's CSS classes, without scripts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 1000, 320
LEFT, RIGHT, TOP, BOTTOM = 48, 190, 14, 40


@dataclass(frozen=True, kw_only=True)
class Series:
    """A line of a chart."""

    name: str
    points: tuple[tuple[float, float], ...]
    """(x, y) in ascending x; values that are not finite are left out."""
    tone: str = "main"
    """Color by role: main, second, third or muted."""


@dataclass(frozen=True, kw_only=True)
class Level:
    """A dashed horizontal reference line."""

    name: str
    value: float


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers in [low, high], 1, 2 or 5 times a power of ten apart."""
    if not high > low:
        return [low]
    rough = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten in [low, high]; only powers of ten for a wide range."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) <= 4 else (1,)
    candidates = [factor * 10.0**power for power in powers for factor in factors]
    return [tick for tick in candidates if low * 0.999 <= tick <= high * 1.001] or [low, high]


def short(value: float) -> str:
    """A number for an axis: 1200 -> 1,200; 0.25 -> 0.25; 3.0 -> 3."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}"


def interval_bar(
    value: float, low: float | None, high: float | None, *, scale: float, tone: str, mark: float | None = None
) -> str:
    """A bar from 0 to `value` with its interval as a whisker, as wide as its container.

    Args:
        value, low, high: In data units; no whisker where `low` or `high` is None or nan.
        scale: The value at the right end.
        tone: Color by role, as in `Series`.
        mark: Value of a dashed vertical line.
    """

    def place(number: float) -> str:
        return f"{max(0.0, min(100.0, 100.0 * number / scale)):.3f}%"

    def line(kind: str, x1: str, x2: str, y1: str, y2: str) -> str:
        return f'<line class="{kind}" x1="{x1}" x2="{x2}" y1="{y1}" y2="{y2}"/>'

    grid = [line("grid", place(tick), place(tick), "0", "100%") for tick in ticks(0, scale)]
    if mark is not None:
        grid.append(line("level", place(mark), place(mark), "0", "100%"))
    bar = f'<rect class="fill {tone}" width="{place(value)}" y="-11" height="22" rx="3"/>'
    whisker = []
    if low is not None and high is not None and math.isfinite(low) and math.isfinite(high):
        a, b = place(low), place(high)
        whisker = [line("whisker", a, b, "0", "0"), line("whisker", a, a, "-6", "6"), line("whisker", b, b, "-6", "6")]
    middle = f'<svg y="50%" overflow="visible">{bar}{"".join(whisker)}</svg>'
    return f'<svg class="bar" aria-hidden="true">{"".join(grid)}{middle}</svg>'


@dataclass(frozen=True, kw_only=True)
class _Axes:
    """The axes of `curves`: their ranges, and where a value is drawn."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    log: bool
    """Whether the vertical axis is logarithmic."""

    @classmethod
    def of(cls, points: Sequence[tuple[float, float]], levels: Sequence[Level]) -> _Axes:
        """Axes that fit all points and levels."""
        xs = [x for x, _ in points]
        ys = [y for _, y in points] + [level.value for level in levels]
        x_low, x_high = min(xs), max(xs)
        log = min(ys) > 0 and max(ys) / min(ys) > 4
        if log:
            y_low, y_high = min(ys) / 1.12, max(ys) * 1.12
        else:
            spread = (max(ys) - min(ys)) or abs(max(ys)) or 1.0
            y_low, y_high = min(ys) - 0.08 * spread, max(ys) + 0.08 * spread
            y_low = max(0.0, y_low) if min(ys) >= 0 else y_low
        return cls(x_low=x_low, x_high=x_high if x_high > x_low else x_low + 1, y_low=y_low, y_high=y_high, log=log)

    @property
    def x_ticks(self) -> list[float]:
        return ticks(self.x_low, self.x_high, 6)

    @property
    def y_ticks(self) -> list[float]:
        return log_ticks(self.y_low, self.y_high) if self.log else ticks(self.y_low, self.y_high)

    def place_x(self, x: float) -> float:
        return LEFT + (x - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)

    def place_y(self, y: float) -> float:
        if self.log:
            share = math.log(y / self.y_low) / math.log(self.y_high / self.y_low)
        else:
            share = (y - self.y_low) / (self.y_high - self.y_low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def curves(series: Sequence[Series], *, x_name: str, y_name: str, levels: Sequence[Level] = ()) -> str:
    """Lines over a common axis, labeled at their right end.

    The vertical axis is logarithmic if the values are positive and span more than a factor of 4.

    Args:
        series: At least one with a finite point.
    """
    lines = [(line, [(x, y) for x, y in line.points if math.isfinite(x) and math.isfinite(y)]) for line in series]
    lines = [(line, points) for line, points in lines if points]
    if not lines:
        raise ValueError("a chart needs at least one finite point")
    axes = _Axes.of([point for _, points in lines for point in points], levels)
    right, floor = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts: list[str] = []
    for tick in axes.y_ticks:
        y = axes.place_y(tick)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{right}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    for tick in axes.x_ticks:
        x = axes.place_x(tick)
        parts.append(f'<path class="mark" d="M{x:.1f} {floor}v4"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{floor + 18}" text-anchor="middle">{short(tick)}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {floor}H{right}"/>')
    parts.append(f'<text class="name" x="{(LEFT + right) / 2:.0f}" y="{HEIGHT - 2}" text-anchor="middle">')
    parts.append(f"{escape(x_name)}</text>")

    labels: list[tuple[float, str, str, str]] = []
    for level in levels:
        y = axes.place_y(level.value)
        parts.append(f'<path class="level" d="M{LEFT} {y:.1f}H{right}"/>')
        labels.append((y, "muted", level.name, f"{level.value:.3g}"))
    for line, points in lines:
        path = "L".join(f"{axes.place_x(x):.1f} {axes.place_y(y):.1f}" for x, y in points)
        parts.append(f'<path class="line {line.tone}" d="M{path}"/>')
        for x, y in points if len(points) <= 24 else points[-1:]:
            tip = f"{escape(line.name)}: {y:.4g} at {escape(x_name)} {short(x)}"
            circle = f'<circle class="dot {line.tone}" cx="{axes.place_x(x):.1f}" cy="{axes.place_y(y):.1f}" r="3">'
            parts.append(f"{circle}<title>{tip}</title></circle>")
        labels.append((axes.place_y(points[-1][1]), line.tone, line.name, f"{points[-1][1]:.3g}"))
    parts += [
        f'<text class="end {tone}" x="{right + 12}" y="{y + 4:.1f}"><tspan class="number">{number}</tspan> '
        f"{escape(name)}</text>"
        for (_, tone, name, number), y in zip(labels, spread_out([label[0] for label in labels]), strict=True)
    ]
    title = f"{y_name} by {x_name}"
    return (
        f'<figure class="chart"><figcaption>{escape(y_name)}{" (log scale)" if axes.log else ""}</figcaption>'
        f'<svg class="curves" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg></figure>"
    )


def reliability(bins: Sequence[tuple[float, float, int]], *, name: str, tone: str) -> str:
    """Hit rate over confidence, beside the diagonal of a calibrated model.

    Args:
        bins: As in `blocks.Reliability`; the area of a dot is the number of answers.
        name: Of the model.
        tone: Color by role, as in `Series`.
    """
    side, margin = 300, 44
    size = side + margin + 16

    def place(x: float, y: float) -> tuple[str, str]:
        return f"{margin + side * x:.1f}", f"{12 + side * (1 - y):.1f}"

    parts = []
    for tick in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        x, y = place(tick, tick)
        parts.append(f'<path class="grid" d="M{margin} {y}h{side}M{x} 12v{side}"/>')
        parts.append(f'<text class="tick" x="{margin - 8}" y="{float(y) + 4:.1f}" text-anchor="end">{tick:.1f}</text>')
        parts.append(f'<text class="tick" x="{x}" y="{side + 30}" text-anchor="middle">{tick:.1f}</text>')
    (x0, y0), (x1, y1) = place(0, 0), place(1, 1)
    parts.append(f'<path class="level" d="M{x0} {y0}L{x1} {y1}"/>')
    points = [place(confidence, rate) for confidence, rate, _ in bins]
    parts.append(f'<path class="line {tone}" d="M{"L".join(" ".join(point) for point in points)}"/>')
    largest = max(count for _, _, count in bins)
    for (x, y), (confidence, rate, count) in zip(points, bins, strict=True):
        tip = f"{count:,} answers of confidence {confidence:.3f}: {rate:.3f} are right"
        radius = 3 + 9 * math.sqrt(count / largest)
        circle = f'<circle class="dot {tone}" cx="{x}" cy="{y}" r="{radius:.1f}">'
        parts.append(f"{circle}<title>{tip}</title></circle>")
    parts.append(f'<text class="name" x="{margin + side / 2}" y="{side + 52}" text-anchor="middle">confidence</text>')
    label = escape(f"Hit rate of {name} by confidence")
    return (
        f'<figure class="reliability"><figcaption>{escape(name)}: hit rate by confidence</figcaption>'
        f'<svg viewBox="0 0 {size} {side + 60}" role="img" aria-label="{label}">{"".join(parts)}</svg></figure>'
    )


def spread_out(heights: Sequence[float], gap: float = 17.0) -> list[float]:
    """Moves labels apart, in order, so that none overlap and all stay on the chart."""
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    placed = list(heights)
    last = -math.inf
    for index in order:
        last = placed[index] = max(heights[index], last + gap)
    ceiling = float(HEIGHT - BOTTOM)
    for index in reversed(order):
        ceiling = placed[index] = min(placed[index], ceiling)
        ceiling -= gap
    return placed
