"""The main results of a demo, read from the files of its stages: `summary.json`, and a table for a terminal."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lavic.data.conversations import read_conversations
from lavic.launch.demo.stages import TEST_SETS
from lavic.metrics.trec_files import read_run
from lavic.mini.look_recall import chance, look_recall, read_looks
from lavic.tracking.run_metadata import versions

PACKAGES = ("lavic", "torch", "transformers", "peft", "deepspeed", "ray", "webdataset", "mlflow")
"""Their versions are in the summary."""


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
    _, *other_sets = results["sets"]
    return {
        "captions": json.loads((out / "runs" / "distill" / "captions.json").read_text()),
        "hit_rate": results["hit_rate"],
        **{
            f"hit_rate_{name}": {arm: metrics["hit_rate"] for arm, metrics in results["sets"][name]["arms"].items()}
            for name in other_sets
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
    for name, title in TEST_SETS.items():
        conversations = read_conversations(out / "catalog" / f"{name}.jsonl")
        targets = [conversation.targets[0] for conversation in conversations]
        rows: dict[str, Any] = {"chance": chance(targets, looks)}
        for method, recall in results["sets"][name]["methods"].items():
            run = read_run(out / "retrieval" / f"{name}.{method}.run")
            lists = [[id for id, _ in run.get(conversation.id, ())] for conversation in conversations]
            rows[method] = {key: value["value"] for key, value in recall.items()} | look_recall(lists, targets, looks)
        summary[title] = rows
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
    headers = ("held_out_items" if sets else "held-out", *sets)
    lines += ["", f"{'hit rate, one of ten':<36}" + "".join(f"{header.replace('_', ' '):>24}" for header in headers)]
    for arm, hit in summary["hit_rate"].items():
        row = (hit, *(hits.get(arm) for hits in sets.values()))
        lines.append(f"  {arm:<34}" + "".join(f"{_interval(value):>24}" for value in row))
    lines += list(_full_catalogue_lines(summary["full_catalogue"]))
    lines += ["", "seconds: " + ", ".join(f"{name} {value:g}" for name, value in summary["seconds"].items())]
    return "\n".join(lines)


def _full_catalogue_lines(summary: Mapping[str, Any]) -> Iterator[str]:
    columns = ("recall_at_1", "recall_at_10", "recall_at_50", "look_at_1", "look_at_10")
    header = "".join(f"{column.replace('_at_', '@'):>11}" for column in columns)
    for name in TEST_SETS.values():
        yield ""
        yield f"{'all ' + format(summary['items'], ',') + ' items, ' + name.replace('_', ' '):<44}{header}"
        for method, values in summary[name].items():
            label = {"chance": "random item of the kind"}.get(method, method)
            cells = (f"{values[column]:11.3f}" if column in values else " " * 11 for column in columns)
            yield f"  {label:<42}{''.join(cells)}"


def _interval(hit: dict | None) -> str:
    return "" if hit is None else f"{hit['value']:.3f}  [{hit['low']:.3f}, {hit['high']:.3f}]"
