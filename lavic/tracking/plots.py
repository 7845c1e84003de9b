"""Plots of a run's loss and perplexity, drawn from its journal: RUN/curves/loss.png and perplexity.png."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lavic.storage.atomic import atomic_write
from lavic.tracking.journal import JOURNAL_FILE, read_events, read_journal

FOLDER = "curves"
_MEANS = 50
"""Points of the smoothed loss."""


def draw(run_dir: Path) -> list[Path]:
    """Draws what the journal has: the loss by step, the validation perplexity by epoch.

    Returns:
        The files; none without matplotlib, or for a run that did not train.

    Raises:
        OSError: They cannot be written.
    """
    rows = read_journal(run_dir / JOURNAL_FILE)
    losses = [(row["step"], row["loss"]) for row in rows if row.get("loss") is not None]
    scores = [(row["epoch"], row["valid_perplexity"]) for row in rows if row.get("valid_perplexity") and "epoch" in row]
    if not (losses or scores):
        return []
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return []
    files: list[Path] = []

    def plot(name: str, x_label: str, y_label: str, fill: Callable[[Any], None]) -> None:
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot(xlabel=x_label, ylabel=y_label)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        fill(axes)
        axes.legend(frameon=False)
        files.append(run_dir / FOLDER / name)
        files[-1].parent.mkdir(exist_ok=True)
        image = io.BytesIO()  # into memory: Pillow does not notice a short write to a file on a full disk
        figure.savefig(image, format="png", dpi=120)
        atomic_write(files[-1], image.getvalue())

    def fill_loss(axes: Any) -> None:
        axes.plot(*zip(*losses, strict=True), color="tab:blue", alpha=0.35, linewidth=1, label="each step")
        axes.plot(*zip(*_smooth(losses), strict=True), color="tab:blue", label="mean")

    def fill_perplexity(axes: Any) -> None:
        teacher_evals = [
            event for event in read_events(run_dir / JOURNAL_FILE, "captions") if event.get("arm") == "full"
        ]
        teacher = teacher_evals[-1].get("perplexity") if teacher_evals else None
        label = "validation" if teacher is None else "five tokens"
        axes.plot(*zip(*scores, strict=True), marker="o", label=label)
        if teacher is not None:
            axes.axhline(teacher, linestyle="--", color="tab:gray", label="all tokens")

    if losses:
        plot("loss.png", "step", "loss, nats per target token", fill_loss)
    if scores:
        plot("perplexity.png", "epoch", "perplexity of the validation set", fill_perplexity)
    return files


def _smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means of about `_MEANS` equal parts, at their centers."""
    size = max(1, len(points) // _MEANS)
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]
