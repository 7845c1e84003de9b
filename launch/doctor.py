"""`lavic doctor`: what this machine has, what is missing, how to mend it."""

from __future__ import annotations

import importlib.metadata
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from lavic.config import parse, settings
from lavic.errors import LaunchError

DESCRIPTION = """Looks at this machine: Python, packages, GPUs, memory, disk.

Exit code 0 when everything that a command needs is there, 1 when something is missing. A line that is not "ok" says
how to mend it."""

_GIB = 2**30


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
        print(f"{check.state:<8}{check.name:<14}{check.found}", flush=True)
        if check.mend:
            print(f"{'':<22}-> {check.mend}", flush=True)
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


def _slurm() -> Check:
    found = shutil.which("sbatch")
    return Check("slurm", "ok", found) if found else Check("slurm", "note", "no sbatch here: one machine only")


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
