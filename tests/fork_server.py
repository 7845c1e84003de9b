"""Python programs without their start-up: a process that has imported everything forks one process for each.

An interpreter that imports torch, transformers and DeepSpeed takes seconds, a fork none: tests can start a command
again and again. The forked process is like any other: it has its own session, environment and output, and it may be
killed. What a fork cannot show is the start-up itself: tests of imports, launchers and batch jobs start interpreters.
`forked_program` is the other side: the server, and what it forks.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lavic.distributed.launcher_env import free_port

SERVER = Path(__file__).with_name("forked_program.py")
MLFLOW_MODULES = ("matplotlib.backends.backend_agg", "mlflow.store.tracking.sqlalchemy_store")
"""Modules of `lavic sync`, for `ForkServer.preload`: other commands do not import them."""
DEFAULTS = {"LAVIC_DEVICE": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
"""Variables of the server, and of programs that are given no environment."""
LAUNCHER_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)
"""Set in the test process while a process group is open there; other programs must not join it."""


@dataclass
class ForkedProcess:
    """A program that runs in a forked process; as far as tests need it, a `subprocess.Popen`."""

    server: ForkServer
    pid: int
    stdout: Path
    stderr: Path
    """The same file as `stdout` if the program's output goes to one log."""
    returncode: int | None = None
    """Exit code, negative for a signal; None while the program runs or before it is waited for."""

    @property
    def log(self) -> Path:
        """The file of its output."""
        return self.stdout

    @property
    def gone(self) -> bool:
        """Whether it has ended; it stays a zombie until it is waited for."""
        if self.returncode is not None:
            return True
        stat = Path(f"/proc/{self.pid}/stat").read_text()
        return stat.rpartition(")")[2].split()[0] == "Z"

    def poll(self) -> int | None:
        """Its exit code if it has ended."""
        return self.wait() if self.gone else None

    def wait(self, timeout: float = 300.0) -> int:
        """Its exit code.

        Raises:
            TimeoutError: It ran for more than `timeout` seconds and was killed; with the end of its output.
        """
        until = time.monotonic() + timeout
        while not self.gone:
            if time.monotonic() > until:
                self.kill()
                raise TimeoutError("\n".join(self._output())[-3000:])
            time.sleep(0.005)
        if self.returncode is None:
            self.returncode = self.server.request({"wait": self.pid})
        return self.returncode

    def communicate(self, timeout: float = 300.0) -> tuple[str, str]:
        """Waits; returns what it has printed to stdout and stderr, "" for a device."""
        self.wait(timeout)
        return self._output()

    def _output(self) -> tuple[str, str]:
        stdout, stderr = (
            file.read_text("utf-8", "surrogateescape") if file.is_file() else "" for file in (self.stdout, self.stderr)
        )
        return stdout, stderr

    def send_signal(self, number: int) -> None:
        """Sends a signal unless it has ended."""
        if not self.gone:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """Starts programs by forking."""

    def __init__(self) -> None:
        env = _default_environment() | {"PYTHONPATH": str(Path(__file__).parents[1])}
        self._folder = Path(tempfile.mkdtemp(prefix="fork-server-"))
        self._outputs = 0
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, str(SERVER)], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.request({})  # until it has imported everything

    def popen(
        self,
        argv: Sequence[object],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        log: Path | None = None,
        stdout: Path | None = None,
    ) -> ForkedProcess:
        """Starts a program.

        Args:
            argv: The interpreter's arguments: `-m lavic ...`, `-c CODE ...`, `-m MODULE ...` or `FILE ...`.
            env: Its environment; by default that of the test with `DEFAULTS`, without `LAUNCHER_VARIABLES`.
            cwd: Its working directory; by default that of the test.
            log: File to which it appends both stdout and stderr; by default each goes to a file of its own.
            stdout: File or device for stdout alone.
        """
        self._outputs += 1
        stdout = stdout or log or self._folder / f"{self._outputs}.stdout"
        stderr = log or self._folder / f"{self._outputs}.stderr"
        for file in (stdout, stderr):
            file.open("a").close()  # a test may read it before the program opens it
        request = {
            "argv": [str(arg) for arg in argv],
            "env": _default_environment() if env is None else dict(env),
            "cwd": str(cwd or Path.cwd()),
            "stdout": str(stdout),
            "stderr": str(stderr),
        }
        return ForkedProcess(self, self.request(request), stdout, stderr)

    def preload(self, *modules: str) -> None:
        """Imports modules that programs started from now on need not import."""
        self.request({"preload": modules})

    def run(
        self, argv: Sequence[object], *, timeout: float = 300.0, **options: object
    ) -> subprocess.CompletedProcess[str]:
        """Runs a program to its end; takes what `popen` takes."""
        process = self.popen(argv, **options)  # type: ignore[arg-type]
        stdout, stderr = process.communicate(timeout)
        assert process.returncode is not None
        return subprocess.CompletedProcess([str(arg) for arg in argv], process.returncode, stdout, stderr)

    def lavic(
        self,
        *argv: object,
        ranks: int = 1,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout: float = 300.0,
    ) -> subprocess.CompletedProcess[str]:
        """Runs `lavic ARGV` in `ranks` processes.

        Returns:
            The first exit code that is not 0, rank 0's stdout, and stderr of all ranks.
        """
        started = self.popen_ranks(["-m", "lavic", *argv], ranks=ranks, env=env, cwd=cwd)
        outputs = [process.communicate(timeout) for process in started]
        code = next((process.returncode for process in started if process.returncode), 0)
        stderr = "".join(stderr for _, stderr in outputs)
        return subprocess.CompletedProcess([str(arg) for arg in argv], code, outputs[0][0], stderr)

    def popen_ranks(
        self,
        argv: Sequence[object],
        *,
        ranks: int,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        log: Path | None = None,
    ) -> list[ForkedProcess]:
        """Starts a program in `ranks` processes of one process group; with a `log`, each appends to `log`.RANK."""
        env = _default_environment() if env is None else dict(env)
        port = str(free_port())
        started = []
        for rank in range(ranks):
            own = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "GLOO_SOCKET_IFNAME": "lo",
            }
            file = Path(f"{log}.{rank}") if log else None
            rank_env = env | own if ranks > 1 else env
            started.append(self.popen(argv, env=rank_env, cwd=cwd, log=file))
        return started

    def start(self, argv: Sequence[str], log: Path, *, ranks: int = 1) -> list[ForkedProcess]:
        """Starts `lavic ARGV` in `ranks` processes; each appends its output to `log`.RANK."""
        return self.popen_ranks(["-m", "lavic", *argv], ranks=ranks, log=log)

    def wait(self, processes: Sequence[ForkedProcess], seconds: float = 300.0, *, until_one: bool = False) -> list[int]:
        """Exit codes of the ranks of one run, negative for a signal.

        Args:
            processes: The ranks.
            seconds: After which they are killed.
            until_one: Kill the others as soon as one has ended, as a launcher does.
        """
        until = time.monotonic() + seconds
        while not all(process.gone for process in processes):
            if until_one and any(process.gone for process in processes):
                time.sleep(1.0)
                self.kill(processes)
                break
            if time.monotonic() > until:
                self.kill(processes)
                raise TimeoutError("".join(process.log.read_text() for process in processes)[-3000:])
            time.sleep(0.005)
        return [process.wait() for process in processes]

    def kill(self, processes: Sequence[ForkedProcess]) -> None:
        """SIGKILL."""
        for process in processes:
            process.kill()

    def close(self) -> None:
        """Ends the server and the processes that still run."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def request(self, request: dict[str, object]) -> int:
        """Asks the server; returns its reply."""
        assert self._process.stdin and self._process.stdout
        with self._lock:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(json.dumps(request) + "\n")
                self._process.stdin.flush()
            reply = self._process.stdout.readline()
        if not reply:
            raise RuntimeError(f"the fork server ended with exit code {self._process.wait(30)}; see its stderr")
        return int(reply)


def _default_environment() -> dict[str, str]:
    """The environment of the test, without the variables of a process group that is open in the test process."""
    return {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES} | DEFAULTS
