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
from collections.abc import Iterator, Sequence
from pathlib import Path

from lavic.distributed.launcher_env import free_port
from tests.slurm.slurm_jobs import NODES, Slurm, wait_for

# Debian puts daemons where a user's PATH does not look.
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue", "sinfo")

# The nodes say that they have what the scripts ask for: 8 GPUs and cores enough. `cred_expire` is also how long a
# requeued job waits before it starts again, two minutes by default. A job that waits for another starts when that has
# ended, not seconds later as on a busy cluster. Ranks meet at a port that follows from the job's id: clusters of two
# test processes on this machine count from different ids.
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
FirstJobId={ports[2]}
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
    missing = [name for name in PROGRAMS if not shutil.which(name, path=_PATH)]
    return f"no {', '.join(missing)} here: apt-get install slurm-wlm munge" if missing else ""


class NotStarted(Exception):
    """SLURM is installed and does not come up; says why."""


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
