"""Summarises runs of `fashion.sh`: writes OUT/summary.json of each and prints the tables of docs/benchmarks.md.

    python benchmarks/fashion_summary.py OUT [OUT ...]

Several folders are seeds of the same pipeline; they are named by the seeds that they were started with.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from arms import interval, short
from arms import summarise as summarise_arms
from arms import table as arms_table

from lavic.data.conversations import read_conversations
from lavic.metrics.trec_files import read_run
from lavic.mini.look_recall import Look, chance, look_recall

RECALLS = ("recall_at_1", "recall_at_10", "recall_at_50", "look_at_1", "look_at_10")
PERPLEXITIES = {
    "full": "all tokens",
    "cls_before": "five tokens, before stage 1",
    "cls_after": "five tokens, after stage 1",
}


def read_looks(catalog: Path) -> dict[str, Look]:
    """The look of every item, by id: its colour, no pattern, and its article type and department as its kind."""
    colours = {row["id"]: row["look"] for row in _rows(catalog / "looks_all.jsonl")}
    looks: dict[str, Look] = {}
    for item in _rows(catalog / "meta_Fashion.jsonl"):
        kind = f"{item['categories'][2]}, {json.loads(item['details'])['Department']}"
        looks[item["parent_asin"]] = (colours.get(item["parent_asin"], ""), "", kind)
    return looks


def summarise(out: Path) -> dict[str, Any]:
    """The main results of one run, from the files of its stages."""
    seconds: Counter[str] = Counter()
    for line in (out / "seconds.tsv").read_text().splitlines():
        name, value = line.split("\t")
        seconds[name] += int(value)
    evaluated, retrieved, searched = (
        json.loads((out / folder / "results.json").read_text())["sets"]
        for folder in ("evaluation", "evaluation_retrieved", "retrieval")
    )

    looks = read_looks(out / "catalog")
    conversations = read_conversations(out / "test.jsonl")
    targets = [conversation.targets[0] for conversation in conversations]

    def look_recalls(run_file: Path) -> dict[str, float]:
        run = read_run(run_file)
        lists = [[id for id, _ in run.get(conversation.id, ())] for conversation in conversations]
        return look_recall(lists, targets, looks)

    catalogue: dict[str, Any] = {"random item of the kind": chance(targets, looks)}
    for method, recall in searched["test"]["methods"].items():
        values = {key: value["value"] for key, value in recall.items()}
        catalogue[method] = values | look_recalls(out / "retrieval" / f"test.{method}.run")
    end_to_end = {
        arm: {"hit_rate": metrics["hit_rate"]}
        | (look_recalls(out / "evaluation_retrieved" / "trec" / "test" / f"{arm}.run") if arm != "random" else {})
        for arm, metrics in retrieved["test"]["arms"].items()
    }
    return {
        "captions": json.loads((out / "runs" / "distill" / "captions.json").read_text()),
        "sets": {name: summarise_arms(test_set) for name, test_set in evaluated.items()},
        "full_catalogue": catalogue,
        "end_to_end": {"ceiling": retrieved["test"]["ceiling"], "arms": end_to_end},
        "seconds": {**seconds, "total": seconds.total()},
    }


def tables(seeds: Mapping[int, Mapping[str, Any]]) -> str:
    """Markdown tables with a column or a row for each seed."""
    first = next(iter(seeds.values()))
    parts = [
        f"{name}\n\n{arms_table({seed: run['sets'][name] for seed, run in seeds.items()})}" for name in first["sets"]
    ]

    rows = [
        [
            f"`{method}`" if number == 0 else "",
            seed,
            *(short(run["full_catalogue"][method].get(key)) for key in RECALLS),
        ]
        for method in first["full_catalogue"]
        for number, (seed, run) in enumerate(seeds.items())
    ]
    parts.append(_table(["whole catalogue", "seed", *(key.replace("_at_", "@") for key in RECALLS)], rows))

    rows = []
    for arm in first["end_to_end"]["arms"]:
        for number, (seed, run) in enumerate(seeds.items()):
            if (values := run["end_to_end"]["arms"].get(arm)) is None:
                continue
            cells = [interval(values["hit_rate"]), short(values.get("look_at_1"))]
            rows.append([f"`{arm}`" if number == 0 else "", seed, *cells])
    parts.append(_table(["retrieved lists of ten", "seed", "HitRatio@1", "look@1"], rows))

    rows = [
        [name, *(short(run["captions"][key]["perplexity"]) for run in seeds.values())]
        for key, name in PERPLEXITIES.items()
    ]
    parts.append(_table(["perplexity of validation photos' descriptions", *(f"seed {seed}" for seed in seeds)], rows))

    steps = list(dict.fromkeys(step for run in seeds.values() for step in run["seconds"]))
    rows = [[f"seed {seed}", *(run["seconds"].get(step, "reused") for step in steps)] for seed, run in seeds.items()]
    parts.append(_table(["seconds", *steps], rows))
    return "\n\n".join(parts)


def _table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="OUT")
    seeds = {}
    for out in parser.parse_args().folders:
        summary = summarise(out)
        (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        seeds[int((out / "seed").read_text())] = summary
    print(tables(seeds))


if __name__ == "__main__":
    main()
