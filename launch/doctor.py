"""`lavic doctor`: what this machine has, what is missing, how to mend it."""

from __future__ import annotations

import importlib.metadata
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from lavic.config import parse, settings
from lavic.errors import LaunchError

DESCRIPTION = """Looks at this machine: Python, packages, GPUs, memory, disk, home and cache folders, SLURM.

Exit code 0 when everything that a command needs is there, 1 when something is missing. A line that is not "ok" says
how to mend it."""

_GIB = 2**30
_NAME = 19
"""Width of the column of names; those of the packages are shorter."""
_SOCKET_PATH = 107
"""Longest path of a Unix socket, bytes."""
_RAY_SOCKET = "/ray/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store"
"""What Ray puts behind the temporary folder."""
_SLURM_S = 10.0


@settings
class Settings:
    """What is tried besides looking."""

    ray: bool = False
    """Start a local Ray and stop it again."""


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    name: str
    state: Literal["ok", "note", "missing"]
    found: str
    mend: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    chosen = parse(Settings, argv, command="doctor", description=DESCRIPTION)
    checks: list[Check] = []
    for check in examine(chosen):
        print(f"{check.state:<8}{check.name:<{_NAME}}{check.found}", flush=True)
        if check.mend:
            print(f"{'':<{8 + _NAME}}-> {check.mend}", flush=True)
        checks.append(check)
    missing = [check.name for check in checks if check.state == "missing"]
    print(f"missing: {', '.join(missing)}" if missing else "everything that a command needs is here")
    return 1 if missing else 0


def examine(chosen: Settings) -> Iterator[Check]:
    """Yields one check after the other, as each is done."""
    yield _python()
    yield from _packages()
    yield _gpus()
    yield from _room()
    yield from _folders()
    yield _slurm()
    if chosen.ray:
        yield _tried("ray start", "started and stopped", _start_ray)


def _python() -> Check:
    return Check("python", "ok", f"{'.'.join(map(str, sys.version_info[:3]))} ({sys.executable})")


def _packages() -> Iterator[Check]:
    """Each package of the extra `all` against the bounds in setup.py."""
    try:
        lines = importlib.metadata.requires("lavic") or []
    except importlib.metadata.PackageNotFoundError:
        yield Check("lavic", "missing", "not installed", "pip install -e '.[all]' in the repository")
        return
    for line in lines:
        wanted = Requirement(line)
        extra = next((name for name in ("", "crawl", "train", "mlflow") if _applies(wanted, name)), None)
        if extra is None:
            continue
        try:
            version = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            yield Check(wanted.name, "missing", "not installed", f"pip install 'lavic[{extra or 'all'}]'")
            continue
        if wanted.specifier.contains(version, prereleases=True):
            yield Check(wanted.name, "ok", version)
        else:
            mend = f"tried with {wanted.specifier}; pip install '{wanted.name}{wanted.specifier}'"
            yield Check(wanted.name, "note", version, mend)


def _applies(wanted: Requirement, extra: str) -> bool:
    return wanted.marker is None if not extra else bool(wanted.marker and wanted.marker.evaluate({"extra": extra}))


def _gpus() -> Check:
    try:
        import torch
    except ModuleNotFoundError:
        return Check("gpu", "missing", "torch is not installed", "pip install torch (https://pytorch.org/get-started)")
    if not torch.cuda.is_available():
        mend = ""
        if shutil.which("nvidia-smi"):
            mend = (
                f"nvidia-smi is here, but torch {torch.__version__} sees no GPU: install torch's build for your driver"
            )
        return Check("gpu", "note", "none: training runs on CPU, which is for the miniature", mend)
    cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return Check("gpu", "ok", "; ".join(f"{card.name} {card.total_memory / _GIB:.0f} GiB" for card in cards))


def _room() -> Iterator[Check]:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB
    cores = len(os.sched_getaffinity(0))
    mend = "" if total >= 6 else "the miniature needs 6 GiB"
    yield Check("memory", "ok" if not mend else "note", f"{total:.0f} GiB, {cores} cores", mend)
    for name, place, needed in (("disk", Path.cwd(), 5.0), ("shared memory", Path("/dev/shm"), 0.5)):
        if place.exists():
            free = shutil.disk_usage(place).free / _GIB
            mend = "" if free >= needed else f"{needed:g} GiB free wanted in {place}"
            yield Check(name, "ok" if not mend else "note", f"{free:.1f} GiB free in {place}", mend)
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    yield Check("open files", "ok" if files >= 1024 else "note", str(files), "" if files >= 1024 else "ulimit -n 4096")


def _folders() -> Iterator[Check]:
    """Folders that libraries write to without being asked."""
    try:
        home = Path.home()
        mend = "" if os.access(home, os.W_OK | os.X_OK) else "not writable: export HOME=/a/folder/of/yours"
        yield Check("home", "note" if mend else "ok", str(home), mend)
    except RuntimeError:
        yield Check("home", "missing", "no HOME, and no entry for this user", "export HOME=/a/folder/of/yours")
        return
    cache = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "huggingface")
    there = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(there).free / _GIB
    mend = "" if free >= 20 else "a 7B model takes 15 GiB: export HF_HOME=/a/larger/disk"
    yield Check("Hugging Face cache", "note" if mend else "ok", f"{cache}, {free:.1f} GiB free", mend)
    temporary = Path(tempfile.gettempdir())
    length = len(os.fsencode(f"{temporary}{_RAY_SOCKET}"))
    mend = "" if length <= _SOCKET_PATH else "too long for Ray's sockets: export TMPDIR=/tmp"
    yield Check("temporary folder", "note" if mend else "ok", str(temporary), mend)


def _slurm() -> Check:
    """Whether a SLURM is here, and answers: a login node may have the commands and no controller."""
    if not shutil.which("sbatch"):
        return Check("slurm", "note", "no sbatch here: one machine only")
    try:
        done = subprocess.run(["sinfo", "-h", "-o", "%P"], capture_output=True, text=True, timeout=_SLURM_S)
        reason = next(iter(done.stderr.strip().splitlines()), f"exit {done.returncode}")
    except subprocess.TimeoutExpired:
        done, reason = None, f"no answer within {_SLURM_S:.0f} s"
    except OSError as error:
        done, reason = None, f"sinfo: {error.strerror}"
    if done is None or done.returncode:
        return Check("slurm", "note", f"sbatch is here, sinfo fails: {reason}", "ask for slurmctld, or use one machine")
    partitions = ", ".join(dict.fromkeys(done.stdout.split())) or "no partition"
    return Check("slurm", "ok", f"partitions: {partitions}")


def _tried(name: str, done: str, action: Callable[[], None]) -> Check:
    start = time.monotonic()
    try:
        action()
    except LaunchError as error:
        return Check(name, "missing", "failed", str(error))
    return Check(name, "ok", f"{done} in {time.monotonic() - start:.0f} s")


def _start_ray() -> None:
    code = "import ray; ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False); ray.shutdown()"
    env = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    _run_python(code, env, 180, "Ray did not start")


def _run_python(code: str, env: Mapping[str, str], timeout_s: float, failed: str) -> None:
    """Runs `code` in a process of its own. Raises LaunchError with its last line where it fails or takes too long."""
    try:
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise LaunchError(f"{failed} within {timeout_s:.0f} s") from None
    if done.returncode:
        last = [line.strip() for line in done.stderr.splitlines() if line.strip()][-1:] or [f"exit {done.returncode}"]
        raise LaunchError(f"{failed}: {last[0][:300]}")
