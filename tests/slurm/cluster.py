"""A real SLURM of two nodes on this machine: munged, slurmctld and two slurmd on loopback, in a folder of its own.

    with cluster(folder) as slurm:
        job = slurm.submit("script.sbatch", "word")
        job.wait()

Also from the command line, to try things: `python -m tests.slurm.cluster FOLDER` says the SLURM_CONF to use.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lavic.world import free_port

# Debian puts daemons where a user's PATH does not look.
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue", "sinfo")
NODES = ("n1", "n2")

# The nodes say that they have what the scripts ask for: 8 GPUs and cores enough. `cred_expire` is also how long a
# requeued job waits before it starts again, two minutes by default. A job that waits for another starts when that has
# ended, not seconds later as on a busy cluster.
_CONF = """
ClusterName=lavic
SlurmctldHost=localhost
SlurmctldPort={ports[2]}
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
SchedulerParameters=sched_interval=2,sched_min_interval=0,batch_sched_delay=0,bf_interval=2
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


class NotStarted(Exception):
    """SLURM is installed and does not come up; says why."""


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
        told = re.search(r"Submitted batch job (\d+)", done.stdout)
        if done.returncode or not told:
            raise RuntimeError(f"{line}: {done.stdout}{done.stderr}")
        return Job(self, int(told[1]), cwd)

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


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Slurm]:
    """Runs a SLURM for the length of the block.

    Args:
        folder: An empty one; keep its path short, sockets stand in it.

    Raises:
        NotStarted: Three times it did not come up; with the last words of its daemons.
    """
    for attempt in (1, 2, 3):
        slurm = _prepare(folder / str(attempt))
        try:
            _start(slurm)
            break
        # A port may have been taken since it was looked for: then all is tried again, with others.
        except (TimeoutError, OSError, subprocess.SubprocessError) as error:
            why = f"{error}; {_last_words(slurm.folder)}"
            _stop(slurm)
    else:
        raise NotStarted(why)
    try:
        yield slurm
    finally:
        with contextlib.suppress(subprocess.SubprocessError, OSError):
            slurm.run("scancel", "--partition=main")
            wait_for(lambda: not slurm.run("squeue", "-h").stdout.strip(), 20, "the jobs' end")
        _stop(slurm)


def _prepare(folder: Path) -> Slurm:
    """A cluster's folder with everything that its daemons read."""
    for name in ("state", *(f"spool.{node}" for node in NODES)):
        (folder / name).mkdir(parents=True)
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))
    conf = folder / "slurm.conf"
    ports = [free_port() for _ in (*NODES, "controller")]
    user = pwd.getpwuid(os.getuid()).pw_name
    conf.write_text(_CONF.format(folder=folder, user=user, first=NODES[0], second=NODES[1], ports=ports))
    for number in range(8):
        (folder / f"gpu{number}").touch()
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")
    taken = ("SLURM_", "SBATCH_", "SRUN_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(taken)}
    return Slurm(folder, {**env, "PATH": _PATH, "SLURM_CONF": str(conf)})


def _start(slurm: Slurm) -> None:
    folder = slurm.folder
    files = {"socket": "munge.sock", "pid-file": "munge.pid", "log-file": "munge.log", "seed-file": "munge.seed"}
    words = [f"--{name}={folder / file}" for name, file in {**files, "key-file": "munge.key"}.items()]

    def all_alive() -> bool:
        for name, daemon in slurm.daemons.items():
            if (code := daemon.poll()) is not None:
                raise OSError(f"{name} ended with exit code {code}")
        return True

    # --force: the folders above this one may belong to somebody else.
    slurm.start("munged", "munged", "--foreground", "--force", *words)
    wait_for(lambda: all_alive() and (folder / "munge.sock").exists(), 20, "munged")
    slurm.start("slurmctld", "slurmctld", "-D")
    for node in NODES:
        slurm.start_node(node)
    wait_for(lambda: all_alive() and slurm.idle(), 60, "two idle nodes", every=0.3)


def _stop(slurm: Slurm) -> None:
    for name in ("slurmctld", *NODES, "munged"):
        if daemon := slurm.daemons.get(name):
            daemon.terminate()
            try:
                daemon.wait(15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _last_words(folder: Path) -> str:
    """What the daemons complained of."""
    lines = [
        f"{file.name}: {line.strip()}"
        for file in sorted((*folder.glob("*.log"), *folder.glob("*.out")))
        for line in file.read_text(errors="replace").splitlines()
        if re.search(r"\b(error|fatal)\b", line, re.I)
    ]
    return "; ".join(lines[-6:]) or "its daemons complained of nothing"


def main(words: Sequence[str]) -> None:
    """Holds a SLURM until Ctrl-C."""
    ends = {signal.SIGINT, signal.SIGTERM}
    with cluster(Path(words[0]).absolute()) as slurm:
        print(f"export SLURM_CONF={slurm.folder}/slurm.conf", flush=True)
        signal.pthread_sigmask(signal.SIG_BLOCK, ends)
        signal.sigwait(ends)


if __name__ == "__main__":
    main(sys.argv[1:])
