"""A SLURM that runs, and its jobs, as tests see them."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

NODES = ("n1", "n2")


def wait_for(condition: Callable[[], object], seconds: float, what: str, every: float = 0.1) -> None:
    """Raises TimeoutError, which says `what` was waited for, when the condition does not become true."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError(f"waited {seconds:.0f} s for {what}")
        time.sleep(every)


@dataclass(frozen=True)
class Slurm:
    """A running one."""

    folder: Path
    env: Mapping[str, str]
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def run(self, *words: str | Path, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
        """Runs one of SLURM's programs to its end."""
        return subprocess.run(
            [*map(str, words)],
            env={**self.env, **env},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def submit(self, *words: str | Path, cwd: Path, **env: str) -> Job:
        """`sbatch WORDS` in a folder, with more environment."""
        done = self.run("sbatch", "--parsable", *words, cwd=cwd, **env)
        if done.returncode:
            raise RuntimeError(done.stderr)
        return Job(self, int(done.stdout), cwd)

    def typed(self, line: str, cwd: Path, **env: str) -> Job:
        """Types a line that submits a job, at a shell."""
        done = self.run("bash", "-c", line, cwd=cwd, **env)
        match = re.search(r"Submitted batch job (\d+)", done.stdout)
        if done.returncode or not match:
            raise RuntimeError(f"{line}: {done.stdout}{done.stderr}")
        return Job(self, int(match[1]), cwd)

    def start(self, name: str, *words: str) -> None:
        """Starts a daemon; what it says before it has a log goes to NAME.out."""
        with (self.folder / f"{name}.out").open("ab") as out:
            self.daemons[name] = subprocess.Popen(
                [*words], env=self.env, stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )

    def start_node(self, name: str) -> None:
        """Starts a node's daemon."""
        self.start(name, "slurmd", "-D", "-N", name)

    def lose_node(self, name: str) -> None:
        """Has a node vanish, as when its power goes: its daemon, its jobs' processes and their keepers, by SIGKILL."""
        for pid in (self.daemons[name].pid, *self._working_on(name)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.daemons[name].wait()

    def _working_on(self, name: str) -> set[int]:
        """Processes of jobs on a node, with the slurmstepd above them, whose environment does not name the node."""
        marks = {f"SLURM_CONF={self.env['SLURM_CONF']}".encode(), f"SLURMD_NODENAME={name}".encode()}
        parents: dict[int, int] = {}
        tasks, keepers = set(), set()
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, ValueError):
                comm, _, rest = (folder / "stat").read_text().partition(") ")
                parents[int(folder.name)] = int(rest.split()[1])
                if "(slurmstepd" in comm:
                    keepers.add(int(folder.name))
                elif marks <= set((folder / "environ").read_bytes().split(b"\0")):
                    tasks.add(int(folder.name))
        return tasks | {parents[task] for task in tasks} & keepers

    def idle(self) -> bool:
        """Whether both nodes wait for work."""
        return self.run("sinfo", "-h", "-N", "-o", "%T").stdout.split() == ["idle"] * len(NODES)


@dataclass(frozen=True)
class Job:
    """A submitted job."""

    slurm: Slurm
    number: int
    folder: Path

    @property
    def facts(self) -> dict[str, str]:
        """What `scontrol show job` says; nothing but a state where SLURM has forgotten the job, or does not answer."""
        done = self.slurm.run("scontrol", "show", "job", "-o", str(self.number))
        if done.returncode:
            return {"JobState": "gone" if "Invalid job id" in done.stderr else "unknown"}
        return dict(re.findall(r"(\S+?)=(\S*)", done.stdout))

    @property
    def state(self) -> str:
        return self.facts["JobState"]

    @property
    def restarts(self) -> int:
        return int(self.facts.get("Restarts", 0))

    @property
    def log(self) -> str:
        """What the script and the ranks said."""
        file = self.folder / f"lavic-{self.number}.log"
        return file.read_text(errors="replace") if file.exists() else ""

    def change(self, **facts: object) -> None:
        """`scontrol update`."""
        words = [f"{name}={value}" for name, value in facts.items()]
        done = self.slurm.run("scontrol", "update", f"JobId={self.number}", *words)
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr}")

    def start_now(self, **facts: object) -> None:
        """Spares a job that is in the queue again its wait of `cred_expire`."""
        wait_for(lambda: self.state == "PENDING", 60, "the job in the queue", every=0.3)
        # A node refuses the credential of a start that is not a second younger than the end of the one before.
        self.change(StartTime="now+2", **facts)

    def wait(self, seconds: float = 240) -> int:
        """Waits for the job's end; returns its exit code, 128 + n where signal n ended it."""
        running = {"PENDING", "RUNNING", "COMPLETING", "REQUEUED", "CONFIGURING", "unknown"}
        try:
            wait_for(lambda: self.state not in running, seconds, f"job {self.number}", every=0.3)
        except TimeoutError as error:
            raise TimeoutError(f"{error}; it is {self.state}\n{self.log[-3000:]}") from None
        code, _, number = self.facts["ExitCode"].partition(":")
        return 128 + int(number) if int(number) else int(code)

    def wait_until(self, text: str, seconds: float = 120) -> None:
        """Waits until the job's log holds a text."""
        try:
            wait_for(lambda: text in self.log or self.ended, seconds, repr(text), every=0.3)
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{self.log[-3000:]}") from None
        if text not in self.log:
            raise RuntimeError(f"job {self.number} ended without saying {text!r}:\n{self.log[-3000:]}")

    @property
    def ended(self) -> bool:
        return self.state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "gone")
