"""How a command fails: what an error looks like on the console, its exit code, and how a rank leaves.

An error is shown once, by the first who handles it: a rank of several must say what happened before anything that may
wait for the other ranks.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator
from types import TracebackType
from typing import NoReturn

from lavic.config.secrets import redact
from lavic.distributed.context import step_tasks
from lavic.errors import LavicError, Stopped, first_line

EXTRAS = {
    "aiohttp": "crawl",
    "datasets": "dev",
    "deepspeed": "train",
    "mlflow": "mlflow",
    "peft": "model",
    "pyarrow": "crawl",
    "ray": "crawl",
    "s3fs": "crawl",
    "safetensors": "model",
    "torch": "model",
    "transformers": "model",
    "webdataset": "crawl",
}
"""Import name -> the extra of setup.py that brings it."""

_PATIENCE_S = 2.0
_MEND = {
    errno.ENOENT: "there is no such file or folder; a link may point nowhere",
    errno.ENOTDIR: "a file is where a folder is needed; use another path",
    errno.EISDIR: "a folder is where a file is needed; use another path",
    errno.EEXIST: "a file is where a folder is needed; use another path",
    errno.EACCES: "change its permissions, or use another path",
    errno.EPERM: "change its permissions, or use another path",
    errno.EROFS: "use a path that can be written to",
    errno.ENAMETOOLONG: "use a shorter path",
    errno.ELOOP: "links point at each other; use another path",
}
"""What a user can do about errors of the operating system that come from a path."""

_LESS_MEMORY = {
    "distill": "lower --loop.micro-batch or --loop.micro-tokens, or use --loop.activations recompute",
    "tune": "lower --loop.micro-batch or --loop.micro-tokens, or use --loop.activations recompute",
    "describe": "lower --batch",
    "embed": "lower --batch",
    "evaluate": "lower --tokens-per-batch",
}
"""Command -> what makes it take less memory."""
_NO_MEMORY = re.compile(
    r"CUDA out of memory|HIP out of memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|"
    r"Cuda failure 2? ?'out of memory'|can't allocate memory|not enough memory: you tried to allocate"
)
_DEAD_WORKER = re.compile(r"DataLoader worker \(pid\(?s?\)? ([\d, ]+)\) (.*)")

_shown: BaseException | None = None
"""The error that was shown last."""


def show(command: str, error: Exception) -> int:
    """Prints an error, unless it was printed before; returns the exit code.

    What a user can mend is one line, anything else a traceback.
    """
    global _shown
    line, code, shared = _described(command, error)
    if error is _shown:
        return code
    _shown = error
    if line is None:
        show_traceback(type(error), error, error.__traceback__)
        return code
    logging.getLogger("lavic").debug("traceback", exc_info=error)
    complain(command, line, wait=shared)
    return code


@contextlib.contextmanager
def shown_at_once(command: str) -> Iterator[None]:
    """Shows an error of the block before whatever closes around it, which may take long."""
    try:
        yield
    except Stopped:
        raise
    except Exception as error:
        show(command, error)
        raise


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a GPU, or the machine, has no memory left."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error)))


def complain(command: str, message: str, *, wait: bool = True) -> None:
    """Prints one error line.

    Args:
        command: The command's name.
        message: What is wrong.
        wait: A rank other than 0 first lets rank 0 say it: the error is of a kind that strikes all ranks alike.
    """
    number = rank()
    if number and wait:
        # When rank 0 fails too, the launcher ends this process during the wait and the line is said once.
        time.sleep(_PATIENCE_S)
    line = f"lavic {command}: error: {redact(message)}{f' [rank {number}]' if number else ''}"
    print(line, file=sys.stderr, flush=True)


def show_traceback(kind: type[BaseException], error: BaseException, at: TracebackType | None) -> None:
    """Prints a traceback without secrets, headed by the rank where there are several; also as `sys.excepthook`."""
    head = f"lavic: rank {rank()} failed:\n" if launched() > 1 else ""
    print(head + redact("".join(traceback.format_exception(kind, error, at))), end="", file=sys.stderr, flush=True)


def leave(code: int) -> NoReturn:
    """Ends a rank at once, its output flushed; whatever launched it.

    An interpreter that is taken down with care spends a second on it. Meanwhile gloo's threads, which `World.close`
    cannot end while a library keeps hold of a group, may lose a faster rank and abort the process: the launcher would
    read signal 6 where the rank said 0, 2 or 75. NCCL's groups, which a rank that failed does not destroy, would wait
    for the other ranks.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def launched() -> int:
    """How many processes torchrun, srun or our own launcher started, as they say it; 1 without a launcher."""
    text = os.environ.get("WORLD_SIZE") or step_tasks(os.environ)
    return int(text) if text.isdigit() else 1


def rank() -> int:
    """This process among those, as the launcher says it; 0 without one."""
    text = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    return int(text) if text.isdigit() else 0


def _described(command: str, error: Exception) -> tuple[str | None, int, bool]:
    """An error's line, or None where a traceback is wanted; its exit code; whether it strikes all ranks alike."""
    if isinstance(error, LavicError):
        return str(error), error.exit_code, True
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        if package in EXTRAS:
            how = f"pip install 'lavic[{EXTRAS[package]}]'"
            return f"needs the package '{package}'; install it with: {how}", 2, True
    if isinstance(error, OSError):
        return _operating_system(error)
    if out_of_memory(error):
        return _memory(command, error), 1, False
    if isinstance(error, RuntimeError):
        if match := _DEAD_WORKER.search(str(error)):
            return _worker(match[1], match[2]), 1, False
        if "Could not determine home directory" in str(error):  # by pathlib
            return "this user has no home folder: set HOME, or name no path that begins with ~", 2, True
        if "Duplicate GPU detected" in str(error):
            return "two ranks were given the same GPU: start at most as many per node as it has GPUs", 2, True
    return None, 1, False


def _operating_system(error: OSError) -> tuple[str, int, bool]:
    """What the operating system refused."""
    reason = error.strerror or first_line(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        what = f"{_path(error.filename)} could not be written" if error.filename else "could not write"
        return f"{what} ({reason}): make room, then run the same command again", 1, False
    places = " -> ".join(_path(name) for name in (error.filename, error.filename2) if name)
    hint = _MEND.get(error.errno or 0)
    line = f"{places or 'the operating system'}: {reason}{f': {hint}' if hint else ''}"
    return line, 2 if hint else 1, hint is not None


def _memory(command: str, error: Exception) -> str:
    text = str(error)
    parts = [
        match[0]
        for pattern in (
            r"[Tt]ried to allocate \d[\d.]* ?\w+",
            r"GPU \d+ has a total capacity of [\d.]+ \w+ of which [\d.]+ \w+ is free",
        )
        if (match := re.search(pattern, text))
    ]
    where = "the machine" if isinstance(error, MemoryError) or "allocate memory" in text else "the GPU"
    what = "; ".join(parts) or first_line(error)
    mend = _LESS_MEMORY.get(command, "give it more, or less to do at once")
    return f"{where} has no memory left ({what[:1].lower()}{what[1:]}): {mend}"


def _worker(pid: str, what: str) -> str:
    """Of torch's loader: a process that prepares samples is gone, killed or crashed."""
    hint = "is /dev/shm too small?" if "Bus error" in what else "is the machine's memory full?"
    said = what.partition(". ")[0].strip().rstrip(".")
    return f"a process that prepares samples (pid {pid}) {said}: {hint} Fewer workers take less memory"


def _path(name: object) -> str:
    """A path as text that can be printed, whatever bytes it has."""
    return os.fsdecode(name) if isinstance(name, (str, bytes, os.PathLike)) else str(name)
