"""Test sets of which little can be said: bounds in every file, no NaN, no crash."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lavic.cli import main
from tests.endpoint.openai_server import chat_body, openai_server

KEY = "candidates_st"


def row(number: int, targets: list[str], candidates: list[str], thread: int | None = None) -> dict[str, Any]:
    context = f"<submission>mug {number if thread is None else thread}</submission><comment>{number}</comment>"
    return {"context": context, "context_items": [], "gt_items": targets, KEY: candidates}


SETS = {
    "one row": [row(0, ["a"], ["a", "b"])],
    "one row, no target listed": [row(0, ["z"], ["a", "b"])],
    "one candidate": [row(0, ["a"], ["a"])],
    "no target listed": [row(number, [f"z{number}"], ["a", "b", "c"]) for number in range(4)],
    "all rows equal": [row(number, [f"a{number}"], [f"a{number}", "x"]) for number in range(5)],
    "one cluster": [row(number, ["a"], ["b", "a"][:: 1 if number % 2 else -1], thread=0) for number in range(4)],
    "one target in many lists": [row(number, [f"a{number}"], ["b", "a9", "c"]) for number in range(10)],
    "empty lists": [row(0, ["a"], []), row(1, ["a"], ["a"]), row(2, ["b"], [])],
}


def strict(path: Path) -> Any:
    """JSON without NaN and Infinity, which other readers refuse."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{path.name} holds {name}")

    return json.loads(path.read_text("utf-8"), parse_constant=refuse)


def check(value: Any, place: str = "") -> int:
    """Checks every interval in some JSON; returns how many there are."""
    if isinstance(value, list):
        return sum(check(inner, place) for inner in value)
    if not isinstance(value, dict):
        return 0
    if {"value", "low", "high"} <= set(value):
        bounds = [value[key] for key in ("low", "value", "high")]
        if None in bounds:
            assert bounds == [None] * 3 and value["n"] == 0, place
        else:
            assert bounds == sorted(bounds) and bounds[0] >= -1 and bounds[2] <= 1, place
            if "clusters" in value and "ece" not in place:
                assert bounds[0] < bounds[2], place  # nothing is certain
        return 1
    return sum(check(inner, f"{place}/{key}") for key, inner in value.items())


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("draws", [1, 100])
def test_every_number_has_its_bounds(tmp_path: Path, name: str, draws: int):
    test = tmp_path / "t.jsonl"
    test.write_text("".join(json.dumps(row) + "\n" for row in SETS[name]))
    items = tmp_path / "items.jsonl"
    ids = {item for row in SETS[name] for item in row[KEY]}
    items.write_text("".join(json.dumps({"parent_asin": item, "title": f"thing {item}"}) + "\n" for item in ids))
    ranked = tmp_path / "x.run"
    lines = [f"{n} Q0 {item} 1 {-k} x" for n, row in enumerate(SETS[name]) for k, item in enumerate(row[KEY])]
    ranked.write_text("\n".join(lines))
    arms = ["list_order", "popularity", "bm25", "chat", "random"]
    with openai_server() as server:
        server.chat = lambda body: chat_body("a")
        words = ["evaluate", "--test", test, "--train", test, "--items", items, "--run", f"x={ranked}", "--arms", *arms]
        words += ["--chat.url", server.url, "--chat.model", "drawn", "--draws", draws]
        for out in ("one", "two"):
            assert main([str(word) for word in [*words, "--out", tmp_path / out]]) == 0
    results = strict(tmp_path / "one" / "results.json")
    assert check(results) > 50
    assert (tmp_path / "one" / "report.html").stat().st_size
    for arm in ("x", "chat", "random"):
        compared = [f"{arm}={tmp_path / out}@{arm}" for out in ("one", "two")]
        other = f"first={tmp_path / 'one'}@list_order"
        words = ["evaluate", "compare", other, *compared, "--out", str(tmp_path / arm), "--draws", str(draws)]
        assert main(words) == 0
        assert check(strict(tmp_path / arm / "comparison.json")) > 20
