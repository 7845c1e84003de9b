"""`lavic demo`: the whole pipeline in miniature, from a crawl to a report, through the commands a user would type.

A synthetic catalogue is generated and served on this machine; the rest is `lavic crawl`, `lavic describe` and so on,
each printed before it runs. The same command continues a demo that was stopped.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from lavic.cli import command_module
from lavic.config import dump, flatten, load, parse
from lavic.errors import ConfigError, LavicError
from lavic.launch.demo.stages import DemoSettings, Stage, stages
from lavic.launch.demo.summary import summarise, table
from lavic.mini.photo_server import PhotoServer
from lavic.storage.atomic import atomic_write
from lavic.tracking.mlflow_store import default_store_uri
from lavic.tracking.tracker import Tracker

DESCRIPTION = """Run the whole pipeline in miniature on this machine: about seven minutes on two CPU cores.

It generates a catalogue of products whose titles do not tell which one a conversation asks for, crawls their photos
over HTTP, distils, tunes and evaluates against controls, and writes OUT/summary.json and OUT/report.html. The result
to look for: the right one of ten items is found with the photos' five tokens, and at chance level without them. The
whole catalogue is searched too, by words and by item tokens: words are at chance about the looks that were asked for.

With --serve it ends in `lavic serve` on the synthetic catalogue: a page to type requests in, until Ctrl-C."""

_GRACE_S = 30.0
_NUM_RETRIEVED = 10
"""Candidates of a request to the demo's server: as many as the page shows, and as the lists have that its model was
tuned on. Those lists are of one kind each, and longer lists mix kinds; docs/serving_page.md has figures."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    chosen = parse(DemoSettings, argv, command="demo", description=DESCRIPTION)
    out = chosen.out
    photos = out / "catalog" / "images"
    _check_folder(chosen)
    photos.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}
    with PhotoServer(photos, catalogue_port(out / "catalog")) as server, Tracker.open(out) as tracker:
        tracker.start("demo", flatten(chosen))  # the stages' runs are in its folder: MLflow shows them below it
        for stage in stages(chosen, server.url):
            _run(stage, seconds)
        tracker.log(0, **{f"seconds/{name}": value for name, value in seconds.items()})
    _run(Stage("mlflow", ("sync", str(out), "--uri", default_store_uri(out), "--experiment", "demo")), seconds)
    summary = summarise(out, seconds)
    atomic_write(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    shutil.copyfile(out / "evaluation" / "report.html", out / "report.html")
    print(table(summary))
    print(f"\nreport:  {out / 'report.html'}\nsummary: {out / 'summary.json'}")
    print(f"journal: mlflow ui --backend-store-uri {shlex.quote(default_store_uri(out))}")
    return _serve(chosen) if chosen.serve else 0


def _check_folder(chosen: DemoSettings) -> None:
    """Writes the settings to OUT/config.yaml; refuses a folder of a demo with another seed or size."""
    config = chosen.out / "config.yaml"
    if config.is_file():
        previous = load(DemoSettings, config)
        if (previous.seed, previous.small) != (chosen.seed, chosen.small):
            flags = f"--seed {previous.seed}{' --small' if previous.small else ''}"
            raise ConfigError(f"{chosen.out} has a demo that was started with {flags}: use these, or another --out")
    chosen.out.mkdir(parents=True, exist_ok=True)
    atomic_write(config, dump(chosen, command="demo"))


def _serve(chosen: DemoSettings) -> int:
    """Becomes `lavic serve` on the demo's catalogue; signals reach it directly."""
    out = chosen.out
    argv = (
        *("serve", "--config", "serve-mini", "--bundle", str(out / "runs" / "tune" / "bundle")),
        *("--store", str(out / "store"), "--index", str(out / "index"), "--shards", str(out / "shards" / "train")),
        *("--retrieved", str(_NUM_RETRIEVED), "--port", str(chosen.port)),
    )
    print(f"\n$ lavic {shlex.join(argv)}", flush=True)
    os.execv(sys.executable, [sys.executable, "-m", "lavic", *argv])


def catalogue_port(catalog: Path) -> int:
    """The port in the catalogue's links, so that a continued demo crawls the same plan; at first 0: any."""
    path = catalog / "item2meta_valid.jsonl"
    if not path.is_file():
        return 0
    return urlsplit(json.loads(path.open(encoding="utf-8").readline())["image"]).port or 0


def _run(stage: Stage, seconds: dict[str, float]) -> None:
    """Runs a stage's command, and the one that runs in parallel, unless their results are complete.

    Args:
        stage: What to run.
        seconds: Gets the run time of a stage that runs.

    Raises:
        StageFailed: With the command's exit code.
    """
    commands = []
    for argv in (stage.argv, stage.parallel):
        if argv is not None:
            complete = _is_complete(argv)
            print(f"\n$ lavic {shlex.join(argv)}{'   # already complete' if complete else ''}", flush=True)
            commands += [] if complete else [argv]
    start_time = time.monotonic()
    running = []
    for argv in commands:
        threads = {} if len(commands) == 1 else {"OMP_NUM_THREADS": "1"}
        running.append(subprocess.Popen([sys.executable, "-m", "lavic", *argv], env={**os.environ, **threads}))
    try:
        exit_codes = [process.wait() for process in running]
    except BaseException:
        _wait_for_interrupted(running)
        raise
    failed = next((index for index, code in enumerate(exit_codes) if code), None)
    if failed is not None:
        raise StageFailed(commands[failed][0], exit_codes[failed])
    if commands:
        seconds[stage.name] = round(seconds.get(stage.name, 0.0) + time.monotonic() - start_time, 1)


def _is_complete(argv: Sequence[str]) -> bool:
    """Whether the result of a stage's command is there: a process that finds it would take seconds to start."""
    command = command_module(argv[0])
    return hasattr(command, "is_complete") and bool(command.is_complete(command.resolve(argv[1:])))


class StageFailed(LavicError):
    """A command of the pipeline failed; its error is printed above."""

    def __init__(self, command: str, code: int) -> None:
        super().__init__(f"`lavic {command}` failed with exit code {code}; fix the error above and run the demo again")
        self.exit_code = code if code > 0 else 1


def _wait_for_interrupted(running: Sequence[subprocess.Popen[bytes]]) -> None:
    """Gives interrupted commands time to stop (Ctrl-C reached them too)."""
    for process in running:
        try:
            process.wait(timeout=_GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
