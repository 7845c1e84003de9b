"""Everything that can end a command for a reason its user can act on."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """What an exception of somebody else's says, for one line of ours: its first, or its name where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


class LavicError(Exception):
    """A failure with one line to show instead of a traceback.

    The message says what is wrong, where (file:line, key or flag) and how to mend it. `distributed.failure` prints it,
    and the command leaves with `exit_code`.
    """

    exit_code: int = 1


class ConfigError(LavicError, ValueError):
    """A setting or a command line that cannot be right: an unknown key, a missing file, two settings at odds."""

    exit_code = 2


class DataError(LavicError, RuntimeError):
    """Input that is not what it should be: a broken line, a set that is not whole, an adapter of another model."""

    exit_code = 2


class LaunchError(LavicError, RuntimeError):
    """This machine cannot start what was asked: too few GPUs, a package that is not installed."""

    exit_code = 2


class Stopped(LavicError):
    """Stopped on request (a signal) after saving: not a failure, the same command goes on from there."""

    exit_code = 75

    def __init__(self, message: str = "stopped on request; checkpoint saved; run the same command again to go on"):
        super().__init__(message)
