"""What the settings beyond the released method bring, on the demo's synthetic data, with several seeds.

    python benchmarks/beyond.py --out beyond --seeds 0 1 2

For each seed it runs the demo's commands up to its tuned bundle in OUT/seed-S/demo, the baseline (without the demo's
controls), and then the same steps with one setting changed: stage 1 that also matches the teacher's probabilities,
stage 1 and 2 on the first 1, 2 or 5 tokens of an item, and stage 2 with lists that hold nothing fitting. Prints a
table, writes OUT/beyond.json. Run the same line again after a stop.
"""

from __future__ import annotations

import argparse
import json
import random
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

KEY = "candidates_st"
COUNTS = ("1", "2", "5")
BESIDE = ("tune_controls", "evaluate", "recommend")
"""Stages of the demo that nothing here needs."""


def lavic(*argv: str | Path) -> None:
    """Runs a command of lavic; says it."""
    words = [str(word) for word in argv]
    print(f"\n$ lavic {shlex.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", "lavic", *words], check=True)


def without_targets(source: Path, target: Path, seed: int) -> Path:
    """The lists of a file; in every second one a candidate of another list stands in the target's place."""
    rows = [json.loads(line) for line in source.read_text("utf-8").splitlines()]
    others = sorted({item for row in rows for item in row[KEY]})
    for number, row in enumerate(rows):
        choice = random.Random(f"{seed}/{number}")
        right = set(row["gt_items"])
        if number % 2:
            strangers = [item for item in others if item not in right and item not in row[KEY]]
            row[KEY] = [choice.choice(strangers) if item in right else item for item in row[KEY]]
    target.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return target


def run_seed(folder: Path, seed: int, *, small: bool) -> dict[str, float]:
    """All variants of one seed; what is there already is not done again.

    Returns:
        Name of a figure -> its value.
    """
    demo, runs = folder / "demo", folder / "runs"
    steps = ("--loop.steps", "6", "--loop.save-every", "3") if small else ()
    photos = demo / "catalog" / "images"
    photos.mkdir(parents=True, exist_ok=True)
    with PhotoServer(photos, catalogue_port(demo / "catalog")) as server:
        for stage in stages(DemoSettings(out=demo, seed=seed, small=small), server.url):
            if stage.name not in BESIDE:
                lavic(*stage.argv)
    catalog, shards = demo / "catalog", demo / "shards"
    own = ("--loop.seed", str(seed), "--nproc", "2", *steps)

    distil = ("distill", "--config", "distill-mini", "--shards", shards / "train", "--valid", shards / "valid", *own)
    lavic(*distil, "--teacher-top-k", "16", "--out", runs / "distill_teacher")
    lavic(*distil, "--nested", *COUNTS, "--out", runs / "distill_nested")
    for name in ("teacher", "nested"):
        made = ("--adapter", runs / f"distill_{name}", "--out", folder / f"store_{name}")
        lavic("embed", "--config", "embed-mini", "--shards", shards / "train", *made)

    rows = ("--train", catalog / "train.jsonl", "--valid", catalog / "valid.jsonl")
    tune = ("tune", "--config", "tune-mini", *rows, *own)
    stores = {"teacher": folder / "store_teacher", "nested": folder / "store_nested", "none": demo / "store"}
    lavic(*tune, "--store", stores["teacher"], "--out", runs / "tune_teacher")
    lavic(*tune, "--store", stores["nested"], "--tokens-per-item", *COUNTS, "--out", runs / "tune_nested")
    lavic(*tune, "--store", stores["none"], "--none-share", "0.3", "--out", runs / "tune_none")

    whole, half = catalog / "test.jsonl", folder / "half.jsonl"
    half = without_targets(whole, half, seed)
    plain = (demo / "runs" / "tune" / "bundle", demo / "store")
    found: dict[str, float] = {}

    def evaluate(name: str, bundle: Path, store: Path, count: str = "") -> dict[str, Any]:
        out = folder / "evaluation" / name
        if not (out / "results.json").is_file():
            words = (
                "--bundle",
                bundle,
                "--store",
                store,
                "--test",
                f"whole={whole}",
                f"half={half}",
                "--arms",
                "lavic",
            )
            lavic("evaluate", *words, "--out", out, *(["--tokens-per-item", count] if count else []))
        sets = json.loads((out / "results.json").read_text("utf-8"))["sets"]
        found[f"hit rate: {name}"] = sets["whole"]["arms"]["lavic"]["hit_rate"]["value"]
        return sets

    evaluate("as released", *plain)
    evaluate("teacher's top 16", runs / "tune_teacher" / "bundle", stores["teacher"])
    for count in reversed(COUNTS):
        evaluate(f"nested, {count} tokens", runs / "tune_nested" / "bundle", stores["nested"], count)
    for count in ("2", "1"):
        evaluate(f"as released, cut to {count} tokens", *plain, count)
    sets = evaluate("none of these", runs / "tune_none" / "bundle", stores["none"])
    for key, said in (
        ("said_none_without", "said of lists without a target"),
        ("said_none_with", "said of lists with one"),
        ("auc", "area under the curve"),
    ):
        found[f'"none of these": {said}'] = sets["half"]["none"]["lavic"][key]

    for name, captions in (("as released", demo / "runs/distill"), ("teacher's top 16", runs / "distill_teacher")):
        found[f"perplexity: {name}"] = _captions(captions)["cls_after"]["perplexity"]
    for count in reversed(COUNTS):
        perplexity = _captions(runs / "distill_nested")[f"cls_after_{count}"]["perplexity"]
        found[f"perplexity: nested, {count} tokens"] = perplexity
    return found


def _captions(run: Path) -> dict[str, dict[str, float]]:
    return json.loads((run / "captions.json").read_text("utf-8"))


def table(found: Mapping[int, Mapping[str, float]]) -> str:
    """A line for each figure: every seed, mean and standard deviation."""
    names = list(next(iter(found.values())))
    width = max(map(len, names))
    lines = [f"{'':<{width}}" + "".join(f"{f'seed {seed}':>10}" for seed in found) + f"{'mean':>10}{'sd':>8}"]
    for name in names:
        values = [found[seed][name] for seed in found]
        spread = f"{statistics.stdev(values):8.3f}" if len(values) > 1 else f"{'-':>8}"
        lines.append(
            f"{name:<{width}}"
            + "".join(f"{value:10.3f}" for value in values)
            + f"{statistics.mean(values):10.3f}{spread}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("--out", type=Path, required=True)
    reader.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    reader.add_argument("--small", action="store_true", help="a few steps of everything: its figures mean nothing")
    chosen = reader.parse_args(argv)
    found = {}
    for seed in chosen.seeds:
        found[seed] = run_seed(chosen.out / f"seed-{seed}", seed, small=chosen.small)
        (chosen.out / "beyond.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print("\n" + table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
