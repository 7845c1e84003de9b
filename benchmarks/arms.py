"""Every arm of `lavic evaluate` on the demo's synthetic data, with several seeds: the table in docs/benchmarks.md.

    python benchmarks/arms.py --out arms --seeds 0 1 2

For each seed it runs the demo's commands up to its tuned bundles in OUT/seed-S/demo (a finished `lavic demo` there is
used as it is), then `lavic evaluate` with every arm that needs no server, each list in several orders. Prints a table,
writes OUT/arms.json. Run the same line again after a stop.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lavic.launch.demo.command import catalogue_port
from lavic.launch.demo.stages import DemoSettings, stages
from lavic.mini.photo_server import PhotoServer

BESIDE = ("tune_retriever", "retrieve", "evaluate", "recommend")
"""Stages of the demo that nothing here needs."""
ARMS = (
    *("lavic", "shuffled", "blank", "noise", "words", "before_tuning", "base_titles", "words_before_tuning"),
    *("base_photos", "bm25", "popularity", "repeat_last", "list_order", "random"),
)


def lavic(*argv: str | Path) -> None:
    """Runs a command of lavic; says it."""
    words = [str(word) for word in argv]
    print(f"\n$ lavic {shlex.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", "lavic", *words], check=True)


def make_demo(demo: Path, seed: int, *, small: bool) -> None:
    """The demo's bundles: tuned with item tokens, and with titles alone."""
    photos = demo / "catalog" / "images"
    photos.mkdir(parents=True, exist_ok=True)
    with PhotoServer(photos, catalogue_port(demo / "catalog")) as server:
        for stage in stages(DemoSettings(out=demo, seed=seed, small=small), server.url):
            if stage.name not in BESIDE:
                lavic(*stage.argv)  # of the controls, which are tuned in parallel, the first: titles alone


def evaluate(folder: Path, seed: int, *, limit: int, orders: int, small: bool) -> dict[str, Any]:
    """The results of one seed, of its held-out items."""
    demo, out = folder / "demo", folder / "evaluation"
    catalog, runs = demo / "catalog", demo / "runs"
    if not all((runs / name / "bundle" / "bundle.json").is_file() for name in ("tune", "tune_text_only")):
        make_demo(demo, seed, small=small)
    if not (out / "results.json").is_file():
        lavic(
            *("evaluate", "--config", "evaluate-mini", "--bundle", runs / "tune" / "bundle", "--store", demo / "store"),
            *("--test", catalog / "test.jsonl", "--train", catalog / "train.jsonl", "--arms", *ARMS),
            *("--items", catalog / "item2meta_train.json", "--shards", demo / "shards" / "train"),
            *("--compare", f"text_only={runs / 'tune_text_only' / 'bundle'}", "--seed", str(seed)),
            *("--limit", str(limit), "--orders", str(orders), "--out", out),
        )
    results: dict[str, Any] = json.loads((out / "results.json").read_text("utf-8"))
    return results


def summarise(test_set: Mapping[str, Any]) -> dict[str, Any]:
    """What the table shows of one seed, from a test set in `results.json`."""
    order = test_set.get("order", {})
    return {
        "conversations": test_set["conversations"],
        "clusters": test_set["clusters"],
        "arms": {
            arm: {
                "hit_rate": metrics["hit_rate"],
                "ece": metrics.get("ece", {}).get("value"),
                **({key: order[arm][key] for key in ("spread", "same_first")} if arm in order else {}),
            }
            for arm, metrics in test_set["arms"].items()
        },
    }


def table(seeds: Mapping[int, Mapping[str, Any]]) -> str:
    """Markdown: a row for each arm; every seed's hit rate with its interval, and the mean with the spread of seeds."""
    heads = ["arm", *(f"seed {seed}" for seed in seeds), "mean ± sd", "ECE", "spread by order", "same first item"]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for arm in next(iter(seeds.values()))["arms"]:
        cells = [summary["arms"].get(arm) for summary in seeds.values()]  # a seed may lack an arm
        rows = [row for row in cells if row is not None]
        shown = [interval(row["hit_rate"]) if row else "" for row in cells]
        shown.append(_mean([row["hit_rate"]["value"] for row in rows], spread=True))
        shown.append(_mean([row["ece"] for row in rows]))
        shown.append(_mean([row.get("spread") for row in rows]))
        shown.append(_mean([row.get("same_first") for row in rows]))
        lines.append(f"| `{arm}` | {' | '.join(shown)} |")
    return "\n".join(lines)


def interval(value: Mapping[str, float]) -> str:
    """A number with the bounds of its interval."""
    return f"{short(value['value'])} [{short(value['low'])}, {short(value['high'])}]"


def _mean(values: Sequence[float | None], *, spread: bool = False) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    mean = short(statistics.mean(known))
    return f"{mean} ± {short(statistics.stdev(known))}" if spread and len(known) > 1 else mean


def short(value: float | None) -> str:
    """Three decimals, without a leading zero; nothing for None."""
    if value is None:
        return ""
    return f"{value:.3f}".removeprefix("0") if value < 1 else f"{value:.3f}"


def main(argv: Sequence[str] | None = None) -> int:
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("--out", type=Path, required=True)
    reader.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    reader.add_argument("--limit", type=int, default=120, help="conversations of each seed")
    reader.add_argument("--orders", type=int, default=3, help="orders in which each list is ranked")
    reader.add_argument("--small", action="store_true", help="a few steps of everything: its figures mean nothing")
    chosen = reader.parse_args(argv)
    seeds = {}
    for seed in chosen.seeds:
        folder = chosen.out / f"seed-{seed}"
        results = evaluate(folder, seed, limit=chosen.limit, orders=chosen.orders, small=chosen.small)
        (seeds[seed],) = (summarise(test_set) for test_set in results["sets"].values())
        (chosen.out / "arms.json").write_text(json.dumps(seeds, indent=2) + "\n", encoding="utf-8")
    print("\n" + table(seeds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
