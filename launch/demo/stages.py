"""The stages of `lavic demo`, as the commands that a user would type."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, PositiveInt

from lavic.config import Seed, settings
from lavic.storage.atomic import atomic_write

TEST_SETS = {"test": "held_out_items", "test_combinations": "held_out_combinations"}
"""Conversation files that the whole catalogue is searched for, and their names in the summary."""
_SMALL_CATALOGUE = (
    *("--train-items", "150", "--valid-items", "120", "--heldout-items", "120", "--combination-items", "120"),
    *("--train-conversations", "96", "--valid-conversations", "8", "--test-conversations", "8"),
)


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
    one_epoch = ("--head.epochs", "1") if chosen.small else ()
    conversations = ("--train", lists["train"], "--valid", lists["valid"], "--head.seed", str(chosen.seed))
    yield Stage("tune_retriever", (*retriever, *conversations, "--out", str(runs / "retriever"), *one_epoch))
    yield Stage(
        "retrieve",
        (
            *("retrieve", "--items", str(catalog / "item2meta_train.json"), "--store", str(out / "store")),
            *("--conversations", *(lists[name] for name in TEST_SETS), "--index", str(out / "index")),
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
