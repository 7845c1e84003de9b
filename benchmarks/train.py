"""Training speed on CPU cores: our loop against the plain one, and two ranks against one.

    python benchmarks/train.py --json figures.json

The miniature LLaVA-NeXT at LaViC's geometry: ten candidates, five views of each photo, photos of 500 x 500 pixels as
Amazon's "large" ones. Both loops get the same samples, batch and first weights; the first step's losses are compared.

* stage 2: from the item store, against the vision tower in the loop and photos prepared in the main process;
* stage 1: photos prepared by a loader worker, against the main process, and the head on target positions alone;
* two ranks against one, each on a core of its own with the same work: samples/s of two over twice that of one.

Rounds take turns, and every figure is a median over rounds. Torch computes on one core and on all, and each loop counts
with what suits it better; ours has a loader worker besides. The machine should do nothing else.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from plain import Plain, stock_cut

from lavic.data.conversations import read_conversations
from lavic.data.manifest import Manifest, shard_name
from lavic.data.shard_dataset import ShardDataset
from lavic.data.tar_shards import Sample
from lavic.data.tar_writer import ShardWriter
from lavic.distributed.context import DistributedContext
from lavic.mini.catalog import Product, conversation_row, make_products
from lavic.mini.drawing import COLOURS, KINDS, PATTERNS, draw
from lavic.model.config import LoraSettings, ModelSettings
from lavic.model.item_store import ItemStore
from lavic.model.loading import Backbone
from lavic.model.lora import add_adapter
from lavic.model.tiling import VIEWS
from lavic.train.activation_checkpointing import configure_layers
from lavic.train.config import LoopSettings
from lavic.train.deepspeed.engine import Engine
from lavic.train.distillation.dataset import DistillDataset
from lavic.train.distillation.task import DistillTask
from lavic.train.input.data_loader import TrainDataLoader
from lavic.train.input.shuffle_order import ShuffleOrder
from lavic.train.measure.flops import make_flops_counter
from lavic.train.measure.throughput import ThroughputMeter
from lavic.train.recommendation.dataset import TuneDataset
from lavic.train.recommendation.task import TuneTask
from lavic.train.train_step import train_step

SIDE = 500
KEY = "candidates_st"
LORA = LoraSettings(r=8, alpha=32, dropout=0.0)
MODEL = ModelSettings(name="mini")
LR = 1e-3


def make_inputs(folder: Path, items: int, rows: int) -> None:
    """Photos in shards, described; conversations; an item store."""
    from lavic.cli import main

    rng = random.Random(0)
    looks = [(kind, colour, pattern) for kind in KINDS for colour in COLOURS for pattern in PATTERNS]
    products = make_products(items, rng, looks)
    (folder / "photos").mkdir()
    path = folder / "photos" / shard_name("photos", "train", 0)
    with ShardWriter(path) as shard:
        for product in products:
            shard.add(photo(product))
    entry = shard.entry
    Manifest(folder=folder / "photos", set="photos", split="train", shards=(entry,)).save()
    lines = (json.dumps(conversation_row(rng.choice(products), products, rng)) for _ in range(rows))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    words = ["embed", "--model.name", "mini", "--shards", str(folder / "photos"), "--out", str(folder / "store")]
    if main([*words, "--precision", "float32"]):
        raise SystemExit("no item store was made")


def photo(product: Product) -> Sample:
    """A synthetic product photo at the size of a shop's photo."""
    file = io.BytesIO()
    draw(*product.look, product.seed).resize((SIDE, SIDE)).save(file, "JPEG", quality=90)
    return Sample.of(
        item_id=product.id,
        n=0,
        jpg=file.getvalue(),
        title=product.title,
        width=SIDE,
        height=SIDE,
        text=product.description,
    )


class Ours:
    """Our loop, without validations and checkpoints."""

    def __init__(self, stage: int, folder: Path, loop: LoopSettings, world: DistributedContext) -> None:
        self.world, self.loop = world, loop
        self.backbone = Backbone.load(MODEL, vision=stage == 1)
        self.data = training_set(stage, folder, self.backbone)
        torch.manual_seed(0)
        model = add_adapter(self.backbone, "vision" if stage == 1 else "language", LORA)
        configure_layers(model, loop)
        self.engine = Engine(DistillTask(model) if stage == 1 else TuneTask(model), world, loop)
        self.engine.task.train()  # only then are activations recomputed
        self.feed = TrainDataLoader(self.data, world, loop)
        self.losses: list[float] = []

    def round(self, first: int, last: int) -> dict[str, float]:
        """Steps `first` to `last`; the start of the loader's workers is part of it."""
        with ThroughputMeter(
            self.engine.task, self.world, flops=make_flops_counter(self.engine.task), peak=1.0
        ) as meter:
            batches = self.feed.steps(first, last)
            for step in range(first, last):
                done = train_step(self.engine, meter.wait(batches), LR, self.world, seed=(step,))
                self.losses.append(done.loss)
            figures = meter.read()
        figures["gflop_per_s"] = figures.pop("mfu") / 1e9
        return figures


class Released:
    """The plain loop on the same samples."""

    def __init__(self, stage: int, folder: Path, loop: LoopSettings) -> None:
        self.stage, self.loop = stage, loop
        self.backbone = Backbone.load(MODEL)
        self.data = training_set(stage, folder, self.backbone)
        self.photos = ShardDataset(folder / "photos")
        self.place = {self.photos[i].item_id: i for i in range(len(self.photos))}
        torch.manual_seed(0)
        model = add_adapter(self.backbone, "vision" if stage == 1 else "language", LORA)
        geometry = self.backbone.geometry
        cut = stock_cut(geometry.size, geometry.mean, geometry.std, self.backbone.model.config.image_grid_pinpoints)
        self.loop_ = Plain(model, cut, lr=LR, pad=self.backbone.encoder.pad)
        self.losses: list[float] = []

    def round(self, first: int, last: int) -> dict[str, float]:
        """Steps `first` to `last`."""
        start = time.perf_counter()
        micro_batch, _ = self.loop.split_batch(1)
        for step in range(first, last):
            batch = [
                self.sample(p)
                for p in range(step * self.loop.global_batch_size, (step + 1) * self.loop.global_batch_size)
            ]
            self.losses.append(self.loop_.step(batch, micro_batch).item())
        return {"samples_per_s": (last - first) * self.loop.global_batch_size / (time.perf_counter() - start)}

    def sample(self, position: int) -> tuple[list[int], list[int], list[bytes]]:
        """Ids, labels and the photos as they lie on the disk; nothing that the plain loop does not need is made."""
        data = self.data
        if self.stage == 1:
            photo = self.photos[data._index(position)]
            example = data._example(photo.title, photo.text, VIEWS)
            return example.input_ids, example.labels, [photo.jpg]
        found = data._draw(position)
        example = data._example(*found)
        return example.input_ids, example.labels, [self.photos[self.place[item]].jpg for item in found[2]]


def training_set(stage: int, folder: Path, backbone: Backbone) -> DistillDataset | TuneDataset:
    if stage == 1:
        photos = ShardDataset(folder / "photos")
        order = ShuffleOrder(len(photos), 0)
        return DistillDataset(photos, backbone.geometry, backbone.encoder, max_length=128, order=order)
    rows = read_conversations(folder / "rows.jsonl")
    store = ItemStore.open(folder / "store")
    data = TuneDataset(rows, store, backbone.encoder, candidates=KEY, max_length=1000, shuffle=True)
    data.order = ShuffleOrder(len(data), 0)
    return data


def compare(stage: int, folder: Path, chosen: argparse.Namespace) -> dict[str, object]:
    """Rounds of ours and of the plain loop, taking turns."""
    ours = Ours(stage, folder, loop_settings(chosen, chosen.workers), DistributedContext())
    plain = Released(stage, folder, loop_settings(chosen, 0))
    ours.round(0, 1), plain.round(0, 1)
    if abs(ours.losses[0] - plain.losses[0]) > 1e-4 * plain.losses[0]:
        raise SystemExit(f"stage {stage}: the loops differ, first losses {ours.losses[0]} and {plain.losses[0]}")
    turns = [
        (name, loop, steps, threads)
        for threads in chosen.threads
        for name, loop, steps in (("ours", ours, chosen.steps * chosen.faster), ("plain", plain, chosen.steps))
    ]
    rounds: dict[str, dict[int, list[dict[str, float]]]] = {
        name: {threads: [] for threads in chosen.threads} for name in ("ours", "plain")
    }
    step = 1
    for number in range(chosen.rounds):
        for name, loop, steps, threads in turns if number % 2 == 0 else reversed(turns):
            torch.set_num_threads(threads)
            rounds[name][threads].append(loop.round(step, step + steps))
        step += chosen.steps * chosen.faster
    medians = {
        name: {t: {key: median(rows, key) for key in rows[0]} for t, rows in by_threads.items()}
        for name, by_threads in rounds.items()
    }
    # each loop with the number of threads that suits it
    best = {name: max(rows.values(), key=lambda row: row["samples_per_s"]) for name, rows in medians.items()}
    return {
        "ratio": best["ours"]["samples_per_s"] / best["plain"]["samples_per_s"],
        "by_threads": medians,
        "rounds": {
            name: {t: [row["samples_per_s"] for row in rows] for t, rows in by_threads.items()}
            for name, by_threads in rounds.items()
        },
        "first_loss": {"ours": ours.losses[0], "plain": plain.losses[0]},
    }


def scale(folder: Path, chosen: argparse.Namespace) -> dict[str, object]:
    """Stage 2 on one core and on two, a rank on each, with the same samples per rank."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        return {"efficiency": None, "why": "this machine shows one core"}
    rates: dict[int, list[float]] = {1: [], 2: []}
    for number in range(chosen.rounds):
        for ranks in (1, 2) if number % 2 == 0 else (2, 1):
            rates[ranks].append(run_ranks(folder, chosen, cores[:ranks]))
    middle = {ranks: statistics.median(values) for ranks, values in rates.items()}
    return {"efficiency": middle[2] / (2 * middle[1]), "one_rank": rates[1], "two_ranks": rates[2]}


def run_ranks(folder: Path, chosen: argparse.Namespace, cores: list[int]) -> float:
    """Samples per second of as many processes as cores."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [sys.executable, __file__, "--rank-of", str(folder), "--batch", str(chosen.batch)]
    words += ["--micro-batch", str(chosen.micro_batch), "--steps", str(chosen.steps * chosen.faster)]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", "LAVIC_DEVICE": "cpu"}
    common |= {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(len(cores)), "LOCAL_WORLD_SIZE": str(len(cores))}
    processes = []
    for rank, core in enumerate(cores):
        env = {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank), "LAVIC_CORE": str(core)}
        processes.append(subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True))
    said = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f"{len(cores)} ranks failed")
    return float(json.loads(said[0].splitlines()[-1]))


def one_rank(folder: Path, chosen: argparse.Namespace) -> None:
    """What each of those processes does; rank 0 tells the rate."""
    os.sched_setaffinity(0, {int(os.environ["LAVIC_CORE"])})
    torch.set_num_threads(1)
    world = DistributedContext.from_env()
    world.init_process_group()
    chosen.batch *= world.size
    ours = Ours(2, folder, loop_settings(chosen, 0), world)
    ours.round(0, 2)
    rate = ours.round(2, 2 + chosen.steps)["samples_per_s"]
    if world.is_main:
        print(json.dumps(rate), flush=True)
    ours.engine.close()
    world.destroy_process_group()


def loop_settings(chosen: argparse.Namespace, workers: int) -> LoopSettings:
    return LoopSettings(
        global_batch_size=chosen.batch,
        micro_batch=chosen.micro_batch,
        activation_checkpointing=chosen.activation_checkpointing,
        compile=chosen.compile,
        lr=LR,
        schedule="constant",
        warmup=0.0,
        num_workers=workers,
    )


def median(rows: list[dict[str, float]], key: str) -> float:
    return statistics.median(row[key] for row in rows)


def machine() -> dict[str, object]:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": names[0].partition(": ")[2] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
    }


def main() -> int:
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("--json", type=Path, help="write the figures here")
    reader.add_argument("--rounds", type=int, default=5)
    reader.add_argument("--steps", type=int, default=8, help="of the plain loop in a round")
    reader.add_argument("--faster", type=int, default=4, help="steps of ours for each of the plain loop's")
    reader.add_argument("--batch", type=int, default=32)
    reader.add_argument("--micro-batch", type=int, default=8)
    reader.add_argument("--workers", type=int, default=1, help="loader workers of our loop")
    cores = len(os.sched_getaffinity(0))
    reader.add_argument("--threads", type=int, nargs="+", default=sorted({1, cores}), help="of torch; each loop's best")
    reader.add_argument("--activation-checkpointing", action="store_true", help="of our loop")
    reader.add_argument("--compile", action="store_true", help="our loop's layers")
    reader.add_argument("--items", type=int, default=600)
    reader.add_argument("--only", choices=["stage1", "stage2", "ranks"], nargs="+")
    reader.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    chosen = reader.parse_args()
    os.environ["LAVIC_DEVICE"] = "cpu"
    if chosen.rank_of:
        one_rank(chosen.rank_of, chosen)
        return 0
    wanted = chosen.only or ["stage1", "stage2", "ranks"]
    figures: dict[str, object] = {"machine": machine(), "settings": {k: str(v) for k, v in vars(chosen).items()}}
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        make_inputs(folder, chosen.items, 4 * chosen.batch)
        world = DistributedContext()
        world.init_process_group()
        for stage in (2, 1):
            if f"stage{stage}" in wanted:
                figures[f"stage{stage}"] = found = compare(stage, folder, chosen)
                figures[f"stage{stage}_ratio"] = found["ratio"]
        world.destroy_process_group()
        if "ranks" in wanted:
            figures["two_ranks"] = found = scale(folder, chosen)
            figures["two_rank_efficiency"] = found["efficiency"]
    text = json.dumps(figures, indent=2)
    print(text)
    if chosen.json:
        chosen.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    # DeepSpeed leaves threads behind that a plain exit would wait for
    code = main()
    sys.stdout.flush()
    os._exit(code)
