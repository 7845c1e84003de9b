"""The `lavic` command: a table of names and the module behind each. `distributed.failure` prints errors."""

from __future__ import annotations

import difflib
import faulthandler
import importlib
import io
import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from lavic import __version__
from lavic.config.secrets import redact
from lavic.distributed.failure import launched, leave, rank, show, show_traceback
from lavic.errors import Stopped

COMMANDS: dict[str, tuple[str, str]] = {
    "crawl": ("lavic.shards.crawl", "fetch a catalogue's photos into WebDataset shards"),
    "verify": ("lavic.shards.verify", "re-read a set of shards, count and hash it"),
    "describe": ("lavic.shards.describe", "let the model describe each photo from all its tokens (stage 1's teacher)"),
    "distill": ("lavic.launch.distill", "stage 1: train the vision side until five tokens say what all of them say"),
    "embed": ("lavic.shards.embed", "make the item tokens of a whole catalogue"),
    "tune": ("lavic.launch.tune", "stage 2: train the language model to pick the right candidate"),
    "evaluate": ("lavic.launch.evaluate", "every metric, controls, intervals, a report to look at"),
    "recommend": ("lavic.launch.recommend", "rank candidates for a conversation: a file, '-', or typed"),
    "submit": (
        "lavic.launch.submit.command",
        "the pipeline as SLURM jobs that wait for each other; 'submit status', 'logs' and 'cancel' follow them",
    ),
    "sync": ("lavic.launch.sync", "send runs' journals to an MLflow server, without duplicates"),
    "mini": ("lavic.launch.mini", "the embedded default's parts: catalog, serve, pretrain; realshape"),
    "demo": ("lavic.launch.demo", "the whole pipeline in miniature, from crawl to report"),
    "doctor": ("lavic.launch.doctor", "what this machine has, what is missing and how to mend it"),
    "preflight": ("lavic.launch.preflight.command", "whether the nodes of a job will do, before it starts"),
}
"""Name -> (module with `main(argv) -> int`, what it does). A module is imported when its command runs, never before."""

_USAGE = "usage: lavic COMMAND [--config FILE|NAME] [--key value ...]"


def _tolerate_any_text() -> None:
    """Lets text be printed whatever the terminal's encoding is, and paths whatever bytes they have."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 done, 1 failed, 2 bad input, 75 stopped with a checkpoint.

    Args:
        argv: the words after `lavic`; None takes them from the command line.
    """
    _tolerate_any_text()
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_manual())
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        print(f"lavic {__version__}")
        return 0
    command, rest = words[0], words[1:]
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, 1)
        hint = f"did you mean '{near[0]}'?" if near else "'lavic --help' lists the commands"
        print(f"lavic: error: unknown command '{command}'; {hint}", file=sys.stderr)
        return 2
    return _run(command, rest)


def entry() -> NoReturn:
    """`lavic` as a program: ends the process with the exit code of `main`."""
    sys.excepthook = show_traceback
    if launched() > 1:
        faulthandler.enable()  # when NCCL's watchdog aborts a rank, it says where Python was
    code = _flush(main())
    if launched() == 1:
        raise SystemExit(code)
    leave(code)


def _flush(code: int) -> int:
    """Writes out what was printed; returns the exit code, which is not 0 where that cannot be."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _drop_output()
        return code or 1
    except OSError as error:
        _drop_output()
        return code or show(next(iter(sys.argv[1:]), ""), error)
    return code


def _drop_output() -> None:
    """Without this the interpreter complains once more when it closes stdout."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def start_ranks(command: str, argv: Sequence[str] | None, nproc: int) -> int:
    """Starts `nproc` processes of a command on this machine: the way to `launch/` for jobs that may not import it."""
    return int(importlib.import_module("lavic.launch.ranks.local").run(command, list(argv or ()), nproc))


def settings_class(command: str) -> type:
    """The settings of a command, for a caller that may not import its module."""
    made: type = importlib.import_module(COMMANDS[command][0]).SETTINGS
    return made


def _run(command: str, argv: list[str]) -> int:
    _set_up_logging()
    try:
        return int(importlib.import_module(COMMANDS[command][0]).main(argv) or 0)
    except Stopped as stop:
        if rank() == 0:  # no error, and all ranks are asked alike
            print(f"lavic {command}: {stop}", file=sys.stderr, flush=True)
        return stop.exit_code
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except KeyboardInterrupt:
        if rank() == 0:
            print(f"\nlavic {command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _drop_output()  # the reader (`| head`) has left
        return 1
    except Exception as error:
        return show(command, error)


class _Stderr(logging.Handler):
    """Writes to what stderr is when something is said: whoever calls `main` may have exchanged it since."""

    def emit(self, record: logging.LogRecord) -> None:
        print(redact(self.format(record)), file=sys.stderr, flush=True)


def _set_up_logging() -> None:
    """Our own messages as plain lines on stderr, from rank 0; warnings of others. LAVIC_LOG=debug says more."""
    handler = _Stderr()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logging.lastResort = _Stderr(logging.WARNING)  # what libraries say
    log = logging.getLogger("lavic")
    log.handlers = [handler]
    log.propagate = False
    log.setLevel(os.environ.get("LAVIC_LOG", "info" if rank() == 0 else "warning").upper())


def _manual() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {doc}" for name, (_, doc) in COMMANDS.items()]
    return "\n".join(
        [
            _USAGE,
            "",
            "Recommend products in a conversation by looking at their photos. Every command works on files:",
            "",
            *lines,
            "",
            "'lavic COMMAND --help' is its manual; '--print-config' prints its settings. Begin with 'lavic demo'.",
            "Exit codes: 0 done, 1 failed, 2 bad usage, setting or input, 75 stopped with a checkpoint (run again).",
        ]
    )
