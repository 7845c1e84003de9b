"""Tasks in local worker processes: a dead worker is replaced, an error ends the work."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from lavic.distributed.ray_session import RaySettings
from lavic.errors import DataError, LavicError
from lavic.shards.cluster.tasks import run_tasks


def _square(task: tuple[int, str]) -> int:
    number, folder = task
    if number == 3 and not (marker := Path(folder) / "died").exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 7:
        raise DataError("seven is not a number")
    if number == 8:
        raise KeyError("eight")
    if number == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def test_a_dead_worker_is_replaced(tmp_path: Path) -> None:
    tasks = [(n, str(tmp_path)) for n in range(6)]
    results = dict(run_tasks(_square, tasks, RaySettings(workers=2), on_ray=False))
    assert results == {task: task[0] ** 2 for task in tasks} and (tmp_path / "died").exists()


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [(7, DataError, "seven is not a number"), (8, LavicError, "KeyError"), (9, LavicError, "3 workers died.*SIGKILL")],
)
def test_an_error_in_a_task_ends_the_work(tmp_path: Path, number: int, kind: type, message: str) -> None:
    with pytest.raises(kind, match=f"(?s){message}"):
        list(run_tasks(_square, [(number, str(tmp_path)), (1, str(tmp_path))], RaySettings(workers=1), on_ray=False))
