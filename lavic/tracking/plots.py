"""A run's curves as pictures, drawn from its journal: RUN/curves/loss.png and perplexity.png."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lavic.tracking.journal import FILE, read_events, read_journal

FOLDER = "curves"
_SMOOTH = 50
"""Parts of a run that a point of the smooth line is the mean of."""


def draw(run_dir: Path) -> list[Path]:
    """Draws what the journal has: the loss by step, the validation perplexity by epoch.

    Returns:
        The pictures; none without matplotlib, or for a run that did not train.

    Raises:
        OSError: They cannot be written.
    """
    rows = read_journal(run_dir / FILE)
    losses = [(row["step"], row["loss"]) for row in rows if row.get("loss") is not None]
    scores = [(row["epoch"], row["valid_perplexity"]) for row in rows if row.get("valid_perplexity") and "epoch" in row]
    if not (losses or scores):
        return []
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return []
    folder = run_dir / FOLDER
    folder.mkdir(exist_ok=True)
    made: list[Path] = []

    def picture(name: str, x: str, y: str) -> tuple[Any, Any]:
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot(xlabel=x, ylabel=y)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        made.append(folder / name)
        return figure, axes

    if losses:
        figure, axes = picture("loss.png", "step", "loss, nats per target token")
        axes.plot(*zip(*losses, strict=True), color="tab:blue", alpha=0.35, linewidth=1, label="each step")
        axes.plot(*zip(*smooth(losses), strict=True), color="tab:blue", label="mean")
        axes.legend(frameon=False)
        figure.savefig(made[-1], dpi=120)
    if scores:
        figure, axes = picture("perplexity.png", "epoch", "perplexity of the validation set")
        axes.plot(*zip(*scores, strict=True), marker="o", label="five tokens" if _teacher(run_dir) else "validation")
        if (teacher := _teacher(run_dir)) is not None:
            axes.axhline(teacher, linestyle="--", color="tab:gray", label="all tokens")
        axes.legend(frameon=False)
        figure.savefig(made[-1], dpi=120)
    return made


def smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means of about `_SMOOTH` equal parts, at their middles."""
    size = max(1, len(points) // _SMOOTH)
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def _teacher(run_dir: Path) -> float | None:
    """The perplexity from all tokens, where the run scored it."""
    told = [event for event in read_events(run_dir / FILE, "captions") if event.get("arm") == "full"]
    return told[-1].get("perplexity") if told else None
