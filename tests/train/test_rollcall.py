"""Ranks that wait in vain say for whom."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lavic.train.engine import Engine
from lavic.train.loop import take_step
from lavic.train.rollcall import RollCall
from lavic.train.score import score
from lavic.train.settings import LoopSettings
from lavic.world import World, free_port
from tests.train.toy import ToyData, ToyTask


def first_rank_says(how: str) -> tuple[int, str]:
    """Exit code and standard error of rank 0, when rank 1 does not come to step 3."""
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    env |= {"OMP_NUM_THREADS": "1", "LAVIC_DEVICE": "cpu", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    command = [sys.executable, str(Path(__file__).with_name("absent.py")), how]
    ranks = [
        subprocess.Popen(command, env={**env, "RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True)
        for rank in "01"
    ]
    try:
        said = ranks[0].communicate(timeout=90)[1]
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    return ranks[0].returncode, said


@pytest.mark.dist
def test_a_rank_that_hangs_is_named_before_and_when_the_collective_gives_up() -> None:
    code, said = first_rank_says("hangs")
    assert code == 1
    assert re.search(
        r"at step 3: 1 of 2 ranks wait for rank 1 \(\S+\), which has been at the samples of step 3 for", said
    )
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
