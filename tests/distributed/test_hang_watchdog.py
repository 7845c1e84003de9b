"""The rank that the others wait for is named."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path

import pytest

from lavic.distributed.context import DistributedContext
from lavic.distributed.flight_recorder import enable_flight_recorder
from lavic.distributed.hang_watchdog import HangWatchdog
from lavic.distributed.heartbeat import Heartbeat, format_report
from tests.fork_server import ForkServer

HANGING_RANK = Path(__file__).with_name("hanging_rank.py")


def output_of_rank(fork_server: ForkServer, how: str, *argv: object, rank_read: int = 0) -> tuple[int, str]:
    """Exit code and standard error of rank 0, or of `rank_read`, when the other one does not come to step 3."""
    ranks = fork_server.popen_ranks([HANGING_RANK, how, *argv], ranks=2)
    try:
        code = ranks[rank_read].wait(90)
        return code, ranks[rank_read].stderr.read_text()
    finally:
        fork_server.kill(ranks)
        fork_server.wait(ranks)


@pytest.mark.dist
def test_a_rank_that_hangs_is_named_before_and_when_the_collective_gives_up(fork_server: ForkServer) -> None:
    code, output = output_of_rank(fork_server, "hangs")
    assert code == 1
    assert re.search(r"at step 3: 1 of 2 ranks wait for rank 1 \(\S+\), at the samples of step 3 for", output)
    assert re.search(
        r"\n  rank 1 \(\S+\) at the samples of step 3, for \d+ s:\n(    \S+:\d+ in \S+\n)*"
        r"    \S+hanging_rank.py:\d+ in main\n",
        output,
    ), "its stack"
    assert re.search(
        r"\n  rank 0 \(\S+\) at step 3, for \d+ s:\n(    \S+:\d+ in \S+\n)*    \S+ in all_reduce\n", output
    )
    assert re.search(r"error: at step 3: rank 1 \(\S+\) is missing; at the samples of step 3 for", output)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("killed", r"rank 1 \(\S+\) has ended; last seen at "),
        ("failed", r"rank 1 \(\S+\) failed at the samples of step 3: shard 7 cannot be read"),
    ],
)
def test_a_rank_that_died_is_named(how: str, message: str, fork_server: ForkServer) -> None:
    code, output = output_of_rank(fork_server, how)
    assert code == 1
    assert re.search(f"error: at step 3: {message}", output), output


@pytest.mark.dist
def test_a_rank_that_cannot_notice_is_told_and_ended(tmp_path: Path, fork_server: ForkServer) -> None:
    """As under NCCL, where a collective whose other side has failed raises nothing."""
    code, output = output_of_rank(fork_server, "unnoticed", tmp_path / "records")
    assert code == 1
    report, _, end = output.partition("rank 0 ends at step 3: another rank has failed")
    assert end.strip() == ""
    assert re.search(r"rank 1 \(\S+\) failed at the samples of step 3: shard 7 cannot be read\n", report)
    assert re.search(
        r"  rank 0 \(\S+\) at step 3, for \d+ s:\n(    .*\n)+    \S+hanging_rank.py:\d+ in wait_as_nccl_does\n",
        report,
    )
    (record,) = (tmp_path / "records").glob("rank_0")
    collectives = pickle.loads(record.read_bytes())["entries"]
    assert {entry["profiling_name"] for entry in collectives} >= {"gloo:all_reduce"}


@pytest.mark.dist
def test_a_rank_that_cannot_notice_is_ended_when_rank_0_is_gone(fork_server: ForkServer) -> None:
    code, output = output_of_rank(fork_server, "main-killed", rank_read=1)
    assert code == 1
    assert output.splitlines()[-1] == "rank 1 ends at step 3: lost rank 0; see its output"


def test_ranks_that_do_the_same_are_reported_together() -> None:
    def heartbeat(host: str, **more: object) -> Heartbeat:
        return Heartbeat(
            **{"host": host, "position": 7, "place": "the update", "since": 3.0, "beat": 9, "answered": 1, **more}
        )

    heartbeats = {rank: heartbeat(f"gpu{rank // 4}", stack="a.py:1 in f\nb.py:2 in g") for rank in range(8)}
    heartbeats[2] = heartbeat("gpu0", error="out of memory", place="forward 2", answered=0)
    heartbeats[6] = heartbeat("gpu1", place="backward 1", answered=0)
    heartbeats[7] = heartbeat("gpu1", place="the samples", stack="c.py:3 in h", since=8.0)
    assert format_report(heartbeats, 1).splitlines() == [
        "where the ranks are:",
        "  rank 2 (gpu0) failed at forward 2: out of memory",
        "  rank 6 (gpu1) does not respond; last seen at backward 1",
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
    enable_flight_recorder(tmp_path / "records")
    assert (tmp_path / "records").is_dir()
    assert os.environ["TORCH_FR_BUFFER_SIZE"] == "10"
    assert os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert os.environ["TORCH_FR_DUMP_TEMP_FILE"] == str(tmp_path / "records/rank_")


def test_a_world_of_one_waits_for_nobody() -> None:
    with HangWatchdog(DistributedContext()) as watchdog:
        watchdog.mark("step 1")
    with pytest.raises(RuntimeError, match="gloo"), HangWatchdog(DistributedContext()):
        raise RuntimeError("gloo is not concerned")
