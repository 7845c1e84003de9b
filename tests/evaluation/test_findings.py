"""What a report says of controls, of the order of the lists and of calibration."""

from __future__ import annotations

from typing import Any

import pytest

from lavic.evaluation.report import findings
from lavic.evaluation.report.blocks import Bars, Reliability, Table


def results(low: float, high: float) -> dict[str, Any]:
    """Of a model and its shuffled control, whose paired difference has this interval."""
    rate = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 10}
    difference = {"value": (low + high) / 2, "low": low, "high": high, "n": 10}
    order = {
        "orders": 3,
        "hit_rate": [0.5, 0.4, 0.3],
        "mean": 0.4,
        "spread": 0.2,
        "deviation": 0.1,
        "same_first": 0.25,
        "positions": [0.75, 0.25],
        "uniform": 0.5,
        "position_lists": 20,
    }
    bins = [{"low": 0.4, "high": 0.5, "n": 10, "confidence": 0.45, "hit_rate": 0.5}]
    return {
        "main": "lavic",
        "main_set": "test",
        "labels": {"lavic": {"label": "LaViC", "note": ""}, "shuffled": {"label": "Tokens shuffled", "note": ""}},
        "settings": {"level": 0.95, "average_orders": False},
        "sets": {
            "test": {
                "arms": {
                    "lavic": {"hit_rate": rate, "ece": {**rate, "value": 0.05}},
                    "shuffled": {"hit_rate": {**rate, "value": 0.125}, "ece": rate},
                },
                "against": {"shuffled": {"difference": difference}},
                "order": {"lavic": order},
                "calibration": {"shuffled": bins, "lavic": bins},
            }
        },
    }


@pytest.mark.parametrize(
    ("low", "high", "warns", "verdict"),
    [
        (0.1, 0.3, False, ": hurts"),
        (0.0, 0.2, True, "makes no difference"),
        (-0.1, 0.2, True, "makes no difference"),
        (-0.3, -0.1, True, ": helps"),
    ],
)
def test_whether_shuffling_hurts(low: float, high: float, warns: bool, verdict: str) -> None:
    line = findings.first_line(results(low, high))
    assert bool(line) is warns
    if warns:
        assert line.startswith("Shuffling the photo tokens") and "0.500" in line and "0.125" in line
    section = findings.controls(results(low, high))
    assert section is not None
    (table,) = section.blocks
    assert isinstance(table, Table)
    assert [verdict in row[1] for row in table.rows] == [True]


def test_an_evaluation_without_controls_orders_or_probabilities_says_nothing_of_them() -> None:
    bare = results(0.1, 0.2)
    bare["sets"]["test"] |= {"against": {}, "order": {}, "calibration": {}}
    assert findings.first_line(bare) == ""
    parts = (findings.controls, findings.order_bias, findings.calibration, findings.groups)
    assert [part(bare) for part in parts] == [None] * 4


def test_order_and_calibration_show_the_main_arm_first() -> None:
    order, calibration = findings.order_bias(results(0.1, 0.2)), findings.calibration(results(0.1, 0.2))
    assert order is not None and calibration is not None
    table, bars = order.blocks
    assert isinstance(table, Table) and isinstance(bars, Bars)
    assert table.rows == (("LaViC", "0.500", "0.400", "0.300 – 0.500", "0.200", "0.250"),)
    assert [bar.value for bar in bars.rows] == [0.75, 0.25] and bars.mark == 0.5
    assert [block.name for block in calibration.blocks if isinstance(block, Reliability)] == [
        "LaViC",
        "Tokens shuffled",
    ]


def test_groups_are_stated() -> None:
    row = {"size": 5, "context": 1024, "text": 512, "photo": 88, "rule": "The rule."}
    section = findings.groups(
        {"labels": {"base_photos": {"label": "Base model, photos"}}, "groups": {"base_photos": row}}
    )
    assert section is not None
    (text,) = section.blocks
    assert "5 candidates fit into a prompt of 1,024 tokens" in text.paragraphs[0]  # type: ignore[union-attr]
    assert text.paragraphs[0].endswith("The rule.")  # type: ignore[union-attr]
