"""Training speed of the 7B model on a GPU: both stages and `embed`, against the plain loop, in one run.

    python benchmarks/gpu.py --json figures.json              # one GPU of 80 GB; two minutes and 100 GB of nothing else
    python benchmarks/gpu.py --small                          # a small model on whatever is there: does it run?
    torchrun --nproc-per-node 8 benchmarks/gpu.py --only stage1 stage2 --no-plain

LLaVA-v1.6-Mistral-7B's sizes with random weights in bfloat16; token ids, photos and item tokens are synthetic. Nothing
is downloaded, and torch, transformers, peft and deepspeed with what they bring are enough; without Pillow photos are
prepared by torch instead, in both loops. Prompts have LaViC's lengths: 400 to 2,048 tokens, half of them under 900, ten
candidates of five tokens, ten target tokens; descriptions have 120 tokens on average.

Utilisation (`mfu`) is the model's own arithmetic without padding and recomputation over the GPU's peak, see
lavic/train/measure/flops.py. The targets, on one H100: stage 2 at 45 %, stage 1 at 40 %, stage 2 at five times the
plain loop.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# the repository need not be installed where this runs
# ruff: noqa: E402
sys.path[:0] = [str(Path(__file__).parents[1])]

import torch
from gpu_photos import pillow
from gpu_stages import Bench

from lavic.distributed.context import DistributedContext

PARTS = ("stage2", "stage1", "embed")
BARS = {"stage2_mfu": 0.45, "stage1_mfu": 0.40, "stage2_ratio": 5.0}


def read_words() -> argparse.Namespace:
    """What is asked for; what is left open depends on the model's size."""
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("--json", type=Path, help="write the figures here")
    reader.add_argument("--small", action="store_true", help="a small model and short texts, on a CPU too")
    reader.add_argument("--only", choices=PARTS, nargs="+", default=PARTS)
    reader.add_argument("--batch", type=int, help="samples of a step, per rank")
    reader.add_argument("--micro-batch", type=int, default=8, help="most photos of a forward pass, stage 1")
    reader.add_argument("--micro-tokens", type=int, nargs=2, help="budget of stage 1 and of stage 2")
    reader.add_argument("--plain-micro-batch", type=int, default=2, help="samples of the plain loop's forward pass")
    reader.add_argument("--activation-checkpointing", action="store_true")
    reader.add_argument("--compile", action="store_true")
    reader.add_argument("--no-plain", action="store_true", help="leave the plain loop out")
    reader.add_argument("--warm", type=int, default=2, help="steps that do not count")
    reader.add_argument("--steps", type=int)
    reader.add_argument("--plain-steps", type=int)
    reader.add_argument("--workers", type=int, default=max(1, min(12, len(os.sched_getaffinity(0)) - 2)))
    reader.add_argument("--embed-batch", type=int)
    reader.add_argument("--embed-batches", type=int)
    chosen = reader.parse_args()
    for name, small, real in (
        ("batch", 4, 32),
        ("micro_tokens", [512, 1024], [2800, 6144]),
        ("steps", 2, 20),
        ("plain_steps", 1, 3),
        ("embed_batch", 4, 64),
        ("embed_batches", 2, 20),
    ):
        if getattr(chosen, name) is None:
            setattr(chosen, name, small if chosen.small else real)
    if not chosen.small and not torch.cuda.is_available():
        reader.error("no GPU here: --small runs a small model on the CPU")
    return chosen


def main() -> int:
    chosen = read_words()
    world = DistributedContext.from_env()
    world.init_process_group()
    bench = Bench(chosen, world)
    figures: dict[str, Any] = {
        "device": torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else "CPU",
        "ranks": world.size,
        "torch": torch.__version__,
        "small": chosen.small,
        "peak_flop_per_s": bench.peak,
        "photos_by": "Pillow" if pillow() else "torch",
        "settings": {key: str(value) for key, value in vars(chosen).items()},
    }
    for part in chosen.only:
        figures[part] = bench.embed() if part == "embed" else bench.stage(int(part[-1]))
        gc.collect()  # engine and model hold each other
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
        if world.is_main:
            print(part, json.dumps(figures[part]), file=sys.stderr, flush=True)
    figures |= judged(figures)
    if world.is_main:
        text = json.dumps(figures, indent=2)
        print(text)
        if chosen.json:
            chosen.json.write_text(text + "\n")
    world.destroy_process_group()
    return 0


def judged(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The figures that count, and of the real model whether they reach the targets."""
    found: dict[str, Any] = {}
    for number in (1, 2):
        stage = figures.get(f"stage{number}", {})
        found[f"stage{number}_mfu"] = stage.get("ours", {}).get("mfu")
        found[f"stage{number}_ratio"] = stage.get("ratio")
    if not figures["small"]:
        found["bars"] = {name: {"wanted": bar, "met": (found[name] or 0) >= bar} for name, bar in BARS.items()}
    return found


if __name__ == "__main__":
    # loader workers and DeepSpeed's threads are not waited for
    code = main()
    sys.stdout.flush()
    os._exit(code)
