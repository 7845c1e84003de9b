"""`lavic doctor`: checks this machine, and how to fix what is missing."""

from __future__ import annotations

import importlib.metadata
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from lavic.config import parse, settings
from lavic.errors import first_line

DESCRIPTION = """Checks this machine: Python, packages, GPUs, memory, disk, home and cache folders, SLURM.

Exit code 0 if everything that a command needs is installed, 1 if something is missing. A line that is not "ok" is
followed by how to fix it."""

_EXTRAS = ("", "crawl", "train", "mlflow", "evaluate", "retrieve", "serve", "serve-ray", "reddit", "heif")
"""Extras of setup.py. A package is listed once, under the first that needs it."""
_OPTIONAL = ("heif",)
"""Extras that no command needs."""
_GIB = 2**30
_NAME_WIDTH = 22
"""Width of the column of names; package names are shorter."""
_SOCKET_PATH = 107
"""Maximum length of a Unix socket's path, bytes."""
_RAY_SOCKET = "/ray/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store"
"""What Ray appends to the temporary folder."""
_INSTALL_TORCH = "pip install torch (https://pytorch.org/get-started)"
_SLURM_S = 10.0
_RAY_S = 180.0


@settings
class Settings:
    """Further checks."""

    ray: bool = False
    """Also start a local Ray and stop it again."""


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    name: str
    state: Literal["ok", "note", "missing"]
    value: str
    fix: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    chosen = parse(Settings, argv, command="doctor", description=DESCRIPTION)
    checks: list[Check] = []
    for check in examine(chosen):
        print(f"{check.state:<8}{check.name:<{_NAME_WIDTH}}{check.value}", flush=True)
        if check.fix:
            print(f"{'':<{8 + _NAME_WIDTH}}-> {check.fix}", flush=True)
        checks.append(check)
    missing = [check.name for check in checks if check.state == "missing"]
    print(f"missing: {', '.join(missing)}" if missing else "everything that a command needs is installed")
    return 1 if missing else 0


def examine(chosen: Settings) -> Iterator[Check]:
    """Yields each check as soon as it is done."""
    yield _python()
    yield from _packages()
    yield _gpus()
    yield from _capacity()
    yield from _folders()
    yield _slurm()
    if chosen.ray:
        yield _ray()


def _python() -> Check:
    return Check("python", "ok", f"{'.'.join(map(str, sys.version_info[:3]))} ({sys.executable})")


def _packages() -> Iterator[Check]:
    """Each package that a command needs, compared with the bounds in setup.py."""
    try:
        lines = importlib.metadata.requires("lavic") or []
    except importlib.metadata.PackageNotFoundError:
        yield Check("lavic", "missing", "not installed", "pip install -e '.[all]' in the repository")
        return
    requirements = [Requirement(line) for line in lines]
    checked = set()
    for extra, requirement in (
        (extra, requirement) for extra in _EXTRAS for requirement in requirements if _applies(requirement, extra)
    ):
        if requirement.name in checked:
            continue
        checked.add(requirement.name)
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            hint = f"pip install 'lavic[{extra or 'all'}]'"
            yield Check(requirement.name, "note" if extra in _OPTIONAL else "missing", "not installed", hint)
            continue
        if requirement.specifier.contains(version, prereleases=True):
            yield Check(requirement.name, "ok", version)
        else:
            hint = f"tested with {requirement.specifier}; pip install '{requirement.name}{requirement.specifier}'"
            yield Check(requirement.name, "note", version, hint)


def _applies(requirement: Requirement, extra: str) -> bool:
    if not extra:
        return requirement.marker is None
    return bool(
        requirement.marker and "extra" in str(requirement.marker) and requirement.marker.evaluate({"extra": extra})
    )


def _gpus() -> Check:
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name == "torch":
            return Check("gpu", "missing", "torch is not installed", _INSTALL_TORCH)
        return _broken_torch(error)
    except (ImportError, OSError) as error:  # a library of CUDA that is not found, or of another version
        return _broken_torch(error)
    if not torch.cuda.is_available():
        fix = ""
        if shutil.which("nvidia-smi"):
            fix = (
                f"nvidia-smi is installed, but torch {torch.__version__} has no CUDA: install its build for your driver"
            )
        return Check("gpu", "note", "none: training runs on CPU, fast enough for the miniature only", fix)
    try:
        cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    except RuntimeError as error:  # the driver answers, and a GPU does not
        fix = (
            "run nvidia-smi; a GPU that another process uses alone, or that failed, is left out by CUDA_VISIBLE_DEVICES"
        )
        return Check("gpu", "missing", f"torch {torch.__version__} cannot use it: {first_line(error)}", fix)
    return Check("gpu", "ok", "; ".join(f"{card.name} {card.total_memory / _GIB:.0f} GiB" for card in cards))


def _broken_torch(error: Exception) -> Check:
    return Check("gpu", "missing", f"torch cannot be imported: {first_line(error)}", _INSTALL_TORCH)


def _capacity() -> Iterator[Check]:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB
    cores = len(os.sched_getaffinity(0))
    yield _ok_or_note("memory", f"{total:.0f} GiB, {cores} cores", "" if total >= 6 else "the miniature needs 6 GiB")
    for name, folder, needed in (("disk", Path.cwd(), 5.0), ("shared memory", Path("/dev/shm"), 0.5)):
        if folder.exists():
            free = shutil.disk_usage(folder).free / _GIB
            fix = "" if free >= needed else f"free at least {needed:g} GiB in {folder}"
            yield _ok_or_note(name, f"{free:.1f} GiB free in {folder}", fix)
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    yield _ok_or_note("open files", str(files), "" if files >= 1024 else "ulimit -n 4096")


def _ok_or_note(name: str, value: str, fix: str) -> Check:
    return Check(name, "note" if fix else "ok", value, fix)


def _folders() -> Iterator[Check]:
    """Folders that libraries write to by default."""
    try:
        home = Path.home()
        fix = "" if os.access(home, os.W_OK | os.X_OK) else "not writable: export HOME=/a/writable/folder"
        yield _ok_or_note("home", str(home), fix)
    except RuntimeError:
        yield Check("home", "missing", "no HOME, and no entry for this user", "export HOME=/a/writable/folder")
        return
    cache = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "huggingface")
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(existing).free / _GIB
    fix = "" if free >= 20 else "a 7B model takes 15 GiB: export HF_HOME=/a/larger/disk"
    yield _ok_or_note("Hugging Face cache", f"{cache}, {free:.1f} GiB free", fix)
    temporary = Path(tempfile.gettempdir())
    length = len(os.fsencode(f"{temporary}{_RAY_SOCKET}"))
    fix = "" if length <= _SOCKET_PATH else "too long for Ray's sockets: export TMPDIR=/tmp"
    yield _ok_or_note("temporary folder", str(temporary), fix)


def _slurm() -> Check:
    """Whether SLURM is installed, and its controller answers."""
    if not shutil.which("sbatch"):
        return Check("slurm", "note", "not installed: this machine only")
    try:
        completed = subprocess.run(["sinfo", "-h", "-o", "%P"], capture_output=True, text=True, timeout=_SLURM_S)
        reason = next(iter(completed.stderr.strip().splitlines()), f"exit {completed.returncode}")
    except subprocess.TimeoutExpired:
        completed, reason = None, f"no answer within {_SLURM_S:.0f} s"
    except OSError as error:
        completed, reason = None, f"sinfo: {error.strerror}"
    if completed is None or completed.returncode:
        return Check(
            "slurm",
            "note",
            f"installed, but sinfo fails: {reason}",
            "is slurmctld running? Without it use this machine only",
        )
    partitions = ", ".join(dict.fromkeys(completed.stdout.split())) or "no partition"
    return Check("slurm", "ok", f"partitions: {partitions}")


def _ray() -> Check:
    """Whether a local Ray starts, in a process of its own."""
    code = "import ray; ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False); ray.shutdown()"
    env = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    start = time.monotonic()
    try:
        completed = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=_RAY_S
        )
    except subprocess.TimeoutExpired:
        return Check("ray start", "missing", "failed", f"Ray did not start within {_RAY_S:.0f} s")
    if completed.returncode:
        last = [line.strip() for line in completed.stderr.splitlines() if line.strip()][-1:] or [
            f"exit {completed.returncode}"
        ]
        return Check("ray start", "missing", "failed", f"Ray did not start: {last[0][:300]}")
    return Check("ray start", "ok", f"started and stopped in {time.monotonic() - start:.0f} s")
