"""The commands, on the smallest inputs that each can work with, and what must be the same after every run of one."""

from __future__ import annotations

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
VOLATILE |= {"catalogue_files", "commit", "changed"}  # git says nothing to a user who does not own the repository
"""Keys of JSON files that hold times, paths, and what depends on the user."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command.

    All that it writes is below `out/` of its folder, all that it only reads below `in/`.
    """

    name: str
    group: str
    """Commands of one group share most of their code."""
    words: Callable[[Path], list[str]]
    """The words after `lavic`, for a folder."""
    reads: tuple[str, ...] = ()
    """Inputs, the most telling one first, as patterns below its folder."""
    copies: tuple[str, ...] = ()
    """What it works on in place: parts of `in/` that stand below `out/`."""
    tells: dict[tuple[str, str], tuple[int, str]] = field(default_factory=dict)
    """Where an input that is spoilt is no error of the command: by fault and input its exit code, and a word of what it
    says."""
    keeps_work: bool = False
    """Whether OUT/work stays after an error in an input: the steps that were done, for the next run."""
    prints: bool = False
    """Whether its result is what it prints."""
    result: Callable[[Path], dict[str, object]] | None = None
    """What must be the same, where that is not the content of `out/`."""

    @property
    def writes(self) -> bool:
        """Whether it writes files."""
        return not self.prints

    def signature(self, folder: Path) -> dict[str, object]:
        """What an undisturbed run leaves, without times and paths."""
        return (self.result or content)(folder / "out")


def content(folder: Path) -> dict[str, object]:
    """Every file by its digest; of journals that they are there, of JSON files what does not depend on the clock."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name == ".lock" or path.is_dir():
            continue
        if path.name in (JOURNAL, "report.html", "config.yaml", ".owner", "timing.jsonl"):
            found[name] = "there"
            continue
        data = path.read_bytes()
        for spelled in (json.dumps(str(folder.parent))[1:-1], str(folder.parent)):
            data = data.replace(spelled.encode(), b"FOLDER")
        if path.name.endswith(".ledger.jsonl"):
            found[name] = [without_times(json.loads(line)) for line in data.splitlines()]
        elif path.suffix == ".json":
            found[name] = without_times(json.loads(data))
        else:
            found[name] = hashlib.sha256(data).hexdigest()
    return found


def without_times(value: object) -> object:
    """A JSON value less what depends on the clock or the place."""
    if isinstance(value, dict):
        return {key: without_times(each) for key, each in value.items() if key not in VOLATILE}
    return [without_times(each) for each in value] if isinstance(value, list) else value


def receipt(folder: Path) -> dict[str, object]:
    """What `lavic verify` leaves; it does not hold the folder, so a part file of one that was killed stays aside."""
    return {name: value for name, value in content(folder).items() if not name.startswith(".")}


def sent(folder: Path) -> dict[str, object]:
    """What `lavic sync` has put into the database: a point is there once."""
    with sqlite3.connect(folder / "mlflow.db") as store:
        runs = store.execute("select count(*) from runs").fetchone()[0]
        points = store.execute("select key, step, value from metrics order by 1, 2, 3").fetchall()
    store.close()
    return {"runs": runs, "points": points, "left": [path.name for path in folder.rglob("*.part*")]}


def _store(at: Path) -> list[str]:
    return ["--bundle", f"{at}/in/bundle", "--store", f"{at}/in/store", "--model.name", f"{at}/in/base"]


COMMANDS = {
    command.name: command
    for command in (
        Command(
            name="crawl",
            group="set",
            words=lambda at: ["crawl", "--items", f"{at}/in/items.jsonl", "--out", f"{at}/out/set", *FETCH],
            reads=("in/items.jsonl",),
            tells={("input cut", "in/items.jsonl"): (0, "1 records that cannot be read")},
        ),
        Command(
            name="verify",
            group="set",
            words=lambda at: ["verify", f"{at}/in/photos", "--receipt", f"{at}/out/receipt.json"],
            reads=("in/photos/*-000000.tar", "in/photos/manifest.json"),
            # to find that is what it is for
            tells={
                ("input unreadable", "in/photos/*-000000.tar"): (1, "cannot be read"),
                ("input cut", "in/photos/*-000000.tar"): (1, "differences"),
            },
            result=receipt,
        ),
        Command(
            name="mini catalog",
            group="set",
            words=lambda at: ["mini", "catalog", "--config", f"{at}/in/catalog.yaml", "--out", f"{at}/out/mini"],
            reads=("in/catalog.yaml",),
        ),
        Command(
            name="reddit",
            group="set",
            words=lambda at: [
                *("reddit", "--dumps", f"{at}/in/RS.zst", f"{at}/in/RC.zst", "--items", f"{at}/in/items.jsonl"),
                *("--out", f"{at}/out/conversations", "--executor", "local", "--ray.workers", "1"),
            ],
            reads=("in/RC.zst", "in/items.jsonl"),
            tells={("input cut", "in/items.jsonl"): (0, "conversations")},
            keeps_work=True,
        ),
        Command(
            name="retrieve",
            group="set",
            words=lambda at: [
                *("retrieve", "--items", f"{at}/in/titles.jsonl", "--conversations", f"{at}/in/rows.jsonl"),
                *("--out", f"{at}/out/lists", "--index", f"{at}/out/index", "--draws", "50", "--k", "5"),
                *("--tracking.system-every", "0"),
            ],
            reads=("in/rows.jsonl", "in/titles.jsonl"),
            tells={("input cut", "in/titles.jsonl"): (0, "items of")},
        ),
        Command(
            name="evaluate without a model",
            group="set",
            words=lambda at: [
                *("evaluate", "--test", f"{at}/in/rows.jsonl", "--arms", "random", "list_order", "bm25"),
                *("--items", f"{at}/in/titles.jsonl", "--out", f"{at}/out/evaluation", "--draws", "50"),
                *("--tracking.system-every", "0"),
            ],
            reads=("in/rows.jsonl", "in/titles.jsonl"),
            tells={("input cut", "in/titles.jsonl"): (0, "report.html")},  # cut between two lines: fewer texts
        ),
        Command(
            name="describe",
            group="model",
            words=lambda at: [
                *("describe", "--shards", f"{at}/out/photos", "--model.name", f"{at}/in/base"),
                *("--max-new-tokens", "4"),
            ],
            reads=("in/base/model.safetensors", "out/photos/*-000000.tar", "in/base/tokenizer.json"),
            copies=("photos",),
        ),
        Command(
            name="distill",
            group="model",
            words=lambda at: [
                *("distill", "--shards", f"{at}/in/photos", "--valid", f"{at}/in/valid", "--out", f"{at}/out/run"),
                *("--model.name", f"{at}/in/base", *LOOP),
            ],
            reads=("in/photos/*-000000.tar", "in/base/model.safetensors", "in/valid/manifest.json"),
        ),
        Command(
            name="embed",
            group="model",
            words=lambda at: [
                *("embed", "--shards", f"{at}/in/photos", "--adapter", f"{at}/in/vision", "--out", f"{at}/out/store"),
                *("--model.name", f"{at}/in/base"),
            ],
            reads=("in/vision/adapter_model.safetensors", "in/photos/*-000000.tar", "in/base/model.safetensors"),
        ),
        Command(
            name="tune",
            group="model",
            words=lambda at: [
                *("tune", "--store", f"{at}/in/store", "--train", f"{at}/in/rows.jsonl", "--max-length", "400"),
                *("--valid", f"{at}/in/rows.jsonl", "--out", f"{at}/out/run", "--model.name", f"{at}/in/base", *LOOP),
            ],
            reads=("in/store/tokens-*.safetensors", "in/rows.jsonl", "in/store/manifest.json"),
        ),
        Command(
            name="evaluate",
            group="model",
            words=lambda at: [
                *("evaluate", *_store(at), "--test", f"{at}/in/rows.jsonl", "--out", f"{at}/out/evaluation", *EVALUATE),
                *("--tracking.system-every", "0"),
            ],
            reads=("in/bundle/language_adapter/adapter_model.safetensors", "in/rows.jsonl", "in/store/manifest.json"),
        ),
        Command(
            name="recommend",
            group="model",
            words=lambda at: ["recommend", *_store(at), "--conversation", f"{at}/in/rows.jsonl", "--json"],
            reads=("in/rows.jsonl", "in/bundle/bundle.json", "in/store/tokens-*.safetensors"),
            prints=True,
        ),
        Command(
            name="sync",
            group="record",
            words=lambda at: ["sync", f"{at}/out/run"],
            reads=("out/run/metrics.jsonl",),
            copies=("run",),
            # a journal that breaks off is what a run leaves that was killed
            tells={("input cut", "out/run/metrics.jsonl"): (0, "points -> ")},
            result=sent,
        ),
        Command(
            name="submit --dry-run",
            group="record",
            words=lambda at: ["submit", "--config", f"{at}/in/pipeline.yaml", "--dry-run"],
            reads=("in/pipeline.yaml",),
            prints=True,
        ),
        Command(
            name="submit status",
            group="record",
            words=lambda at: ["submit", "status", f"{at}/in/pipeline", "--json"],
            reads=("in/pipeline/pipeline.yaml",),
            prints=True,
        ),
        Command(name="doctor", group="record", words=lambda at: ["doctor"], prints=True),
    )
}
