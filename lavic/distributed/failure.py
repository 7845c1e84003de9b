"""How a command fails: what it prints, its exit code, and how a rank ends.

An error is printed once, by the first that handles it: a rank must report it before anything that may wait for the
other ranks.
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
from lavic.distributed.launcher_env import launched_rank, launched_world_size
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
"""Import name -> the extra of setup.py that installs it."""

_DEFER_S = 2.0
_HINTS = {
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
"""What a user can do about an error of the operating system that comes from a path."""

_LESS_MEMORY = {
    "distill": "lower --loop.micro-batch or --loop.micro-tokens, or use --loop.activation-checkpointing",
    "tune": "lower --loop.micro-batch or --loop.micro-tokens, or use --loop.activation-checkpointing",
    "describe": "lower --batch-size",
    "embed": "lower --batch-size",
    "evaluate": "lower --tokens-per-batch",
    "tune-retriever": "lower --tokens-per-batch or --max-length",
}
"""Command -> how to make it use less memory."""
_NO_MEMORY = re.compile(
    r"CUDA out of memory|HIP out of memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|"
    r"Cuda failure 2? ?'out of memory'|can't allocate memory|not enough memory: you tried to allocate"
)
_FULL_DISK = re.compile(r"no space left|quota exceeded|storage ?full|disk is full|os error (28|122)\b", re.I)
_AMOUNTS = (
    re.compile(r"[Tt]ried to allocate \d[\d.]* ?\w+"),
    re.compile(r"GPU \d+ has a total capacity of [\d.]+ \w+ of which [\d.]+ \w+ is free"),
)
_DEAD_WORKER = re.compile(r"DataLoader worker \(pid\(?s?\)? ([\d, ]+)\) (.*)")

_printed: BaseException | None = None
"""The error that was printed last."""


def show_error(command: str, error: Exception) -> int:
    """Prints an error, unless it was printed before; returns the exit code.

    An error that a user can fix is one line, any other a traceback. The line of an error that is expected on all ranks
    is deferred on those other than 0: when rank 0 fails too, the launcher ends them during the wait, and it is printed
    once.
    """
    global _printed
    line, code, on_all_ranks = _describe(command, error)
    if error is _printed:
        return code
    _printed = error
    if line is None:
        show_traceback(type(error), error, error.__traceback__)
        return code
    logging.getLogger("lavic").debug("traceback", exc_info=error)
    rank = launched_rank()
    if rank and on_all_ranks:
        time.sleep(_DEFER_S)
    suffix = f" [rank {rank}]" if rank else ""
    print(f"lavic {command}: error: {redact(line)}{suffix}", file=sys.stderr, flush=True)
    return code


@contextlib.contextmanager
def show_error_first(command: str) -> Iterator[None]:
    """Prints an error of the block before what is around it closes, which may take long."""
    try:
        yield
    except Stopped:
        raise
    except Exception as error:
        show_error(command, error)
        raise


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a GPU, or the machine, is out of memory."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error)))


def disk_is_full(error: BaseException) -> bool:
    """Whether an error, of the operating system or of a library that writes files, says that a disk is full."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return bool(_FULL_DISK.search(str(error)))


def lost_connection(error: BaseException) -> bool:
    """Whether a collective failed since it lost the other ranks."""
    from torch.distributed import DistError

    if out_of_memory(error) or "Duplicate GPU detected" in str(error):
        return False
    if isinstance(error, DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "Connection closed", "NCCL"))


def show_traceback(error_type: type[BaseException], error: BaseException, tb: TracebackType | None) -> None:
    """Prints a traceback without secrets, with the rank where there are several; also as `sys.excepthook`."""
    header = f"lavic: rank {launched_rank()} failed:\n" if launched_world_size() > 1 else ""
    print(
        header + redact("".join(traceback.format_exception(error_type, error, tb))), end="", file=sys.stderr, flush=True
    )


def exit_process(code: int) -> NoReturn:
    """Ends this process at once, with its output flushed and without the interpreter's shutdown.

    The shutdown takes a second. In that time gloo's threads, which `destroy_process_group` cannot end while a library
    holds a group, may lose a faster rank and abort the process: the launcher would see signal 6 in the place of 0, 2 or
    75. NCCL's groups, which a failed rank does not destroy, would wait for the other ranks.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _describe(command: str, error: Exception) -> tuple[str | None, int, bool]:
    """An error's line, or None for a traceback; its exit code; whether all ranks are expected to have it."""
    if isinstance(error, LavicError):
        return str(error), error.exit_code, True
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        if package in EXTRAS:
            install_command = f"pip install 'lavic[{EXTRAS[package]}]'"
            return f"needs the package '{package}'; install it with: {install_command}", 2, True
    if isinstance(error, OSError):
        return _describe_os_error(error)
    if out_of_memory(error):
        return _describe_out_of_memory(command, error), 1, False
    if isinstance(error, RuntimeError):
        if match := _DEAD_WORKER.search(str(error)):
            return _describe_dead_worker(match[1], match[2]), 1, False
        if "Could not determine home directory" in str(error):  # by pathlib
            return "this user has no home folder: set HOME, or give no path that begins with ~", 2, True
        if "Duplicate GPU detected" in str(error):
            return "two ranks have the same GPU: start at most as many ranks per node as it has GPUs", 2, True
    return None, 1, False


def _describe_os_error(error: OSError) -> tuple[str, int, bool]:
    reason = error.strerror or first_line(error)
    if disk_is_full(error):
        problem = f"{_path(error.filename)} could not be written" if error.filename else "could not write"
        return f"{problem} ({reason}): make room, then run the same command again", 1, False
    paths = " -> ".join(_path(name) for name in (error.filename, error.filename2) if name)
    hint = _HINTS.get(error.errno or 0)
    line = f"{paths or 'the operating system'}: {reason}{f': {hint}' if hint else ''}"
    return line, 2 if hint else 1, hint is not None


def _describe_out_of_memory(command: str, error: Exception) -> str:
    text = str(error)
    device = "the machine" if isinstance(error, MemoryError) or "allocate memory" in text else "the GPU"
    amounts = "; ".join(match[0] for pattern in _AMOUNTS if (match := pattern.search(text))) or first_line(error)
    hint = _LESS_MEMORY.get(command, "use more memory or smaller batches")
    return f"{device} is out of memory ({amounts[:1].lower()}{amounts[1:]}): {hint}"


def _describe_dead_worker(pid: str, message: str) -> str:
    hint = "is /dev/shm too small?" if "Bus error" in message else "is the machine out of memory?"
    reason = message.partition(". ")[0].strip().rstrip(".")
    return f"a data loader worker (pid {pid}) {reason}: {hint} Lower num_workers to use less memory"


def _path(name: object) -> str:
    """A path as text that can be printed, whatever bytes it has."""
    return os.fsdecode(name) if isinstance(name, (str, bytes, os.PathLike)) else str(name)
