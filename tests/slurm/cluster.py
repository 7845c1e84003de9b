"""A real SLURM of two nodes on this machine: munged, slurmctld and two slurmd on loopback, in a folder of its own.

    with cluster(folder) as slurm:
        job = slurm.submit("script.sbatch", "word")
        job.wait()

Also from the command line, to try things: `python -m tests.slurm.cluster FOLDER`, then `SLURM_CONF=FOLDER/slurm.conf`.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

# Debian puts daemons where a user's PATH does not look.
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue", "sinfo")
NODES = ("n1", "n2")

# The nodes say that they have what the scripts ask for: 8 GPUs and cores enough. `cred_expire` is also how long a
# requeued job waits before it starts again, two minutes by default.
_CONF = """
ClusterName=lavic
SlurmctldHost=localhost
SlurmctldPort={controller}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=20
CryptoType=crypto/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=2
JobRequeue=1
GresTypes=gpu
KillWait=10
SlurmdTimeout=20
UnkillableStepTimeout=180
NodeName={first} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[0]} CPUs=128 RealMemory=8000 Gres=gpu:8
NodeName={second} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=128 RealMemory=8000 Gres=gpu:8
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why there can be no SLURM here; empty where there can."""
    gone = [name for name in PROGRAMS if not shutil.which(name, path=_PATH)]
    return f"no {', '.join(gone)} here: apt-get install slurm-wlm munge" if gone else ""


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Raises TimeoutError, which says `what` was waited for, when the condition does not become true."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.1)


@dataclass(frozen=True)
class Slurm:
    """A running one."""

    folder: Path
    env: Mapping[str, str]
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def run(self, *words: str | Path, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
        """Runs one of SLURM's programs to its end."""
        return subprocess.run(
            [*map(str, words)], env={**self.env, **env}, cwd=cwd, capture_output=True, text=True, timeout=60
        )

    def submit(self, *words: str | Path, cwd: Path, **env: str) -> Job:
        """`sbatch WORDS` in a folder, with more environment."""
        done = self.run("sbatch", "--parsable", *words, cwd=cwd, **env)
        if done.returncode:
            raise RuntimeError(done.stderr)
        return Job(self, int(done.stdout), cwd)

    def start_node(self, name: str) -> None:
        """Starts a node's daemon."""
        words = ["slurmd", "-D", "-N", name]
        self.daemons[name] = subprocess.Popen(words, env=self.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

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
        """What `scontrol show job` says."""
        text = self.slurm.run("scontrol", "show", "job", "-o", str(self.number)).stdout
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    @property
    def state(self) -> str:
        return self.facts.get("JobState", "gone")

    @property
    def restarts(self) -> int:
        return int(self.facts.get("Restarts", 0))

    @property
    def log(self) -> str:
        """What the script and the ranks said."""
        file = self.folder / f"lavic-{self.number}.log"
        return file.read_text(errors="replace") if file.exists() else ""

    def wait(self, seconds: float = 240) -> int:
        """Waits for the job's end; returns its exit code, 128 + n where signal n ended it."""
        running = {"PENDING", "RUNNING", "COMPLETING", "REQUEUED", "CONFIGURING"}
        try:
            wait_for(lambda: self.state not in running, seconds, f"job {self.number}")
        except TimeoutError as error:
            raise TimeoutError(f"{error}; it is {self.state}\n{self.log[-3000:]}") from None
        code, _, number = self.facts["ExitCode"].partition(":")
        return 128 + int(number) if int(number) else int(code)

    def wait_until(self, text: str, seconds: float = 120) -> None:
        """Waits until the job's log holds a text."""
        try:
            wait_for(lambda: text in self.log or self.ended, seconds, repr(text))
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{self.log[-3000:]}") from None
        if text not in self.log:
            raise RuntimeError(f"job {self.number} ended without saying {text!r}:\n{self.log[-3000:]}")

    @property
    def ended(self) -> bool:
        return self.state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "gone")


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Slurm]:
    """Runs a SLURM for the length of the block.

    Args:
        folder: An empty one; keep its path short, sockets stand in it.
    """
    for name in ("state", *(f"spool.{node}" for node in NODES)):
        (folder / name).mkdir(parents=True)
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))
    conf = folder / "slurm.conf"
    conf.write_text(
        _CONF.format(
            folder=folder,
            user=pwd.getpwuid(os.getuid()).pw_name,
            controller=_port(),
            first=NODES[0],
            second=NODES[1],
            ports=[_port(), _port()],
        )
    )
    for number in range(8):
        (folder / f"gpu{number}").touch()
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")
    taken = ("SLURM_", "SBATCH_", "SRUN_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(taken)}
    slurm = Slurm(folder, {**env, "PATH": _PATH, "SLURM_CONF": str(conf)})
    started = slurm.daemons
    quiet = {"env": slurm.env, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    files = {"socket": "munge.sock", "pid-file": "munge.pid", "log-file": "munge.log", "seed-file": "munge.seed"}
    words = [f"--{name}={folder / file}" for name, file in {**files, "key-file": key.name}.items()]
    try:
        # --force: the folders above this one may belong to somebody else.
        started["munged"] = subprocess.Popen(["munged", "--foreground", "--force", *words], **quiet)
        wait_for((folder / "munge.sock").exists, 20, "munged")
        started["slurmctld"] = subprocess.Popen(["slurmctld", "-D"], **quiet)
        for node in NODES:
            slurm.start_node(node)
        wait_for(slurm.idle, 60, f"two idle nodes (logs in {folder})")
        yield slurm
    finally:
        with contextlib.suppress(subprocess.SubprocessError, OSError):
            slurm.run("scancel", "--partition=main")
            wait_for(lambda: not slurm.run("squeue", "-h").stdout.strip(), 20, "the jobs' end")
        for name in ("slurmctld", *NODES, "munged"):
            _end(started.get(name))


def _port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number: int = probe.getsockname()[1]
        return number


def _end(process: subprocess.Popen[bytes] | None) -> None:
    if process is None:
        return
    process.terminate()
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def main(words: Sequence[str]) -> None:
    """Holds a SLURM until Ctrl-C."""
    ends = {signal.SIGINT, signal.SIGTERM}
    with cluster(Path(words[0]).absolute()) as slurm:
        print(f"export SLURM_CONF={slurm.folder}/slurm.conf", flush=True)
        signal.pthread_sigmask(signal.SIG_BLOCK, ends)
        signal.sigwait(ends)


if __name__ == "__main__":
    main(sys.argv[1:])
