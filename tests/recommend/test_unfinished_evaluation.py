"""An unfinished evaluation: what it leaves, and that the same command ranks only what is missing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lavic.cli import main
from lavic.distributed.context import DistributedContext
from lavic.evaluation.model_arms.arms import Arm
from lavic.evaluation.model_arms.model_rankings import rank_test_sets
from lavic.evaluation.saved_rankings import ArmRankings, SavedRankings
from lavic.evaluation.test_set import TestSet
from lavic.model.bundle import Bundle
from lavic.model.item_store import ItemStore
from lavic.recommend.ranking.ranked_list import RankedList
from tests.endpoint.openai_server import OpenAiServer, chat_body, openai_server
from tests.fork_server import ForkServer

from .conftest import KEY, Assets

pytestmark = pytest.mark.slow

DOWN = (500, {}, b"<h1>down</h1>")


@pytest.fixture
def server() -> Iterator[OpenAiServer]:
    with openai_server() as running:
        running.chat = lambda body: chat_body("B0MN000000")
        yield running


@pytest.fixture
def catalogue(assets: Assets, tmp_path: Path) -> Path:
    items = sorted({item for conversation in assets.conversations for item in conversation.candidates[KEY]})
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps({"parent_asin": item, "title": f"mug {item[-2:]}"}) + "\n" for item in items))
    return path


def evaluate_argv(assets: Assets, out: Path, catalogue: Path, url: str, *options: object) -> list[str]:
    argv = ["evaluate", "--bundle", assets.bundle, "--store", assets.store, "--test", assets.test, "--out", out]
    argv += ["--items", catalogue, "--chat.url", url, "--chat.model", "drawn", "--chat.backoff-s", 0]
    argv += ["--chat.retries", 0, "--draws", 50, "--limit", 4, "--orders", 2, *options]
    return [str(arg) for arg in argv]


def results(out: Path, name: str = "results.json") -> dict[str, Any]:
    return json.loads((out / name).read_text())


def record_loads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Records the bundles that are loaded from now on."""
    loaded: list[Path] = []
    load = Bundle.load
    monkeypatch.setattr(
        Bundle, "load", lambda folder, *args, **options: loaded.append(folder) or load(folder, *args, **options)
    )
    return loaded


ARMS = ("--arms", "chat", "lavic", "shuffled", "bm25", "list_order", "random")


def test_a_failed_chat_server_does_not_affect_other_arms(
    assets: Assets, tmp_path: Path, catalogue: Path, server: OpenAiServer, capsys, monkeypatch
):
    complete_argv = evaluate_argv(assets, tmp_path / "complete", catalogue, server.url, *ARMS)
    assert main(complete_argv) == 0
    assert not (tmp_path / "complete" / "rankings").exists()
    capsys.readouterr()

    out = tmp_path / "out"
    command = evaluate_argv(assets, out, catalogue, server.url, *ARMS, "--chat.cache", tmp_path / "answers")
    server.faults.extend([DOWN] * 50)
    assert main(command) == 1
    captured = capsys.readouterr()
    (error,) = (line for line in captured.err.splitlines() if "error:" in line)
    assert "--arms chat has not run: --chat.model drawn: none of 4" in error and "results.partial.json has" in error
    assert captured.out.startswith("Not all arms have run: chat (")
    assert not (out / "results.json").exists()
    partial = results(out, "results.partial.json")
    assert list(partial["not_run"]) == ["chat"] and "none of 4 questions" in partial["not_run"]["chat"]
    assert set(partial["arms"]) == set(partial["labels"]) == {"lavic", "shuffled", "bm25", "list_order", "random"}
    assert "Not all arms have run: chat" in (out / "report.html").read_text()
    assert main(["evaluate", "compare", str(out), str(tmp_path / "complete")]) == 2
    assert "some arms have not run, see results.partial.json" in capsys.readouterr().err

    server.faults.clear()
    loaded = record_loads(monkeypatch)
    assert main(command) == 0
    assert loaded == []
    assert not (out / "results.partial.json").exists() and not (out / "rankings").exists()
    resumed, expected = results(out), results(tmp_path / "complete")
    for key in ("arms", "sets", "labels", "main", "ceiling"):
        assert resumed[key] == expected[key], key
    assert "not_run" not in resumed
    lines = [(folder / "predictions.jsonl").read_text() for folder in (out, tmp_path / "complete")]
    assert lines[0] == lines[1]


def test_an_arm_is_ranked_again_if_its_inputs_differ(assets: Assets, tmp_path: Path, monkeypatch):
    store = ItemStore.open(assets.store)
    saved = SavedRankings(tmp_path / "rankings")
    arm = Arm(name="lavic", bundle=assets.bundle, store=store)
    loaded = record_loads(monkeypatch)

    def is_ranked(arm: Arm, file: Path = assets.test, limit: int = 1, **options: Any) -> bool:
        loaded.clear()
        test_set = TestSet.read("test", file, candidates=KEY, stores=[store], limit=limit)
        ranked = rank_test_sets([arm], [test_set], DistributedContext(), saved=saved, **options)
        assert len(ranked.rankings["test"][arm.name]) == limit
        return bool(loaded)

    other = tmp_path / assets.test.name
    other.write_text("".join(assets.test.read_text().splitlines(keepends=True)[1:]))
    assert is_ranked(arm) and not is_ranked(arm)
    assert not is_ranked(replace(arm, name="another name"), tokens_per_batch=100)
    for changed in (
        {"limit": 2},
        {"file": other},
        {"seed": 1},
        {"decode": "generate"},
        {"orders": 2},
        {"dtype": "bfloat16"},
        {"arm": replace(arm, tokens_per_item=2)},
        {"arm": replace(arm, shown="shuffled")},
        {"arm": replace(arm, language=False)},
        {"arm": replace(arm, shown="text")},
        {"arm": replace(arm, shown="text", texts={assets.conversations[0].candidates[KEY][0]: "red"})},
        {"arm": replace(arm, bundle=assets.titles_only)},
    ):
        assert is_ranked(**{"arm": arm, **changed}), changed
        assert not is_ranked(**{"arm": arm, **changed}), changed


def test_an_interrupted_evaluation_keeps_completed_arms(
    assets: Assets, tmp_path: Path, catalogue: Path, server: OpenAiServer, monkeypatch
):
    """Rankings before the interrupt are kept, and the results equal those of an uninterrupted run."""
    arms = ("--arms", "lavic", "shuffled", "before_tuning", "random")
    command = evaluate_argv(assets, tmp_path / "out", catalogue, server.url, *arms)
    load = Bundle.load

    def interrupt(folder: Path, *args: Any, **options: Any) -> Bundle:
        if not options["language"]:
            raise KeyboardInterrupt
        return load(folder, *args, **options)

    monkeypatch.setattr(Bundle, "load", interrupt)
    assert main(command) == 130
    assert not list((tmp_path / "out").glob("results*"))
    monkeypatch.setattr(Bundle, "load", load)
    loaded = record_loads(monkeypatch)
    assert main(command) == 0
    assert loaded == [assets.bundle]
    assert main(evaluate_argv(assets, tmp_path / "complete", catalogue, server.url, *arms)) == 0
    assert results(tmp_path / "out")["sets"] == results(tmp_path / "complete")["sets"]


@pytest.mark.dist
def test_two_ranks_reuse_rankings_of_one(
    assets: Assets, tmp_path: Path, catalogue: Path, server: OpenAiServer, fork_server: ForkServer
):
    server.faults.extend([DOWN] * 50)
    command = evaluate_argv(assets, tmp_path / "out", catalogue, server.url, "--arms", "lavic", "chat", "random")
    assert main(command) == 1
    before = results(tmp_path / "out", "results.partial.json")
    options = ("--arms", "lavic", "before_tuning", "random")
    done = fork_server.lavic(*evaluate_argv(assets, tmp_path / "out", catalogue, server.url, *options), ranks=2)
    assert done.returncode == 0, done.stderr
    after = results(tmp_path / "out")
    assert after["arms"]["lavic"] == before["arms"]["lavic"] and "before_tuning" in after["arms"]


def test_saved_rankings_round_trip_and_damage_is_detected(tmp_path: Path):
    saved = SavedRankings(tmp_path / "rankings")
    first = RankedList(ids=("a", "\ud83d", "b c"), logprobs=(-0.1, -1 / 3, float("-inf")), none=1 / 7)
    text = RankedList(ids=(), text="no\nid \ud83d", answer=None)
    rankings = ArmRankings(orders=[[first, text], [text, first]], group={"size": 3})
    assert saved.get({"arm": "x"}) is None
    saved.put({"arm": "x"}, rankings)
    assert saved.get({"arm": "x"}) == rankings and saved.get({"arm": "y"}) is None
    (file,) = (tmp_path / "rankings").iterdir()
    content = file.read_bytes()
    for damage in (b"", b"{}\n", content[:-9], content.rsplit(b"\n", 2)[0], b"\xff" + content, content + b"[1]\n"):
        file.write_bytes(damage)
        assert saved.get({"arm": "x"}) is None
    saved.remove()
    assert not (tmp_path / "rankings").exists()
    (tmp_path / "rankings").write_text("a file instead of the folder")
    saved.put({"arm": "x"}, rankings)  # logs a warning
    assert saved.get({"arm": "x"}) is None
