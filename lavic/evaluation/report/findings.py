"""What the controls, the calibration and the order of the lists say, as sections of a report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lavic.evaluation.report.blocks import Bar, Bars, Block, Reliability, Section, Table, Text

CONTROLS: Mapping[str, str] = {
    "shuffled": "each candidate's tokens are those of another candidate",
    "blank": "each candidate has the same tokens",
    "noise": "each candidate has random tokens",
}
"""Arms that take the photos away from the tuned model -> what they do."""

PLOTTED = 3
"""Arms with a reliability plot, the main one first."""


def first_line(results: Mapping[str, Any]) -> str:
    """A warning for the top of the report: arms that have not run, and that shuffling the tokens does not hurt.

    It does not hurt where the interval of the paired difference in HitRatio@1 reaches 0.
    """
    absent = [f"{arm} ({reason})" for arm, reason in results.get("not_run", {}).items()]
    lacking = f"Not all arms have run: {'; '.join(absent)}." if absent else ""
    return " ".join(filter(None, (lacking, _shuffling(results))))


def _shuffling(results: Mapping[str, Any]) -> str:
    test_set = results["sets"][results["main_set"]]
    row = test_set["against"].get("shuffled")
    if row is None or row["difference"]["low"] > 0:
        return ""
    tuned, shuffled = (test_set["arms"][arm]["hit_rate"]["value"] for arm in (results["main"], "shuffled"))
    return (
        f"Shuffling the photo tokens between the candidates does not hurt: HitRatio@1 is {tuned:.3f} with a "
        f"candidate's own tokens and {shuffled:.3f} with another's (difference {_difference(row['difference'])}). "
        "Nothing here shows that the model looks at the photos."
    )


def controls(results: Mapping[str, Any]) -> Section | None:
    """A sentence for each control: what was taken away, and whether that hurts. None without a control."""
    test_set, level = results["sets"][results["main_set"]], results["settings"]["level"]
    rows = []
    for arm, ablation in CONTROLS.items():
        if (row := test_set["against"].get(arm)) is None:
            continue
        low, high = row["difference"]["low"], row["difference"]["high"]
        effect = "hurts" if low > 0 else "helps" if high < 0 else "makes no difference that these lists show"
        rows.append((results["labels"][arm]["label"], f"{ablation}: {effect}", _difference(row["difference"])))
    if not rows:
        return None
    columns = ("Control", "What it does", f"Tuned model less control, {level:.0%} interval")
    lead = (
        "The tuned model ranks the same lists with tokens that tell nothing of the candidate. Where that does not "
        "hurt, its answers come from the titles."
    )
    return Section(title="Controls", lead=lead, blocks=(Table(columns=columns, rows=tuple(rows), prose=True),))


def order_bias(results: Mapping[str, Any]) -> Section | None:
    """Hit rates by the order of the lists, and the positions of the first items. None for a single order."""
    rows = results["sets"][results["main_set"]].get("order")
    if not rows:
        return None
    labels, main = results["labels"], results["main"]
    cells = [
        (
            labels[arm]["label"],
            f"{row['hit_rate'][0]:.3f}",
            f"{row['mean']:.3f}",
            f"{min(row['hit_rate']):.3f} – {max(row['hit_rate']):.3f}",
            f"{row['spread']:.3f}",
            f"{row['same_first']:.3f}",
        )
        for arm, row in rows.items()
    ]
    columns = ("Model", "File's order", "Mean", "Range", "Spread", "Same first item")
    hints = {
        "File's order": "HitRatio@1 on the lists as they are in the file",
        "Mean": "HitRatio@1, mean over the orders",
        "Spread": "highest less lowest HitRatio@1 of the orders",
        "Same first item": "share of the lists whose first item is the same in all orders",
    }
    strong = tuple(index for index, arm in enumerate(rows) if arm == main)
    blocks: list[Block] = [Table(columns=columns, rows=tuple(cells), hints=hints, strong=strong)]
    if position_shares := rows.get(main, {}).get("positions"):
        bars = tuple(
            Bar(name=f"Place {index}", value=share, tone="main") for index, share in enumerate(position_shares, 1)
        )
        scale = max(*position_shares, 2 * rows[main]["uniform"])
        title = (
            f"Where {labels[main]['label']}'s first items stood in the prompt; dashed: a model that ignores the order"
        )
        blocks.append(Bars(title=title, rows=bars, scale=scale, mark=rows[main]["uniform"]))
    count = next(iter(rows.values()))["orders"]
    averaged = results["settings"]["average_orders"]
    lead = (
        f"Each list was ranked in {count} orders: that of the file and {count - 1} random ones. "
        + ("All other numbers are of the probabilities' mean over them." if averaged else "")
    ).strip()
    return Section(title="Order of the list", lead=lead, blocks=tuple(blocks))


def calibration(results: Mapping[str, Any]) -> Section | None:
    """Confidence against hit rate. None where no arm gives probabilities."""
    test_set = results["sets"][results["main_set"]]
    bins, labels, main = test_set.get("calibration", {}), results["labels"], results["main"]
    if not bins:
        return None
    arms = sorted(bins, key=lambda arm: (arm != main, arm in CONTROLS))
    cells = []
    for arm in arms:
        ece, hits = test_set["arms"][arm]["ece"], test_set["arms"][arm]["hit_rate"]
        count = sum(row["n"] for row in bins[arm])
        mean = sum(row["n"] * row["confidence"] for row in bins[arm]) / count
        interval = f"{ece['value']:.3f}\n{ece['low']:.3f} – {ece['high']:.3f}"
        cells.append((labels[arm]["label"], interval, f"{mean:.3f}", f"{hits['value']:.3f}"))
    plots = [
        Reliability(
            name=labels[arm]["label"],
            bins=tuple((row["confidence"], row["hit_rate"], row["n"]) for row in bins[arm]),
            tone=tone,
        )
        for arm, tone in zip(arms[:PLOTTED], ("main", "second", "third"), strict=False)
    ]
    columns = ("Model", "ECE", "Mean confidence", "HitRatio@1")
    hints = {
        "ECE": "expected calibration error: mean distance of confidence and hit rate over bins of equal width",
        "Mean confidence": "mean probability of the first item",
    }
    lead = "A model is calibrated where the first item is right as often as its probability says: on the diagonal."
    table = Table(columns=columns, rows=tuple(cells), hints=hints, strong=(0,) if arms[0] == main else ())
    return Section(title="Calibration", lead=lead, blocks=(*plots, table))


def groups(results: Mapping[str, Any]) -> Section | None:
    """How lists were ranked in groups. None where all were ranked whole."""
    rows = results.get("groups")
    if not rows:
        return None
    texts = [
        f"{results['labels'][arm]['label']}: {row['size']} candidates fit into a prompt of {row['context']:,} tokens, "
        f"of which {row['text']:,} are for the text and up to {row['photo']:,} for each photo. {row['rule']}"
        for arm, row in rows.items()
    ]
    return Section(title="Lists in groups", blocks=(Text(paragraphs=tuple(texts)),))


def _difference(interval: Mapping[str, float]) -> str:
    text = f"{interval['value']:+.3f} [{interval['low']:+.3f}, {interval['high']:+.3f}]"
    return text.replace("-", "−")
