from __future__ import annotations

import io
import sys
import threading

import pytest

from lavic.tracking import progress
from lavic.tracking.progress import progress_bar


def test_a_log_gets_plain_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_LOG_S", 0.0)
    threads = threading.active_count()
    with progress_bar(200, "photos", initial=100) as bar:
        bar.update(50)
        bar.set_postfix_str("gone 3")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("100/200 photos (50%), ") and lines[-1].startswith("150/200 photos (75%), ")
    assert lines[-1].endswith(" left, gone 3") and "\r" not in "".join(lines)
    assert threading.active_count() == threads


def test_short_work_gets_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(2, "conversations", "plain {model}") as bar:
        bar.update()
        bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("plain {model}: 2/2 conversations (100%), ")


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with progress_bar(4, "steps", "tune") as bar:
        bar.update(4)
    assert "\rtune: 100%|" in terminal.getvalue() and "| 4/4 [" in terminal.getvalue()


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(4, "steps", shown=False) as bar:
        bar.update(4)
        bar.set_postfix_str("loss 1.0")
    assert capsys.readouterr().err == ""
