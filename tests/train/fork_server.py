"""Ranks without their start-up: a process that has imported everything forks one for each run.

An interpreter that imports torch and DeepSpeed takes seconds, a fork none: tests that kill and start a run again and
again can afford it. The forked process is a rank like any other: `lavic.cli.main` runs in it, it may be killed.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lavic.distributed.failure import exit_process
from lavic.distributed.launcher_env import free_port

READY = (
    *("lavic.launch.distill", "lavic.launch.tune", "lavic.model.bundle", "lavic.recommend.ranking.ranker", "peft"),
    *(f"lavic.train.{name}" for name in ("checkpoint", "distillation.task", "recommendation.task", "trainer")),
)
"""What a rank imports before it begins."""


@dataclass
class Rank:
    """One process of a run."""

    pid: int
    log: Path

    @property
    def gone(self) -> bool:
        """Whether it has ended; it stays a zombie until it is waited for."""
        stat = Path(f"/proc/{self.pid}/stat").read_text()
        return stat.rpartition(")")[2].split()[0] == "Z"


class ForkServer:
    """Starts ranks by forking."""

    def __init__(self) -> None:
        # less what a world that is open in this process has put there: a port that is in use
        launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
        env = {name: value for name, value in os.environ.items() if name not in launched}
        env |= {"LAVIC_DEVICE": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._ask({})  # until it has imported everything

    def start(self, argv: Sequence[str], log: Path, *, ranks: int = 1) -> list[Rank]:
        """Runs `lavic ARGV` in `ranks` processes; each appends what it says to `log`.RANK."""
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
        env |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        started = []
        for rank in range(ranks):
            file = Path(f"{log}.{rank}")
            its = {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            started.append(Rank(self._ask({"argv": list(argv), "env": its, "log": str(file)}), file))
        return started

    def wait(self, ranks: Sequence[Rank], seconds: float = 300.0, *, until_one: bool = False) -> list[int]:
        """Exit codes of ranks, negative for a signal.

        Args:
            ranks: Of one run.
            seconds: After which they are killed.
            until_one: Kill the others as soon as one has ended, as a launcher does.
        """
        until = time.monotonic() + seconds
        while not all(rank.gone for rank in ranks):
            if until_one and any(rank.gone for rank in ranks):
                time.sleep(1.0)
                self.kill(ranks)
                break
            if time.monotonic() > until:
                self.kill(ranks)
                raise TimeoutError("".join(rank.log.read_text() for rank in ranks)[-3000:])
            time.sleep(0.005)
        return [self._ask({"wait": rank.pid}) for rank in ranks]

    def kill(self, ranks: Sequence[Rank]) -> None:
        """SIGKILL."""
        for rank in ranks:
            os.kill(rank.pid, 9)

    def close(self) -> None:
        """Ends the fork_server."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()

    def _ask(self, request: dict) -> int:
        assert self._process.stdin and self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        if not (reply := self._process.stdout.readline()):
            raise RuntimeError(f"the fork_server ended with exit code {self._process.wait(30)}; see its stderr")
        return int(reply)


def _serve() -> None:
    for name in READY:
        importlib.import_module(name)
    from lavic.train.deepspeed.engine import _deepspeed

    _deepspeed(torch.device("cpu"))
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            reply = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        elif "argv" in request:
            reply = os.fork()
            if reply == 0:
                _become(request)
        else:
            reply = 0
        print(reply, flush=True)


def _become(request: dict) -> None:
    """The forked process: never returns."""
    code = 70
    try:
        os.setsid()
        log = os.open(request["log"], os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
        null = os.open(os.devnull, os.O_RDONLY)
        for target, source in ((0, null), (1, log), (2, log)):
            os.dup2(source, target)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        os.environ.update(request["env"])
        from lavic.cli import main

        code = main(request["argv"])
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        exit_process(code)


if __name__ == "__main__":
    # output of imports must not be read as a reply
    answers = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(answers, "w")
    _serve()
