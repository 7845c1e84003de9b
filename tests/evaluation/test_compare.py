"""`lavic evaluate compare`: finished evaluations compared from their folders alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lavic.errors import ConfigError, DataError
from lavic.launch import evaluate
from tests.evaluation.systems import rows, run, scorer, trec, write


def compared(*words: object, out: Path) -> dict[str, Any]:
    assert evaluate.main(["compare", *map(str, words), "--out", str(out), "--draws", "300"]) == 0
    return json.loads((out / "comparison.json").read_text())


def test_folders_alone_give_the_results_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    conversations = rows(60)
    test = write(tmp_path / "t.jsonl", conversations)
    good, bad = (
        trec(tmp_path / "a.run", conversations, scorer(1, 0.4)),
        trec(tmp_path / "b.run", conversations, scorer(2, 0.0)),
    )
    both = run(tmp_path / "both", test, "--run", f"good={good}", f"bad={bad}")
    run(tmp_path / "a", test, "--run", f"x={good}", "--seed", "3")
    run(tmp_path / "b", test, "--run", f"y={bad}", "--arms", "list_order")
    test.unlink()
    got = compared(
        f"good={tmp_path / 'a'}", f"bad={tmp_path / 'b'}", f"any={tmp_path / 'a'}@random", out=tmp_path / "c"
    )
    for name in ("good", "bad"):
        metrics = got["systems"][name]["metrics"]
        for metric, interval in both["arms"][name].items():
            assert {key: metrics[metric][key] for key in interval} == pytest.approx(interval, abs=1e-12)
    ours, theirs = got["against"]["bad"], both["sets"]["t"]["against"]["bad"]
    assert ours["p"] == theirs["p"] and ours["difference"] == theirs["difference"]
    assert got["systems"]["any"]["metrics"]["hit_rate"]["value"] == both["arms"]["random"]["hit_rate"]["value"]
    assert "p" not in got["against"]["any"]
    assert "good minus it" in capsys.readouterr().out


def test_seeds_are_pooled_and_never_count_as_conversations(tmp_path: Path):
    conversations = rows(80)
    test = write(tmp_path / "t.jsonl", conversations)
    for seed in range(3):
        run(tmp_path / f"s{seed}", test, "--run", f"x={trec(tmp_path / 'x.run', conversations, scorer(seed, 0.3))}")
    words = [f"x={tmp_path / f's{seed}'}" for seed in range(3)]
    single = compared(words[0], f"base={tmp_path / 's0'}@list_order", out=tmp_path / "1")
    pooled = compared(*words, f"base={tmp_path / 's0'}@list_order", out=tmp_path / "3")
    copies = compared(*words[:1] * 3, f"base={tmp_path / 's0'}@list_order", out=tmp_path / "same")
    values = [json.loads((tmp_path / f"s{s}" / "results.json").read_text())["hit_rate"]["x"]["value"] for s in range(3)]
    got = pooled["systems"]["x"]
    assert got["seeds"] == 3
    assert got["metrics"]["hit_rate"]["value"] == pytest.approx(sum(values) / 3)
    assert got["metrics"]["hit_rate"]["n"] == 80
    assert got["spread"]["hit_rate"] > 0
    assert pooled["against"]["base"]["test"] == "permutation"
    # Three copies of a seed say what it says alone: interval and p are not narrower by a factor of three.
    a, b = (results["systems"]["x"]["metrics"]["hit_rate"] for results in (single, copies))
    assert (b["low"], b["high"]) == pytest.approx((a["low"], a["high"]))
    assert copies["systems"]["x"]["spread"]["hit_rate"] == pytest.approx(0, abs=1e-12)


def test_evaluations_of_other_conversations_are_refused(tmp_path: Path):
    conversations = rows(6)
    run(tmp_path / "a", write(tmp_path / "t.jsonl", conversations))
    run(tmp_path / "b", tmp_path / "t.jsonl", "--limit", "4")
    conversations[0]["gt_items"] = ["B777777777"]
    run(tmp_path / "c", write(tmp_path / "t.jsonl", conversations))
    with pytest.raises(DataError, match=r"/a: has conversations that .*/b has not: t-4, t-5"):
        compared(tmp_path / "a", tmp_path / "b", out=tmp_path / "out")
    with pytest.raises(DataError, match="other targets of the conversation t-0"):
        compared(tmp_path / "a", tmp_path / "c", out=tmp_path / "out")
    with pytest.raises(ConfigError, match="at least two"):
        compared(tmp_path / "a", out=tmp_path / "out")
    with pytest.raises(ConfigError, match="given twice"):
        compared(tmp_path / "a", tmp_path / "a", out=tmp_path / "out")
    with pytest.raises(ConfigError, match="no arm lavic on t; it has: list_order, random"):
        compared(tmp_path / "a", f"{tmp_path / 'a'}@lavic", out=tmp_path / "out")
    with pytest.raises(DataError, match="not a finished evaluation"):
        compared(tmp_path / "a", tmp_path, out=tmp_path / "out")
