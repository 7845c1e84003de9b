"""Model selection and early stopping, by the validation loss or by a score."""

from __future__ import annotations

import hashlib
import json
import signal
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from lavic.data.conversations import read_conversations
from lavic.distributed.context import DistributedContext
from lavic.distributed.signals import StopRequest
from lavic.errors import ConfigError, Stopped
from lavic.launch.training.hit_rate import expected_hit, listed_subset
from lavic.launch.tune import TuneSettings
from lavic.model.bundle import Bundle
from lavic.model.item_store import ItemStore
from lavic.recommend.ranking.ranked_list import RankedList
from lavic.recommend.ranking.ranker import Ranker
from lavic.recommend.ranking.request import Request
from lavic.tracking.journal import read_events, read_journal
from lavic.tracking.tracker import Tracker
from lavic.train.callbacks.best_model import BestModel
from lavic.train.callbacks.callback import Callback
from lavic.train.checkpoint import CheckpointManager
from lavic.train.config import LoopSettings
from lavic.train.deepspeed.engine import Engine
from lavic.train.trainer import Trainer
from tests.fork_server import ForkServer
from tests.train.assets import KEY, Assets
from tests.train.conftest import curve
from tests.train.test_restart import output, stop_when
from tests.train.toy import ToyData, ToyTask, make_callbacks

RATES = {0: 0.9, 1: 0.2, 2: 0.6, 3: 0.1, 4: 0.6, 5: 0.5, 6: 0.4, 7: 0.3, 8: 0.2}
"""The score after each step. The toy's loss always falls: it selects the last step."""


class ScriptedScorer:
    """A scorer that returns RATES."""

    trainer: Trainer

    def __call__(self, check_stop: Callable[[], None]) -> Mapping[str, float]:
        check_stop()
        assert not self.trainer.engine.task.training
        return {"rate": RATES[self.trainer.state.step]}


def toy_run(
    folder: Path, world: DistributedContext, score: str | None, *extra_callbacks: Callback, patience: int = 0
) -> Trainer:
    """Eight steps of the toy, each with a validation."""
    loop = LoopSettings(
        steps=8, global_batch_size=8, lr=0.01, eval_every=1, save_every=2, early_stopping_patience=patience
    )
    tracker, checkpoints = Tracker.open(folder), CheckpointManager(folder / "checkpoints", world)
    callbacks = make_callbacks(StopRequest(), checkpoints, tracker)
    callbacks = [BestModel(score) if isinstance(callback, BestModel) else callback for callback in callbacks]
    engine, scorer = Engine(ToyTask(), world, loop), ScriptedScorer()
    scorer.trainer = Trainer(
        engine, ToyData(40, 1), ToyData(13, 2), loop, world, [*callbacks, *extra_callbacks], scorer if score else None
    )
    return scorer.trainer


def test_the_best_score_is_selected_and_ties_by_loss(tmp_path: Path, world: DistributedContext) -> None:
    state = toy_run(tmp_path / "rate", world, "rate").fit()
    losses = {
        row["step"]: row["valid_loss"] for row in read_journal(tmp_path / "rate/metrics.jsonl") if "valid_loss" in row
    }
    assert losses[4] < losses[2] and min(losses, key=losses.__getitem__) == 8
    assert (state.best_step, state.best_score, state.best_loss) == (4, 0.6, losses[4])
    rates = {
        row["step"]: row["valid_rate"] for row in read_journal(tmp_path / "rate/metrics.jsonl") if "valid_rate" in row
    }
    assert rates == RATES

    state = toy_run(tmp_path / "loss", world, None).fit()
    assert (state.best_step, state.best_score) == (8, None)


def test_early_stopping_after_patience_validations(
    tmp_path: Path, world: DistributedContext, capsys: pytest.CaptureFixture[str]
) -> None:
    state = toy_run(tmp_path / "rate", world, "rate", patience=2).fit()
    assert (state.step, state.best_step) == (6, 4)
    assert "step 6: no better validation since step 4 (--loop.early-stopping-patience 2)" in capsys.readouterr().err
    (event,) = read_events(tmp_path / "rate/metrics.jsonl", "early_stop")
    assert (event["step"], event["best_step"]) == (6, 4)
    assert toy_run(tmp_path / "loss", world, None, patience=2).fit().step == 8


class StopAfter(Callback):
    """Asks the trainer to stop in a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def pre_optim_step(self, trainer: Trainer) -> None:
        trainer.stop_requested = trainer.state.step + 1 == self.step


@pytest.mark.parametrize("step", [1, 4, 5])
def test_patience_is_counted_across_a_restart(tmp_path: Path, world: DistributedContext, step: int) -> None:
    expected = toy_run(tmp_path / "uninterrupted", world, "rate", patience=2).fit()
    with pytest.raises(Stopped):
        toy_run(tmp_path / "killed", world, "rate", StopAfter(step), patience=2).fit()
    assert toy_run(tmp_path / "killed", world, "rate", patience=2).fit() == expected
    assert curve(tmp_path / "killed") == curve(tmp_path / "uninterrupted")


def test_patience_needs_validations() -> None:
    with pytest.raises(ConfigError, match=r"--loop\.early-stopping-patience 3 counts validations"):
        LoopSettings(early_stopping_patience=3).split_batch(1)


def test_expected_hit_of_tied_candidates() -> None:
    ranking = RankedList(ids=("a", "b", "c"), logprobs=(-1.0, -1.0, -2.0))
    assert expected_hit(ranking, ["b"]) == 0.5
    assert expected_hit(ranking, ["a", "b"]) == 1.0
    assert expected_hit(ranking, ["c"]) == 0.0


def test_listed_subset_is_evenly_spaced_over_lists_with_a_target(assets: Assets) -> None:
    rows = read_conversations(assets.rows)
    listed = [row for row in rows if set(row.targets) & set(row.candidates[KEY])]
    assert 0 < len(listed) < len(rows)
    assert listed_subset(rows, KEY, 1000) == listed
    assert listed_subset(rows, KEY, 0) == []
    half = listed_subset(rows, KEY, len(listed) // 2)
    assert [listed.index(row) for row in half][:3] == [0, 2, 4]


def tune_argv(assets: Assets, out: Path, *options: str) -> list[str]:
    inputs = ["--store", assets.store, "--train", assets.rows, "--valid", assets.rows, "--max-length", "400"]
    loop = {"steps": 10, "global-batch-size": 8, "lr": 0.02, "eval-every": 1, "save-every": 2, "schedule": "constant"}
    flags = [arg for key, value in loop.items() for arg in (f"--loop.{key}", str(value))]
    selection = [*flags, "--lora.r", "2", "--lora.dropout", "0.2", "--select", "hit_rate"]
    return ["tune", *map(str, inputs), "--out", str(out), "--model.name", str(assets.base), *selection, *options]


def adapter_digest(run: Path) -> str:
    return hashlib.sha256((run / "bundle/language_adapter/adapter_model.safetensors").read_bytes()).hexdigest()


@pytest.mark.dist
def test_tune_keeps_the_adapter_of_the_highest_hit_rate(
    assets: Assets, tmp_path: Path, fork_server: ForkServer
) -> None:
    """Two ranks, uninterrupted and killed; the bundle has the hit rate that the journal records."""
    uninterrupted, killed, log = tmp_path / "uninterrupted", tmp_path / "killed", tmp_path / "log"
    run = fork_server.start(tune_argv(assets, uninterrupted), log, ranks=2)
    assert fork_server.wait(run) == [0, 0], output(run)
    run = fork_server.start(tune_argv(assets, killed), log, ranks=2)
    stop_when(run, (killed / "checkpoints/step-000004").exists, signal.SIGKILL)
    fork_server.kill(run)
    fork_server.wait(run)
    run = fork_server.start(tune_argv(assets, killed), log, ranks=2)
    assert fork_server.wait(run) == [0, 0], output(run)
    assert curve(killed) == curve(uninterrupted)
    assert adapter_digest(killed) == adapter_digest(uninterrupted)

    rows = [row for row in curve(uninterrupted) if row["step"] and "valid_hit_rate" in row]
    best = max(rows, key=lambda row: (row["valid_hit_rate"], -row["valid_loss"]))
    result = json.loads((uninterrupted / "result.json").read_text())
    assert (result["best_step"], result["best_hit_rate"]) == (best["step"], best["valid_hit_rate"])

    lists = listed_subset(read_conversations(assets.rows), KEY, 200)
    ranker = Ranker(Bundle.load(uninterrupted / "bundle"), ItemStore.open(assets.store))
    rankings = ranker.rank([Request(conversation=c, candidates=c.candidates[KEY]) for c in lists])
    hits = [expected_hit(ranking, c.targets) for ranking, c in zip(rankings, lists, strict=True)]
    assert sum(hits) / len(hits) == pytest.approx(best["valid_hit_rate"])


SCRIPTED = """
import sys
from lavic.cli import main
from lavic.launch.training import hit_rate

rates = iter((0.0, 0.1, 0.9, 0.2, 0.3, 0.4))
hit_rate.HitRateScorer.__call__ = lambda self, check_stop: {hit_rate.HIT_RATE: next(rates)}
sys.exit(main(sys.argv[1:]))
"""
"""The command with hit rates that peak after the second step."""


@pytest.mark.dist
def test_tune_stops_early_by_the_hit_rate(assets: Assets, tmp_path: Path, fork_server: ForkServer) -> None:
    argv = tune_argv(assets, tmp_path / "run", "--loop.early-stopping-patience", "3")
    run = fork_server.run(["-c", SCRIPTED, *argv])
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert (result["steps"], result["best_step"], result["best_hit_rate"]) == (5, 2, 0.9)


def test_select_hit_rate_without_ranked_lists_is_refused(assets: Assets, tmp_path: Path) -> None:
    from lavic.launch.training.tune_stage import TuneStage
    from lavic.model.config import ModelSettings

    paths = {"store": assets.store, "train": assets.rows, "valid": assets.rows, "out": tmp_path / "run"}
    settings = TuneSettings(**paths, model=ModelSettings(name=str(assets.base)), select="hit_rate", ranked_lists=0)
    with pytest.raises(ConfigError, match="--select hit_rate: --ranked-lists is 0"):
        TuneStage(settings, DistributedContext())
