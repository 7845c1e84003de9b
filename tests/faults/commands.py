"""The commands with their smallest inputs, and the part of their results that is the same in every run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

JOURNAL = "metrics.jsonl"
LOOP = [
    "--loop.steps",
    "2",
    "--loop.global-batch-size",
    "4",
    "--loop.save-every",
    "1",
    "--lora.r",
    "2",
    "--tracking.system-every",
    "0",
]
EVALUATE = ["--arms", "lavic", "list_order", "--draws", "50", "--limit", "4", "--gallery", "2"]
MINI = ["--train-items", "10", "--valid-items", "3", "--heldout-items", "10", "--combination-items", "10"]
MINI += ["--train-conversations", "4", "--valid-conversations", "2", "--test-conversations", "2"]
FETCH = ["--fetch.allow-private", "--fetch.host-rate", "0", "--executor", "local", "--ray.workers", "1"]
VOLATILE = {"began", "checksum", "ledger_sha256", "ended", "seconds", "settings", "crawl", "versions", "plan"}
VOLATILE |= {"catalogue_files", "commit", "changed"}  # git refuses users who do not own the repository
"""Keys of JSON files whose values are times, paths, or depend on the user."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command that reads files in `in/` of a folder and writes files in `out/`."""

    name: str
    group: str
    """Commands of one group share most of their code."""
    argv: Callable[[Path], list[str]]
    """The arguments of `lavic`, for a folder."""
    reads: tuple[str, ...] = ()
    """Inputs, the most important one first, as patterns below the folder."""
    copies: tuple[str, ...] = ()
    """Parts of `in/` that it changes; they are moved to `out/`."""
    tolerates: dict[tuple[str, str], tuple[int, str]] = field(default_factory=dict)
    """(fault, input) -> (exit code, part of the output), where a damaged input is not an error."""
    keeps_work: bool = False
    """Whether OUT/work stays after an error in an input, for the next run."""
    prints: bool = False
    """Whether its result is its output; it writes no files."""
    result: Callable[[Path], dict[str, object]] | None = None
    """Computes what must be the same in every run from `out/`; by default the content of all files."""

    def signature(self, folder: Path) -> dict[str, object]:
        """The files of a run, without times and paths."""
        return (self.result or content)(folder / "out")


def content(folder: Path) -> dict[str, object]:
    """The digest of every file; of JSON files, what does not depend on times; of journals, that they exist."""
    files: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name == ".lock" or path.is_dir():
            continue
        if path.name in (JOURNAL, "report.html", "config.yaml", ".owner", "timing.jsonl"):
            files[name] = "there"
            continue
        data = path.read_bytes()
        for spelling in (json.dumps(str(folder.parent))[1:-1], str(folder.parent)):
            data = data.replace(spelling.encode(), b"FOLDER")
        if path.name.endswith(".ledger.jsonl"):
            files[name] = [without_times(json.loads(line)) for line in data.splitlines()]
        elif path.suffix == ".json":
            files[name] = without_times(json.loads(data))
        else:
            files[name] = hashlib.sha256(data).hexdigest()
    return files


def without_times(value: object) -> object:
    """A JSON value without times and paths."""
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in VOLATILE}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def receipt(folder: Path) -> dict[str, object]:
    """The receipt of `lavic verify`; it has no lock on the folder, so a killed run's hidden part file stays there."""
    return {name: value for name, value in content(folder).items() if not name.startswith(".")}


def sent(folder: Path) -> dict[str, object]:
    """What `lavic sync` has written to the database: every point once."""
    with contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as store:
        runs = store.execute("select count(*) from runs").fetchone()[0]
        points = store.execute("select key, step, value from metrics order by 1, 2, 3").fetchall()
    return {"runs": runs, "points": points, "left": [path.name for path in folder.rglob("*.part*")]}


def _store(folder: Path) -> list[str]:
    return ["--bundle", f"{folder}/in/bundle", "--store", f"{folder}/in/store", "--model.name", f"{folder}/in/base"]


COMMANDS = {
    command.name: command
    for command in (
        Command(
            name="crawl",
            group="set",
            argv=lambda folder: ["crawl", "--items", f"{folder}/in/items.jsonl", "--out", f"{folder}/out/set", *FETCH],
            reads=("in/items.jsonl",),
            tolerates={("input cut", "in/items.jsonl"): (0, "1 records that cannot be read")},
        ),
        Command(
            name="verify",
            group="set",
            argv=lambda folder: ["verify", f"{folder}/in/photos", "--receipt", f"{folder}/out/receipt.json"],
            reads=("in/photos/*-000000.tar", "in/photos/manifest.json"),
            # it looks for damaged files
            tolerates={
                ("input unreadable", "in/photos/*-000000.tar"): (1, "cannot be read"),
                ("input cut", "in/photos/*-000000.tar"): (1, "differences"),
            },
            result=receipt,
        ),
        Command(
            name="mini catalog",
            group="set",
            argv=lambda folder: [
                "mini",
                "catalog",
                "--config",
                f"{folder}/in/catalog.yaml",
                "--out",
                f"{folder}/out/mini",
            ],
            reads=("in/catalog.yaml",),
        ),
        Command(
            name="reddit",
            group="set",
            argv=lambda folder: [
                *(
                    "reddit",
                    "--dumps",
                    f"{folder}/in/RS.zst",
                    f"{folder}/in/RC.zst",
                    "--items",
                    f"{folder}/in/items.jsonl",
                ),
                *("--out", f"{folder}/out/conversations", "--executor", "local", "--ray.workers", "1"),
            ],
            reads=("in/RC.zst", "in/items.jsonl"),
            tolerates={("input cut", "in/items.jsonl"): (0, "conversations")},
            keeps_work=True,
        ),
        Command(
            name="retrieve",
            group="set",
            argv=lambda folder: [
                *("retrieve", "--items", f"{folder}/in/titles.jsonl", "--conversations", f"{folder}/in/rows.jsonl"),
                *("--out", f"{folder}/out/lists", "--index", f"{folder}/out/index", "--draws", "50", "--k", "5"),
                *("--tracking.system-every", "0"),
            ],
            reads=("in/rows.jsonl", "in/titles.jsonl"),
            tolerates={("input cut", "in/titles.jsonl"): (0, "items of")},
        ),
        Command(
            name="evaluate without a model",
            group="set",
            argv=lambda folder: [
                *("evaluate", "--test", f"{folder}/in/rows.jsonl", "--arms", "random", "list_order", "bm25"),
                *("--items", f"{folder}/in/titles.jsonl", "--out", f"{folder}/out/evaluation", "--draws", "50"),
                *("--tracking.system-every", "0"),
            ],
            reads=("in/rows.jsonl", "in/titles.jsonl"),
            tolerates={
                ("input cut", "in/titles.jsonl"): (0, "report.html")
            },  # cut between two lines: there are fewer texts
        ),
        Command(
            name="describe",
            group="model",
            argv=lambda folder: [
                *("describe", "--shards", f"{folder}/out/photos", "--model.name", f"{folder}/in/base"),
                *("--max-new-tokens", "4"),
            ],
            reads=("in/base/model.safetensors", "out/photos/*-000000.tar", "in/base/tokenizer.json"),
            copies=("photos",),
        ),
        Command(
            name="distill",
            group="model",
            argv=lambda folder: [
                *(
                    "distill",
                    "--shards",
                    f"{folder}/in/photos",
                    "--valid",
                    f"{folder}/in/valid",
                    "--out",
                    f"{folder}/out/run",
                ),
                *("--model.name", f"{folder}/in/base", *LOOP),
            ],
            reads=("in/photos/*-000000.tar", "in/base/model.safetensors", "in/valid/manifest.json"),
        ),
        Command(
            name="embed",
            group="model",
            argv=lambda folder: [
                *(
                    "embed",
                    "--shards",
                    f"{folder}/in/photos",
                    "--adapter",
                    f"{folder}/in/vision",
                    "--out",
                    f"{folder}/out/store",
                ),
                *("--model.name", f"{folder}/in/base"),
            ],
            reads=("in/vision/adapter_model.safetensors", "in/photos/*-000000.tar", "in/base/model.safetensors"),
        ),
        Command(
            name="tune",
            group="model",
            argv=lambda folder: [
                *("tune", "--store", f"{folder}/in/store", "--train", f"{folder}/in/rows.jsonl", "--max-length", "400"),
                *(
                    "--valid",
                    f"{folder}/in/rows.jsonl",
                    "--out",
                    f"{folder}/out/run",
                    "--model.name",
                    f"{folder}/in/base",
                    *LOOP,
                ),
            ],
            reads=("in/store/tokens-*.safetensors", "in/rows.jsonl", "in/store/manifest.json"),
        ),
        Command(
            name="evaluate",
            group="model",
            argv=lambda folder: [
                *(
                    "evaluate",
                    *_store(folder),
                    "--test",
                    f"{folder}/in/rows.jsonl",
                    "--out",
                    f"{folder}/out/evaluation",
                    *EVALUATE,
                ),
                *("--tracking.system-every", "0"),
            ],
            reads=("in/bundle/language_adapter/adapter_model.safetensors", "in/rows.jsonl", "in/store/manifest.json"),
        ),
        Command(
            name="recommend",
            group="model",
            argv=lambda folder: ["recommend", *_store(folder), "--conversation", f"{folder}/in/rows.jsonl", "--json"],
            reads=("in/rows.jsonl", "in/bundle/bundle.json", "in/store/tokens-*.safetensors"),
            prints=True,
        ),
        Command(
            name="sync",
            group="record",
            argv=lambda folder: ["sync", f"{folder}/out/run"],
            reads=("out/run/metrics.jsonl",),
            copies=("run",),
            # a killed run leaves an incomplete journal
            tolerates={("input cut", "out/run/metrics.jsonl"): (0, "points -> ")},
            result=sent,
        ),
        Command(
            name="submit --dry-run",
            group="record",
            argv=lambda folder: ["submit", "--config", f"{folder}/in/pipeline.yaml", "--dry-run"],
            reads=("in/pipeline.yaml",),
            prints=True,
        ),
        Command(
            name="submit status",
            group="record",
            argv=lambda folder: ["submit", "status", f"{folder}/in/pipeline", "--json"],
            reads=("in/pipeline/pipeline.yaml",),
            prints=True,
        ),
        Command(name="doctor", group="record", argv=lambda folder: ["doctor"], prints=True),
    )
}
