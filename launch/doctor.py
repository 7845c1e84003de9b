"""`lavic doctor`: what this machine has, what is missing, how to mend it. Also the checks that commands do first."""

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

DESCRIPTION = """Looks at this machine: Python, packages, compiler, GPUs, memory, disk.

Exit code 0 when everything that a command needs is there, 1 when something is missing. A line that is not "ok" says
how to mend it."""

_GIB = 2**30
_STALE_LOCK_S = 900.0


@settings
class Settings:
    """What is tried besides looking."""

    warm: bool = False
    """Compile the op that DeepSpeed needs on CPU, so that the first training does not wait for it (about 40 s)."""
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
    yield _compiler()
    yield _gpus()
    yield from _room()
    yield _slurm()
    if chosen.warm:
        yield _tried("deepspeed op", "compiled", warm)
    if chosen.ray:
        yield _tried("ray start", "started and stopped", _start_ray)


def require_compiler() -> None:
    """Says in one line, before anything long begins, that DeepSpeed could not start.

    DeepSpeed compiles a small op when it first starts on a CPU, and asks for compiler and ninja at every start. On GPUs
    it compiles nothing for what we use. Adds the folder of this Python to PATH where ninja stands there.

    Raises:
        LaunchError: no C++ compiler or no ninja, and the op is needed.
    """
    if _on_gpu():
        return
    compiler = os.environ.get("CXX") or "c++"
    if shutil.which(compiler.split()[0]) is None:
        raise LaunchError(
            f"no C++ compiler ('{compiler}'), which DeepSpeed needs on CPU; install one (apt-get install g++, "
            "dnf install gcc-c++, conda install cxx-compiler) or set CXX to yours"
        )
    if shutil.which("ninja") is None:
        beside = Path(sys.executable).parent
        if not (beside / "ninja").exists():
            raise LaunchError("no ninja, which DeepSpeed needs on CPU; install it with: pip install ninja")
        os.environ["PATH"] = f"{beside}{os.pathsep}{os.environ.get('PATH', '')}"


def warm() -> None:
    """Compiles DeepSpeed's CPU op once in a process of its own, so that ranks that start together find it done.

    Raises:
        LaunchError: no compiler, or it failed; says where its log is.
    """
    require_compiler()
    if _on_gpu():
        return
    _drop_stale_lock()
    code = "from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder as B; B().load(verbose=False)"
    env = {**os.environ, "DS_ACCELERATOR": "cpu"}
    _run_python(code, env, _STALE_LOCK_S, f"DeepSpeed's op was not compiled (a fresh start: remove {_extensions()})")


def _on_gpu() -> bool:
    if os.environ.get("LAVIC_DEVICE") == "cpu":
        return False
    import torch

    return torch.cuda.is_available()


def _extensions() -> Path:
    """Where torch puts compiled ops."""
    from torch.utils import cpp_extension

    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())


def _drop_stale_lock() -> None:
    """Removes the lock of a compilation that was killed; torch would wait for it for ever."""
    for lock in _extensions().glob("**/deepspeed_shm_comm/lock"):
        if time.time() - lock.stat().st_mtime > _STALE_LOCK_S:
            lock.unlink(missing_ok=True)


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


def _compiler() -> Check:
    try:
        require_compiler()
    except ModuleNotFoundError:
        return Check("compiler", "note", "not asked: torch is not installed")
    except LaunchError as error:
        return Check("compiler", "missing", "none found", str(error))
    if _on_gpu():
        return Check("compiler", "ok", "not needed with a GPU")
    return Check(
        "compiler", "ok", f"{shutil.which((os.environ.get('CXX') or 'c++').split()[0])}, {shutil.which('ninja')}"
    )


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
