"""The journal: what a run writes whatever becomes of MLflow."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from lavic.errors import LavicError, Stopped
from lavic.tracking.journal import Journal, read_events, read_journal
from lavic.tracking.settings import TrackingSettings
from lavic.tracking.tracker import Tracker


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_journal_lines_are_whole_and_plain(tmp_path):
    import numpy as np
    import torch

    journal = Journal(tmp_path / "run" / "metrics.jsonl")
    journal.log(1, loss=torch.tensor(0.5), lr=np.float32(0.25), bad=float("nan"))
    journal.event("captions", full={"perplexity": 2.5}, path=Path("x"))
    journal.close("FINISHED")
    journal.close()
    first, second, third = lines(journal.path)
    assert {**first, "time": 0} == {"time": 0, "step": 1, "loss": 0.5, "lr": 0.25, "bad": None}
    assert (second["event"], second["full"], second["path"]) == ("captions", {"perplexity": 2.5}, "x")
    assert (third["event"], third["status"]) == ("end", "FINISHED")
    assert abs(first["time"] - time.time()) < 60


def test_a_torn_last_line_costs_only_itself(tmp_path):
    path = tmp_path / "metrics.jsonl"
    Journal(path).log(1, loss=1.0)
    with path.open("a") as file:
        file.write('{"time": 1, "step": 2, "lo')
    Journal(path).log(3, loss=3.0)
    assert [record["step"] for record in read_journal(path)] == [1, 3]


def test_a_resumed_run_reads_as_one_that_never_stopped(tmp_path):
    journal = Journal(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3, 4):
        journal.log(step, loss=10.0 + step)
    journal.log(4, valid_loss=5.0)
    journal.event("resume", step=2)
    journal.log(3, loss=20.0)
    assert [(r["step"], r.get("loss")) for r in read_journal(journal.path)] == [(1, 11.0), (2, 12.0), (3, 20.0)]
    assert read_events(journal.path, "resume")[0]["step"] == 2


def test_without_a_resume_event_the_last_of_equal_records_counts(tmp_path):
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.log(1, loss=1.0)
    journal.log(1, valid_loss=9.0)
    journal.log(1, loss=2.0)
    assert [(r.get("loss"), r.get("valid_loss")) for r in read_journal(journal.path)] == [(2.0, None), (None, 9.0)]


def test_the_null_tracker_does_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tracker = Tracker.open(tmp_path / "run", TrackingSettings(mlflow=True), main=False)
    tracker.start("x", {"a": 1})
    tracker.log(1, loss=1.0)
    tracker.artifact(tmp_path)
    tracker.finish()
    assert list(tmp_path.iterdir()) == []


def test_the_way_out_of_the_block_is_the_status(tmp_path):
    for number, error in enumerate((None, ValueError(), Stopped(), KeyboardInterrupt())):
        try:
            with Tracker.open(tmp_path / str(number)) as tracker:
                tracker.start("x")
                if error is not None:
                    raise error
        except (ValueError, Stopped, KeyboardInterrupt):
            pass
    ends = [read_events(tmp_path / str(number) / "metrics.jsonl", "end")[0]["status"] for number in range(4)]
    assert ends == ["FINISHED", "FAILED", "KILLED", "KILLED"]


def test_a_run_that_ends_since_its_disk_is_full_says_so_once(tmp_path, monkeypatch):
    with pytest.raises(LavicError) as met, Tracker.open(tmp_path):
        monkeypatch.setattr("lavic.tracking.journal.os.write", lambda *_: 0)
        raised = LavicError("the first")
        raise raised
    assert met.value is raised
