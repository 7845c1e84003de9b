"""The `lavic` command: a table of commands and their modules. `distributed.failure` prints errors."""

from __future__ import annotations

import difflib
import faulthandler
import importlib
import io
import logging
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from lavic import __version__
from lavic.config.secrets import redact
from lavic.distributed.failure import exit_process, show_error, show_traceback
from lavic.distributed.launcher_env import launched_rank, launched_world_size
from lavic.errors import Stopped

COMMANDS: dict[str, tuple[str, str]] = {
    "crawl": ("lavic.shards.crawl", "fetch a catalogue's photos into WebDataset shards"),
    "verify": ("lavic.shards.verify", "re-read a set of shards, count and hash it"),
    "describe": (
        "lavic.shards.describe",
        "describe each photo from all its tokens, with the model (stage 1's teacher)",
    ),
    "reddit": (
        "lavic.shards.reddit",
        "conversations from Reddit dumps and an Amazon catalogue; 'reddit rebuild' from ids",
    ),
    "distill": ("lavic.launch.distill", "stage 1: train the vision side to describe a photo from five tokens"),
    "embed": ("lavic.shards.embed", "compute the item tokens of a catalogue"),
    "tune-retriever": (
        "lavic.launch.tune_retriever",
        "train the two-tower head that searches the catalogue by photos and titles",
    ),
    "retrieve": ("lavic.shards.retrieve", "candidate lists from a whole catalogue, for every conversation"),
    "tune": ("lavic.launch.tune", "stage 2: train the language model to pick the right candidate"),
    "evaluate": ("lavic.launch.evaluate", "metrics, controls, confidence intervals, and a report"),
    "recommend": ("lavic.launch.recommend", "rank candidates for a conversation: a file, '-', or typed"),
    "serve": ("lavic.launch.serve", "the recommender over HTTP: a page, an API, an OpenAI-compatible chat"),
    "register": ("lavic.launch.register", "a bundle as a model in MLflow's registry"),
    "submit": (
        "lavic.launch.submit.command",
        "the pipeline as SLURM jobs with dependencies; also 'submit status', 'submit logs', 'submit cancel'",
    ),
    "sync": ("lavic.launch.sync", "send runs' journals to an MLflow server, without duplicates"),
    "mini": ("lavic.launch.mini", "parts of the demo: catalog, serve, pretrain, dump; realshape, a model for tests"),
    "demo": ("lavic.launch.demo.command", "the whole pipeline in miniature, from crawl to report"),
    "doctor": ("lavic.launch.doctor", "what this machine has, what is missing and how to install it"),
    "preflight": ("lavic.launch.preflight.command", "check the nodes of a job before it starts"),
}
"""Name -> (module with `main(argv) -> int`, summary). A module is imported only when its command runs."""

_USAGE = "usage: lavic COMMAND [--config FILE|NAME] [--key value ...]"


def _escape_unprintable() -> None:
    """Escapes characters that the terminal's encoding does not have, and bytes of paths that are not UTF-8."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 done, 1 failed, 2 bad input, 75 stopped with a checkpoint.

    Args:
        argv: The arguments after `lavic`; None takes them from `sys.argv`.
    """
    _escape_unprintable()
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(_manual())
        return 0 if args else 2
    if args[0] in ("-V", "--version"):
        print(f"lavic {__version__}")
        return 0
    command, command_args = args[0], args[1:]
    if command not in COMMANDS:
        matches = difflib.get_close_matches(command, COMMANDS, 1)
        hint = f"did you mean '{matches[0]}'?" if matches else "'lavic --help' lists the commands"
        print(f"lavic: error: unknown command '{command}'; {hint}", file=sys.stderr)
        return 2
    return _run(command, command_args)


def entry() -> NoReturn:
    """The `lavic` program: ends the process with the exit code of `main`."""
    sys.excepthook = show_traceback
    if launched_world_size() > 1:
        faulthandler.enable()  # prints the Python stack when NCCL's watchdog aborts a rank
    code = _flush(main())
    if launched_world_size() == 1:
        raise SystemExit(code)
    exit_process(code)


def _flush(code: int) -> int:
    """Flushes stdout; returns the exit code, which is not 0 where that fails."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _drop_output()
        return code or 1
    except OSError as error:
        _drop_output()
        return code or show_error(next(iter(sys.argv[1:]), ""), error)
    return code


def _drop_output() -> None:
    """Keeps the interpreter from printing another error when it closes stdout."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def start_ranks(command: str, argv: Sequence[str] | None, nproc: int) -> int:
    """Starts `nproc` processes of a command on this machine, for callers that may not import `launch/`."""
    return int(importlib.import_module("lavic.launch.ranks.local").run(command, list(argv or ()), nproc))


def command_module(command: str) -> ModuleType:
    """The module of a command, for a caller that may not import it by name.

    Those of the pipeline's stages have, besides `main`:

        SETTINGS                the class of their settings
        resolve(argv)           the settings of a command line; raises ConfigError as the command would
        estimate(settings)      what a run takes, as lines of text
        is_complete(settings)   whether its result is there
    """
    return importlib.import_module(COMMANDS[command][0])


def _run(command: str, argv: list[str]) -> int:
    _set_up_logging()
    try:
        return int(command_module(command).main(argv) or 0)
    except Stopped as stop:
        if launched_rank() == 0:  # not an error, and the same on all ranks
            print(f"lavic {command}: {stop}", file=sys.stderr, flush=True)
        return stop.exit_code
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except KeyboardInterrupt:
        if launched_rank() == 0:
            print(f"\nlavic {command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _drop_output()  # the reader (`| head`) has closed it
        return 1
    except Exception as error:
        return show_error(command, error)


class _Stderr(logging.Handler):
    """Writes to the current `sys.stderr`, which a caller of `main` may have replaced."""

    def emit(self, record: logging.LogRecord) -> None:
        print(redact(self.format(record)), file=sys.stderr, flush=True)


def _set_up_logging() -> None:
    """Logs our own messages as plain lines on stderr, from rank 0; from others warnings. LAVIC_LOG is the level."""
    handler = _Stderr()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logging.lastResort = _Stderr(logging.WARNING)  # of libraries
    log = logging.getLogger("lavic")
    log.handlers = [handler]
    log.propagate = False
    log.setLevel(os.environ.get("LAVIC_LOG", "info" if launched_rank() == 0 else "warning").upper())


def _manual() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {doc}" for name, (_, doc) in COMMANDS.items()]
    return "\n".join(
        [
            _USAGE,
            "",
            "Recommend products in a conversation by looking at their photos. Every command reads and writes files:",
            "",
            *lines,
            "",
            "'lavic COMMAND --help' explains a command; '--print-config' prints its settings. Start with 'lavic demo'.",
            "Exit codes: 0 done, 1 failed, 2 bad usage, setting or input, 75 stopped with a checkpoint (run again).",
        ]
    )
