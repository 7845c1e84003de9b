"""Processes that run ranks: their environment, the signals that they are sent, how they ended."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lavic.distributed.context import DistributedContext
from lavic.distributed.rank_process import describe_exit, rank_environment, shell_exit_code


def test_a_rank_reads_what_its_environment_says() -> None:
    rank = DistributedContext(rank=5, local_rank=1, size=8, local_world_size=4, node_rank=1)
    env = rank_environment(rank, "10.0.0.1", 29500)
    assert DistributedContext.from_env(env) == replace(rank, launcher="torchrun")
    assert (env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"], env["LOCAL_WORLD_SIZE"]) == ("5", "8", "1", "4")
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("10.0.0.1", "29500")


@pytest.mark.parametrize(
    ("code", "text", "exit_code"),
    [
        (2, "exited with code 2", 2),
        (-15, "was killed by SIGTERM", 143),
        (-9, "was killed by SIGKILL (out of memory?)", 137),
    ],
)
def test_how_a_rank_ended(code: int, text: str, exit_code: int) -> None:
    assert (describe_exit(code), shell_exit_code(code)) == (text, exit_code)
