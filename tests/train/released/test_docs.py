"""docs/differences.md names each fault once, and each test that it names is there."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parents[2] / "docs" / "differences.md"


def test_every_fault_has_a_test_or_a_reason() -> None:
    section = PAGE.read_text("utf-8").partition("## Every fault")[2]
    rows = re.findall(r"^\| (\d+) \| (.+) \| (.+) \|$", section, re.MULTILINE)
    assert [int(number) for number, _, _ in rows] == list(range(1, 43))
    tested = {n for file in HERE.glob("test_*.py") for n in re.findall(r"def test_b(\d\d)_", file.read_text("utf-8"))}
    named = {number for _, _, kept in rows for number in re.findall(r"`test_b(\d\d)`", kept)}
    assert named == tested
    for number, _, kept in rows:
        assert (f"`test_b{int(number):02}`" in kept) or int(number) > 36, f"fault {number} has no test"
        assert kept.strip()
