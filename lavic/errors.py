"""Errors that end a command for a reason its user can act on."""

from __future__ import annotations

from collections.abc import Sequence


def first_line(error: BaseException) -> str:
    """The first line of another library's exception, for our one-line messages; its class name where it is empty."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def first_names(names: Sequence[str], count: int = 1) -> str:
    """The first names of many, for a message: `a, b and 3 more`."""
    return ", ".join(names[:count]) + (f" and {len(names) - count:,} more" if len(names) > count else "")


class LavicError(Exception):
    """A failure that is printed as one line instead of a traceback.

    The message says what is wrong, where (file:line, key or flag) and what to do. `distributed.failure` prints it, and
    the command exits with `exit_code`.
    """

    exit_code: int = 1


class ConfigError(LavicError, ValueError):
    """An invalid setting or command line: an unknown key, a missing file, two settings that contradict each other."""

    exit_code = 2


class DataError(LavicError, RuntimeError):
    """Invalid input: a malformed line, an incomplete set, an adapter of another model."""

    exit_code = 2


class ChangedFileError(DataError):
    """A file was cut short, removed or changed while it was in use."""


class LaunchError(LavicError, RuntimeError):
    """This machine cannot run the command: too few GPUs, a package that is not installed."""

    exit_code = 2


class Stopped(LavicError):
    """Stopped by a signal after saving a checkpoint; not a failure. The same command resumes from there."""

    exit_code = 75

    def __init__(self, message: str = "stopped on request; checkpoint saved; run the same command again to resume"):
        super().__init__(message)
