"""`lavic demo`: the whole pipeline in miniature, from a crawl to a report, through the commands a user would type.

A synthetic catalogue is generated and served on this machine; the rest is `lavic crawl`, `lavic describe` and so on,
each printed before it runs. The same command continues a demo that was stopped.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import Field, PositiveInt

from lavic.cli import command_module
from lavic.config import Seed, dump, flatten, load, parse, settings
from lavic.data.conversations import read_conversations
from lavic.errors import ConfigError, LavicError
from lavic.metrics.trec_files import read_run
from lavic.mini.look_recall import chance, look_recall, read_looks
from lavic.mini.photo_server import PhotoServer
from lavic.storage.atomic import atomic_write
from lavic.tracking.mlflow_store import default_store_uri
from lavic.tracking.run_metadata import versions
from lavic.tracking.tracker import Tracker

DESCRIPTION = """Run the whole pipeline in miniature on this machine: about seven minutes on two CPU cores.

It generates a catalogue of products whose titles do not tell which one a conversation asks for, crawls their photos
over HTTP, distils, tunes and evaluates against controls, and writes OUT/summary.json and OUT/report.html. The result
to look for: the right one of ten items is found with the photos' five tokens, and at chance level without them. The
whole catalogue is searched too, by words and by item tokens: words are at chance about the looks that were asked for.

With --serve it ends in `lavic serve` on the synthetic catalogue: a page to type requests in, until Ctrl-C."""

PACKAGES = ("lavic", "torch", "transformers", "peft", "deepspeed", "ray", "webdataset", "mlflow")
"""Their versions are in the summary."""
_SMALL_CATALOGUE = (
    *("--train-items", "150", "--valid-items", "120", "--heldout-items", "120", "--combination-items", "120"),
    *("--train-conversations", "96", "--valid-conversations", "8", "--test-conversations", "8"),
)
_TEST_SETS = {"test": "held_out_items", "test_combinations": "held_out_combinations"}
"""Conversation files that the whole catalogue is searched for, and their names in the summary."""
_GRACE_S = 30.0
SEARCHED = 10
"""Candidates of a request to the demo's server: as many as the page shows, and as the lists have that its model was
tuned on. Those lists are of one kind each, and longer lists mix kinds; docs/serving_page.md has figures."""


@settings
class DemoSettings:
    """The pipeline in miniature."""

    out: Path
    """Folder for everything; a demo that was stopped continues there."""
    seed: Seed = 0
    """Seed of the catalogue, the adapters and the training order."""
    nproc: PositiveInt = 2
    """Number of processes of the training stages."""
    small: bool = False
    """A few steps of everything, to check that every part runs here; the results mean nothing."""
    serve: bool = False
    """Serve the result at the end, with a page to try it, until Ctrl-C."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port of --serve; 0: any that is free."""


@dataclass(frozen=True)
class Stage:
    """One command of the pipeline."""

    name: str
    """Key of its time in the summary."""
    argv: tuple[str, ...]
    """Arguments after `lavic`."""
    parallel: tuple[str, ...] | None = None
    """Arguments of a second command that runs at the same time."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    chosen = parse(DemoSettings, argv, command="demo", description=DESCRIPTION)
    out = chosen.out
    photos = out / "catalog" / "images"
    _check_folder(chosen)
    photos.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}
    with PhotoServer(photos, port(out / "catalog")) as server, Tracker.open(out) as tracker:
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
        before = load(DemoSettings, config)
        if (before.seed, before.small) != (chosen.seed, chosen.small):
            flags = f"--seed {before.seed}{' --small' if before.small else ''}"
            raise ConfigError(f"{chosen.out} has a demo that was started with {flags}: use these, or another --out")
    chosen.out.mkdir(parents=True, exist_ok=True)
    atomic_write(config, dump(chosen, command="demo"))


def stages(chosen: DemoSettings, url: str) -> Iterator[Stage]:
    """The pipeline as commands."""
    out = chosen.out
    catalog, shards, runs = out / "catalog", out / "shards", out / "runs"
    lists = {name: str(catalog / f"{name}.jsonl") for name in ("train", "valid", "test", "test_combinations")}
    seed, ranks = ("--loop.seed", str(chosen.seed)), ("--nproc", str(chosen.nproc))

    size = _SMALL_CATALOGUE if chosen.small else ()
    if not (catalog / "test_combinations.jsonl").is_file():
        yield Stage(
            "catalog",
            ("mini", "catalog", "--out", str(catalog), "--base-url", url, "--seed", str(chosen.seed), *size),
        )
    for split, items in (("train", "item2meta_train.json"), ("valid", "item2meta_valid.jsonl")):
        crawl = ("crawl", "--config", "crawl-mini", "--items", str(catalog / items), "--out", str(shards / split))
        yield Stage("crawl", (*crawl, "--split", split))
        yield Stage("verify", ("verify", str(shards / split), "--receipt", str(shards / f"{split}.receipt.json")))
    yield Stage("describe", ("describe", "--config", "describe-mini", "--shards", str(shards / "train")))

    steps = ("--loop.steps", "6", "--loop.save-every", "3") if chosen.small else ()
    photos = ("--shards", str(shards / "train"), "--valid", str(shards / "valid"))
    yield Stage(
        "distill",
        ("distill", "--config", "distill-mini", *photos, "--out", str(runs / "distill"), *seed, *ranks, *steps),
    )
    embed = ("embed", "--config", "embed-mini", "--shards", str(shards / "train"))
    yield Stage("embed", (*embed, "--adapter", str(runs / "distill"), "--out", str(out / "store")))
    yield Stage("embed", (*embed, "--out", str(out / "store_undistilled")))

    retriever = ("tune-retriever", "--config", "tune-retriever-mini", "--store", str(out / "store"))
    few = ("--head.epochs", "1") if chosen.small else ()
    conversations = ("--train", lists["train"], "--valid", lists["valid"], "--head.seed", str(chosen.seed))
    yield Stage("tune_retriever", (*retriever, *conversations, "--out", str(runs / "retriever"), *few))
    yield Stage(
        "retrieve",
        (
            *("retrieve", "--items", str(catalog / "item2meta_train.json"), "--store", str(out / "store")),
            *("--conversations", *(lists[name] for name in _TEST_SETS), "--index", str(out / "index")),
            *("--methods", "bm25", "tokens", "--tokens.retriever", str(runs / "retriever"), "--draws", "1000"),
            *("--out", str(out / "retrieval")),
        ),
    )

    tune = ("tune", "--config", "tune-mini", "--train", lists["train"], "--valid", lists["valid"], *seed, *steps)
    yield Stage("tune", (*tune, "--store", str(out / "store"), "--out", str(runs / "tune"), *ranks))
    # the two controls are tuned in the same way, in parallel with one process each: half the start-up time
    yield Stage(
        "tune_controls",
        (*tune, "--store", str(out / "store"), "--tokens", "none", "--out", str(runs / "tune_text_only")),
        parallel=(*tune, "--store", str(out / "store_undistilled"), "--out", str(runs / "tune_undistilled")),
    )
    undistilled = f"undistilled={runs / 'tune_undistilled' / 'bundle'}@{out / 'store_undistilled'}"
    yield Stage(
        "evaluate",
        (
            *("evaluate", "--bundle", str(runs / "tune" / "bundle"), "--store", str(out / "store")),
            *("--test", f"held_out_items={lists['test']}", f"held_out_combinations={lists['test_combinations']}"),
            *("--compare", f"text_only={runs / 'tune_text_only' / 'bundle'}", undistilled),
            *("--shards", str(shards / "train"), "--runs", str(runs / "distill"), str(runs / "tune")),
            *("--out", str(out / "evaluation"), "--seed", str(chosen.seed), *ranks),
        ),
    )
    yield Stage("recommend", _recommend(out))


def _recommend(out: Path) -> tuple[str, ...]:
    """`lavic recommend` on the first test conversation."""
    row = json.loads((out / "catalog" / "test.jsonl").open(encoding="utf-8").readline())
    example = out / "example.jsonl"
    atomic_write(
        example, json.dumps({k: row[k] for k in ("context", "context_items", "gt_items", "candidates_st")}) + "\n"
    )
    bundle = str(out / "runs" / "tune" / "bundle")
    return ("recommend", "--bundle", bundle, "--store", str(out / "store"), "--conversation", str(example))


def _serve(chosen: DemoSettings) -> int:
    """Becomes `lavic serve` on the demo's catalogue; signals reach it directly."""
    out = chosen.out
    argv = (
        *("serve", "--config", "serve-mini", "--bundle", str(out / "runs" / "tune" / "bundle")),
        *("--store", str(out / "store"), "--index", str(out / "index"), "--shards", str(out / "shards" / "train")),
        *("--retrieved", str(SEARCHED), "--port", str(chosen.port)),
    )
    print(f"\n$ lavic {shlex.join(argv)}", flush=True)
    os.execv(sys.executable, [sys.executable, "-m", "lavic", *argv])


def port(catalog: Path) -> int:
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
    began = time.monotonic()
    running = []
    for argv in commands:
        threads = {} if len(commands) == 1 else {"OMP_NUM_THREADS": "1"}
        running.append(subprocess.Popen([sys.executable, "-m", "lavic", *argv], env={**os.environ, **threads}))
    try:
        codes = [process.wait() for process in running]
    except BaseException:
        _wait_for_interrupted(running)
        raise
    failed = next((number for number, code in enumerate(codes) if code), None)
    if failed is not None:
        raise StageFailed(commands[failed][0], codes[failed])
    if commands:
        seconds[stage.name] = round(seconds.get(stage.name, 0.0) + time.monotonic() - began, 1)


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


def summarise(out: Path, seconds: Mapping[str, float]) -> dict[str, Any]:
    """The main results, read from the files of the stages, and the run time of each stage.

    Args:
        out: The demo's folder; stages that an earlier call ran keep the times in its summary.
        seconds: Run times of the stages that this call ran.
    """
    if (out / "summary.json").is_file():
        seconds = json.loads((out / "summary.json").read_text())["seconds"] | dict(seconds)
    seconds = {name: value for name, value in seconds.items() if name != "total"}
    results = json.loads((out / "evaluation" / "results.json").read_text())
    _, *others = results["sets"]
    return {
        "captions": json.loads((out / "runs" / "distill" / "captions.json").read_text()),
        "hit_rate": results["hit_rate"],
        **{
            f"hit_rate_{name}": {arm: metrics["hit_rate"] for arm, metrics in results["sets"][name]["arms"].items()}
            for name in others
        },
        "full_catalogue": full_catalogue(out),
        "seconds": seconds | {"total": round(sum(seconds.values()), 1)},
        "versions": {"python": platform.python_version(), **versions(*PACKAGES)},
    }


def full_catalogue(out: Path) -> dict[str, Any]:
    """Recall and look@k of each way to search the whole catalogue, by test set."""
    results = json.loads((out / "retrieval" / "results.json").read_text())
    looks = read_looks(out / "catalog")
    summary: dict[str, Any] = {"items": results["index"]["items"]}
    for name, shown in _TEST_SETS.items():
        conversations = read_conversations(out / "catalog" / f"{name}.jsonl")
        targets = [conversation.targets[0] for conversation in conversations]
        rows: dict[str, Any] = {"chance": chance(targets, looks)}
        for method, recall in results["sets"][name]["methods"].items():
            run = read_run(out / "retrieval" / f"{name}.{method}.run")
            lists = [[id for id, _ in run.get(conversation.id, ())] for conversation in conversations]
            rows[method] = {key: value["value"] for key, value in recall.items()} | look_recall(lists, targets, looks)
        summary[shown] = rows
    return summary


def table(summary: Mapping[str, Any]) -> str:
    """The summary for a terminal."""
    lines = ["", "perplexity of held-out descriptions"]
    names = {
        "full": "all tokens",
        "cls_before": "five tokens, before stage 1",
        "cls_after": "five tokens, after stage 1",
    }
    for key, name in names.items():
        lines.append(f"  {name:<34}{summary['captions'][key]['perplexity']:8.3f}")
    sets = {key.removeprefix("hit_rate_"): hits for key, hits in summary.items() if key.startswith("hit_rate_")}
    heads = ("held_out_items" if sets else "held-out", *sets)
    lines += ["", f"{'hit rate, one of ten':<36}" + "".join(f"{head.replace('_', ' '):>24}" for head in heads)]
    for arm, hit in summary["hit_rate"].items():
        row = (hit, *(hits.get(arm) for hits in sets.values()))
        lines.append(f"  {arm:<34}" + "".join(f"{_interval(value):>24}" for value in row))
    lines += list(_full_catalogue_lines(summary["full_catalogue"]))
    lines += ["", "seconds: " + ", ".join(f"{name} {value:g}" for name, value in summary["seconds"].items())]
    return "\n".join(lines)


def _full_catalogue_lines(summary: Mapping[str, Any]) -> Iterator[str]:
    columns = ("recall_at_1", "recall_at_10", "recall_at_50", "look_at_1", "look_at_10")
    heads = "".join(f"{column.replace('_at_', '@'):>11}" for column in columns)
    for name in _TEST_SETS.values():
        yield ""
        yield f"{'all ' + format(summary['items'], ',') + ' items, ' + name.replace('_', ' '):<44}{heads}"
        for method, values in summary[name].items():
            shown = {"chance": "random item of the kind"}.get(method, method)
            cells = (f"{values[column]:11.3f}" if column in values else " " * 11 for column in columns)
            yield f"  {shown:<42}{''.join(cells)}"


def _interval(hit: dict | None) -> str:
    return "" if hit is None else f"{hit['value']:.3f}  [{hit['low']:.3f}, {hit['high']:.3f}]"
