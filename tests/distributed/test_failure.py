"""A rank of several that fails says why and ends, whatever the other ranks do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.fork_server import ForkServer

pytestmark = pytest.mark.dist

KINDS = {
    "memory": (
        1,
        r"lavic distill: error: the GPU is out of memory \(tried to allocate 2.00 GiB; GPU 0 has a total capacity of "
        r"79.11 GiB of which 1.02 GiB is free\): lower --loop.micro-batch or --loop.micro-tokens, or use "
        r"--loop.activation-checkpointing \[rank 1\]\n",
    ),
    "host-memory": (
        1,
        r"lavic distill: error: the machine is out of memory \(tried to allocate 4611686018427387904 bytes\): lower "
        r"--loop.micro-batch .*\n",
    ),
    "worker": (
        1,
        r"lavic distill: error: a data loader worker \(pid \d+\) "
        r"(is killed by signal: Killed|exited unexpectedly): is the machine out of memory\? "
        r"Lower num_workers to use less memory \[rank 1\]\n",
    ),
    "unreadable": (1, r"lavic distill: error: shard 7 cannot be read \[rank 1\]\n"),
    "disk": (
        1,
        r"lavic distill: error: could not write \(No space left on device\): make room, then run the same command "
        r"again\n",
    ),
    "callback": (
        1,
        r"lavic: rank 1 failed:\nTraceback \(most recent call last\):\n(  .*\n)+KeyError: 'perplexity'\n",
    ),
}
"""Kind -> exit code, and all that the rank says."""


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory, fork_server: ForkServer) -> Path:
    """A folder with the output of each kind of failure; the program ends although destroying a group never does."""
    folder = tmp_path_factory.mktemp("failed")
    program = Path(__file__).with_name("failing_program.py")
    fork_server.run([program, folder, *KINDS]).check_returncode()
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_what_happened_is_said_once_and_nobody_is_waited_for(kind: str, failed: Path) -> None:
    code, expected = KINDS[kind]
    assert re.fullmatch(expected, (failed / f"{kind}.log").read_text())
    assert (failed / f"{kind}.code").read_text() == str(code)
