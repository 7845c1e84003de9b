"""The server side of `fork_server`: it imports what `lavic` imports, forks, and runs programs as an interpreter would.

python forked_program.py    answers requests on stdin, one JSON object a line, with a number a line
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import traceback
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

PRELOADED = (
    *(f"lavic.launch.{name}" for name in ("distill", "tune", "tune_retriever", "evaluate", "recommend")),
    *("lavic.model.bundle", "lavic.recommend.ranking.ranker", "lavic.shards.describe", "lavic.shards.embed", "peft"),
    *("lavic.launch.training.distill_stage", "lavic.launch.training.tune_stage"),
    *(f"lavic.train.{name}" for name in ("bundle_check", "checkpoint", "trainer")),
    *(f"transformers.models.{name}.modeling_{name}" for name in ("clip", "llava_next", "mistral")),
)
"""Modules that the forked processes need not import."""


def preload() -> None:
    """Imports `PRELOADED` and DeepSpeed and fills caches, for the processes that are forked from this one."""
    import torch

    for name in PRELOADED:
        importlib.import_module(name)
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    from lavic.train.deepspeed.engine import _deepspeed

    _deepspeed(torch.device("cpu"))
    get_checkpoint_conversion_mapping("mistral")  # compiles a thousand patterns, which loading a model needs
    gc.freeze()  # the forked processes look for garbage in their own objects only


def _serve() -> None:
    """Answers each line of stdin with a line: a process, its exit code or 0."""
    # Imports, and loggers that they set up, keep sys.stdout: nothing that they print there must be read as a reply.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    preload()
    running = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            reply = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
            running.discard(request["wait"])
        elif "argv" in request:
            sys.stdout.flush()
            reply = os.fork()
            if reply == 0:
                replies.close()
                _become(request)
            running.add(reply)
        else:
            for name in request.get("preload", ()):
                importlib.import_module(name)
            reply = 0
        print(reply, file=replies, flush=True)
    for pid in running:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _become(request: dict) -> None:
    """Runs a program in the forked process; never returns."""
    code = 70
    try:
        os.setsid()
        flags = os.O_CREAT | os.O_WRONLY | os.O_APPEND
        files = [os.open(os.devnull, os.O_RDONLY), os.open(request["stdout"], flags), os.open(request["stderr"], flags)]
        for target, file in enumerate(files):
            os.dup2(file, target)
            os.close(file)
        os.chdir(request["cwd"])
        _run_program(request["argv"], request["env"])
    finally:
        os._exit(code)


class ForkingPopen(subprocess.Popen):
    """A `subprocess.Popen` for programs that themselves start `python -m lavic ...`: it forks them."""

    def __init__(self, args: Sequence[str], *, env: Mapping[str, str] | None = None, **options: Any) -> None:
        def become() -> None:
            os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # the pipe too that would report a failure to start
            _run_program(list(args[1:]), dict(os.environ if env is None else env))

        if args[0] == sys.executable and "-m" in args[1:2]:
            sys.stdout.flush()
            options["preexec_fn"] = become  # never returns, so that nothing is executed
        super().__init__(args, env=env, **options)


def _run_program(argv: list[str], env: Mapping[str, str]) -> NoReturn:
    """Ends this process as an interpreter with these arguments would."""
    code = 1
    try:
        os.environ.clear()
        os.environ.update(env)
        code = _exit_code(argv)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(code)


def _exit_code(argv: list[str]) -> int:
    """Runs what the interpreter would run with these arguments; returns the exit code."""
    try:
        if argv[:2] == ["-m", "lavic"]:
            from lavic.cli import entry

            sys.argv = ["lavic", *argv[2:]]
            entry()
        elif argv[0] == "-m":
            sys.argv = argv[1:]
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            if argv[0] == "-c":
                source, name = argv[1].encode(), "<string>"
                sys.argv = ["-c", *argv[2:]]
            else:
                main.__file__ = argv[0]
                source, name = Path(argv[0]).read_bytes(), argv[0]
                sys.argv = argv
                sys.path.insert(0, str(Path(argv[0]).resolve().parent))
            exec(compile(source, name, "exec", dont_inherit=True), main.__dict__)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    _serve()
