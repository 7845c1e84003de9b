"""Ranks that wait in vain say for whom."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lavic.distributed.context import World, free_port
from lavic.distributed.hang_watchdog import RollCall, Sign, _report, record_collectives
from lavic.train.config import LoopSettings
from lavic.train.deepspeed.engine import Engine
from lavic.train.evaluation import score
from lavic.train.trainer import take_step
from tests.train.toy import ToyData, ToyTask


def first_rank_says(how: str, *more: str, asked: int = 0) -> tuple[int, str]:
    """Exit code and standard error of rank 0, or of `asked`, when the other one does not come to step 3."""
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    env |= {"OMP_NUM_THREADS": "1", "LAVIC_DEVICE": "cpu", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    command = [sys.executable, str(Path(__file__).with_name("rank_that_leaves.py")), how, *more]
    ranks = [
        subprocess.Popen(command, env={**env, "RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True)
        for rank in "01"
    ]
    try:
        said = ranks[asked].communicate(timeout=90)[1]
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    return ranks[asked].returncode, said


@pytest.mark.dist
def test_a_rank_that_hangs_is_named_before_and_when_the_collective_gives_up() -> None:
    code, said = first_rank_says("hangs")
    assert code == 1
    assert re.search(
        r"at step 3: 1 of 2 ranks wait for rank 1 \(\S+\), which has been at the samples of step 3 for", said
    )
    assert re.search(
        r"\n  rank 1 \(\S+\) at the samples of step 3, for \d+ s:\n(    \S+:\d+ in \S+\n)*"
        r"    \S+rank_that_leaves.py:\d+ in main\n",
        said,
    ), "its stack"
    assert re.search(r"\n  rank 0 \(\S+\) at step 3, for \d+ s:\n(    \S+:\d+ in \S+\n)*    \S+ in all_reduce\n", said)
    assert re.search(r"error: at step 3: rank 1 \(\S+\) has not come; it has been at the samples of step 3 for", said)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("killed", r"rank 1 \(\S+\) is gone; it was last seen at "),
        ("failed", r"rank 1 \(\S+\) left at the samples of step 3: shard 7 cannot be read"),
    ],
)
def test_a_rank_that_died_is_named(how: str, words: str) -> None:
    code, said = first_rank_says(how)
    assert code == 1
    assert re.search(f"error: at step 3: {words}", said), said


@pytest.mark.dist
def test_a_rank_that_cannot_notice_is_told_and_ended(tmp_path: Path) -> None:
    """As under NCCL, where a collective whose other side has failed raises nothing."""
    code, said = first_rank_says("unnoticed", str(tmp_path / "records"))
    assert code == 1
    report, _, end = said.partition("rank 0 ends at step 3: another rank has left")
    assert end.strip() == ""
    assert re.search(r"rank 1 \(\S+\) left at the samples of step 3: shard 7 cannot be read\n", report)
    assert re.search(
        r"  rank 0 \(\S+\) at step 3, for \d+ s:\n(    .*\n)+    \S+rank_that_leaves.py:\d+ in wait_as_nccl_does\n",
        report,
    )
    (record,) = (tmp_path / "records").glob("rank_0")
    collectives = pickle.loads(record.read_bytes())["entries"]
    assert {entry["profiling_name"] for entry in collectives} >= {"gloo:all_reduce"}


@pytest.mark.dist
def test_a_rank_that_cannot_notice_is_ended_when_rank_0_is_gone() -> None:
    code, said = first_rank_says("main-killed", asked=1)
    assert code == 1
    assert said.splitlines()[-1] == "rank 1 ends at step 3: lost rank 0; its own output says why"


def test_ranks_that_do_the_same_are_reported_together() -> None:
    def sign(host: str, **more: object) -> Sign:
        return Sign(**{"host": host, "count": 7, "place": "the update", "since": 3.0, "beat": 9, "answered": 1, **more})

    signs = {rank: sign(f"gpu{rank // 4}", stack="a.py:1 in f\nb.py:2 in g") for rank in range(8)}
    signs[2] = sign("gpu0", left="no memory left", place="forward 2", answered=0)
    signs[6] = sign("gpu1", place="backward 1", answered=0)
    signs[7] = sign("gpu1", place="the samples", stack="c.py:3 in h", since=8.0)
    assert _report(signs, 1).splitlines() == [
        "where the ranks are:",
        "  rank 2 (gpu0) left at forward 2: no memory left",
        "  rank 6 (gpu1) gives no sign of life; it was last seen at backward 1",
        "  ranks 0-1, 3-5 at the update, for 3 s:",
        "    a.py:1 in f",
        "    b.py:2 in g",
        "  rank 7 (gpu1) at the samples, for 8 s:",
        "    c.py:3 in h",
    ]


def test_the_flight_recorder_is_turned_on_where_the_user_has_not_set_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {"TORCH_FR_BUFFER_SIZE": "10"})
    record_collectives(tmp_path / "records")
    assert (tmp_path / "records").is_dir()
    assert os.environ["TORCH_FR_BUFFER_SIZE"] == "10"
    assert os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert os.environ["TORCH_FR_DUMP_TEMP_FILE"] == str(tmp_path / "records/rank_")


def test_a_step_tells_where_it_is(world: World) -> None:
    """So that a rank that hangs in a forward pass is behind those that wait for its gradients."""
    data, places = ToyData(8, 1), []
    engine = Engine(ToyTask(), world, LoopSettings(batch=2, micro_batch=1))
    take_step(engine, [data.collate([data[n]]) for n in (1, 2)], 0.01, world, at=places.append)
    engine.close()
    passes = [f"{way} {number}" for number in (1, 2) for way in ("forward", "backward")]
    assert places == ["the count", *passes, "the update"]
    score(engine.task, data, world, batch=1, device=engine.device, at=places.append)
    assert places[6:] == ["window 1", "the end"]


def test_a_world_of_one_waits_for_nobody() -> None:
    with RollCall(World()) as roll:
        roll.at("step 1")
    with pytest.raises(RuntimeError, match="gloo"), RollCall(World()):
        raise RuntimeError("gloo is not concerned")
