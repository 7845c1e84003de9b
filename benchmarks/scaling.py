"""The arithmetic of docs/scaling.md: from stated rates to its tables.

    python benchmarks/scaling.py            rewrite the tables of docs/scaling.md
    python benchmarks/scaling.py --check    fail where they are not what this file computes

A rate is measured (and says where), published (and says by whom) or assumed. Replace one by your own measurement here
and run it again; no figure in the document is written by hand.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import document
import memory

from lavic.config.yaml_file import YamlFile, find_config
from lavic.model.config import Kind, LoraSettings, ModelSettings
from lavic.model.dims import ModelDims
from lavic.model.hub import read_config
from lavic.model.tiling import VIEWS
from lavic.shards.crawl import PHOTO_BYTES, SIDECAR_BYTES
from lavic.train.deepspeed.config import Zero2Footprint
from lavic.train.measure.flops import FlopCosts
from lavic.train.measure.peak_flops import PEAK_FLOPS

HERE = Path(__file__).parent
MEMORY = json.loads(memory.RESULT.read_text("utf-8"))
DOCUMENT = HERE.parent / "docs" / "scaling.md"
ITEMS = (100_000, 1_000_000, 10_000_000, 48_000_000)
BASE = ModelDims.from_config(read_config(ModelSettings()))
KINDS: dict[str, Kind] = {"distill": "vision", "tune": "language"}
"""Training stage -> its adapter."""
RANK = LoraSettings().r


@dataclass(frozen=True)
class Rate:
    """A number that the tables start from."""

    value: float
    unit: str
    source: str


ANCHOR = (81_000, 4.5 * 3600, PEAK_FLOPS["RTX 4090"])
"""Samples, seconds and peak FLOP/s of a third-party run of the released stage 1, on an RTX 4090."""

RATES = {
    "photo": Rate(PHOTO_BYTES, "bytes of a photo", "assumed: 500 pixels on the long side (`image_size: large`)"),
    "beside": Rate(
        SIDECAR_BYTES, "bytes of a sample beside its photo", "measured on the synthetic catalogue: tar headers, json"
    ),
    "ledger": Rate(274, "bytes of a photo's row in the ledger", "measured on the synthetic catalogue"),
    "plan": Rate(1014, "bytes of a photo's row in the plan", "measured: five million photos, four an item"),
    "description": Rate(600, "bytes of a description", "assumed: 110 words"),
    "item": Rate(
        220, "bytes of an item in the store beside its tokens", "assumed: id, key, a title of 70 letters; the index"
    ),
    "index": Rate(
        round(memory.on_node(MEMORY, "photos"), 1),
        "bytes of a photo of a set in a node's memory",
        f"measured: {memory.RANKS} ranks with {memory.WORKERS} data workers each",
    ),
    "stored": Rate(
        round(memory.on_node(MEMORY, "store"), 1),
        "bytes of an item of a store in a node's memory",
        "measured: the same",
    ),
    "row": Rate(
        float(f"{memory.index_s(MEMORY):.1g}"), "seconds of a core to put an item into the indexes", "measured"
    ),
    "tries": Rate(1.03, "requests for each photo", "assumed: three of a hundred are asked for once more"),
    "cut": Rate(0.016, "seconds of a core to decode a photo and cut it", "measured: 500 x 500 pixels of noise"),
    "answer": Rate(0.15, "seconds of an answer", "assumed"),
    "disk": Rate(1.0e9, "bytes a second of a shared disk", "assumed"),
    "peak": Rate(PEAK_FLOPS["H100"], "FLOP/s of an H100", "published: NVIDIA, bfloat16, dense"),
    "train": Rate(
        0.30,
        "MFU, training",
        "assumed: below the .40 to .43 that NeMo Automodel publishes for LoRA on packed text",
    ),
    "infer": Rate(0.40, "MFU, reading (prefill, vision tower)", "assumed: what that training reaches"),
    "token": Rate(0.025, "seconds to write one token of a batch", "assumed: the weights alone take 0.0043 to read"),
    "words": Rate(110, "tokens of a description", "assumed"),
    "prompt": Rate(45, "tokens of title and prompt in stage 1", "assumed"),
    "talk": Rate(950, "tokens of a conversation and ten candidates", "published: a median of 880; and ten times five"),
    "talks": Rate(0.1, "conversations for each item", "assumed; the released data have fewer"),
}
"""What everything is computed from."""

LOOPS = {stage: YamlFile.read(find_config(f"{stage}-7b-8gpu")).values["loop"] for stage in ("distill", "tune")}
"""How the stages are trained, as in configs/."""
EPOCHS = int(LOOPS["distill"]["epochs"])
BATCH = {stage: loop["global_batch_size"] for stage, loop in LOOPS.items()}
"""Samples of a step."""
DESCRIBED_AT_ONCE = 8
SHARD = 5000
"""Photos of a shard, as in configs/crawl-amazon-2023.yaml."""
ENOUGH = 1_000_000
"""Photos that stage 1 is trained on at most, in the row that says so."""
HOST_RATES = (10, 50, 500)
GPUS = (8, 16, 64)
NETWORKS = {"400 Gb/s": 50e9, "100 Gb/s": 12.5e9, "25 Gb/s": 3.125e9}
"""Bytes a second of a GPU's share of the network; on Ethernet often one link for the whole node."""


def rate(name: str) -> float:
    """A rate's value."""
    return RATES[name].value


# -- Arithmetic -------------------------------------------------------------------------------------------------------


PLAIN = FlopCosts.of(BASE)
"""What it takes to read."""
STAGE_1 = FlopCosts.of(BASE, "vision", RANK)
STAGE_2 = FlopCosts.of(BASE, "language", RANK)


def see_flops() -> float:
    """Operations to see one photo: five views through the tower, forward."""
    return PLAIN.flops((), targets=0, views=VIEWS)


def describe_s() -> float:
    """Seconds of a GPU to describe one photo: reading all its tokens, then writing a batch word by word."""
    text = BASE.photo_tokens + rate("prompt")
    flops = PLAIN.flops((round(text),), targets=1, views=VIEWS, photo_tokens=BASE.photo_tokens)
    return flops / (rate("peak") * rate("infer")) + rate("words") * rate("token") / DESCRIBED_AT_ONCE


def embed_s() -> float:
    """Seconds of a GPU for one item's five tokens."""
    return see_flops() / (rate("peak") * rate("infer"))


def distill_flops() -> float:
    """Operations of one sample of stage 1, backward pass included."""
    words, text = round(rate("words")), round(rate("prompt") + VIEWS + rate("words"))
    return STAGE_1.flops((text,), targets=words, views=VIEWS, photo_tokens=VIEWS)


def distill_s() -> float:
    """Seconds of a GPU for one sample of stage 1."""
    return distill_flops() / (rate("peak") * rate("train"))


def tune_flops() -> float:
    """Operations of one sample of stage 2, backward pass included: the vision tower is not there."""
    return STAGE_2.flops((round(rate("talk")),), targets=5, photo_tokens=10 * VIEWS)


def tune_s() -> float:
    """Seconds of a GPU for one sample of stage 2."""
    return tune_flops() / (rate("peak") * rate("train"))


def zero2(stage: str, gpus: int) -> Zero2Footprint:
    """What a rank of a training stage holds, sends and saves."""
    kind = KINDS[stage]
    return Zero2Footprint.of(frozen=BASE.loaded(kind), trained=BASE.adapter(kind, RANK), ranks=gpus)


# -- Tables -----------------------------------------------------------------------------------------------------------


def rates_table() -> Iterator[Sequence[str]]:
    yield "rate", "", "where it is from"
    for entry in RATES.values():
        value = (
            f"{entry.value:g}"
            if entry.value < 1000
            else f"{entry.value:,.0f}"
            if entry.value < 1e6
            else f"{entry.value:.3g}"
        )
        yield value, entry.unit, entry.source


def derived_table() -> Iterator[Sequence[str]]:
    see, both = VIEWS * STAGE_1.view, distill_flops()
    written = f"{rate('words'):g} written, {DESCRIBED_AT_ONCE} photos at once"
    yield "one H100", "a second", "why"
    yield "`describe`", f"{1 / describe_s():.1f} photos", f"{BASE.photo_tokens:,} tokens read, {written}"
    yield "`distill`", f"{1 / distill_s():.0f} photos", f"{tera(see)} to see, {tera(both - see)} to read"
    cores = rate("cut") / embed_s()
    yield "`embed`", f"{1 / embed_s():.0f} items", f"{tera(see_flops())}; {cores:.1f} cores decode for it"
    yield "`tune`", f"{1 / tune_s():.0f} conversations", tera(tune_flops())
    samples, seconds, peak = ANCHOR
    share = samples * both / seconds / peak
    yield "an RTX 4090 (published)", f"{samples / seconds:.0f} photos", f"the released stage 1: {share:.0%} MFU"


def growth_table() -> Iterator[Sequence[str]]:
    rows: list[tuple[str, Callable[[int], str]]] = [
        ("requests", lambda n: count(n * rate("tries"))),
        *((f"politeness: {r} a second to one host", lambda n, r=r: span(n * rate("tries") / r)) for r in HOST_RATES),
        (f"shards of {SHARD:,}", lambda n: f"{math.ceil(n / SHARD):,}"),
        ("shards, bytes", lambda n: size(n * (rate("photo") + rate("beside")))),
        ("ledgers and indices", lambda n: size(n * (rate("ledger") + 8))),
        ("plan", lambda n: size(n * rate("plan"))),
        ("descriptions", lambda n: size(n * rate("description"))),
        ("item store, float16", lambda n: size(BASE.store_bytes(n) + n * rate("item"))),
        ("`verify`, from the disk", lambda n: span(n * (rate("photo") + rate("beside")) / rate("disk"))),
        ("`describe`, H100 hours", lambda n: hours(n * describe_s())),
        (f"`distill` on all, {EPOCHS} epochs, H100 hours", lambda n: hours(n * EPOCHS * distill_s())),
        (f"`distill` on {count(ENOUGH)} at most", lambda n: hours(min(n, ENOUGH) * EPOCHS * distill_s())),
        ("`embed`, H100 hours", lambda n: hours(n * embed_s())),
        ("`embed`, core hours to decode", lambda n: hours(n * rate("cut"))),
        ("`tune`, conversations", lambda n: count(n * rate("talks"))),
        ("`tune`, H100 hours", lambda n: hours(n * rate("talks") * tune_s())),
    ]  # fmt: skip
    yield "items, one photo each", *(count(n) for n in ITEMS)
    for name, value in rows:
        yield name, *(value(n) for n in ITEMS)


def traffic_table() -> Iterator[Sequence[str]]:
    yield "stage, GPUs", "sent by each, a step", *NETWORKS, "computing", "share at 25 Gb/s"
    for stage, seconds in (("distill", distill_s()), ("tune", tune_s())):
        for gpus in GPUS:
            if gpus > BATCH[stage]:
                continue
            bytes_sent = zero2(stage, gpus).traffic
            compute = BATCH[stage] / gpus * seconds
            times = [bytes_sent / speed for speed in NETWORKS.values()]
            worst = times[-1] / (times[-1] + compute)
            transfer_times = (f"{1000 * t:.2g} ms" for t in times)
            yield f"{stage}, {gpus}", size(bytes_sent), *transfer_times, f"{1000 * compute:.0f} ms", f"{worst:.0%}"


def memory_table() -> Iterator[Sequence[str]]:
    yield "stage, GPUs", "trained", "weights", "gradients", "optimizer", "a checkpoint"
    for stage in KINDS:
        for gpus in (1, 8):
            zero = zero2(stage, gpus)
            parts = (size(part) for part in (zero.weights, zero.gradients, zero.optimizer, zero.checkpoint))
            yield f"{stage}, {gpus}", f"{BASE.adapter(KINDS[stage], RANK) / 1e6:.1f} M", *parts


def limits_table() -> Iterator[Sequence[str]]:
    shards = [f"{math.ceil(n / SHARD):,}" for n in ITEMS]
    flight = HOST_RATES[1] * rate("answer")
    indexes, stored = ([size(n * rate(name)) for n in ITEMS] for name in ("index", "stored"))
    build_times = [span(n * (rate("ledger") / rate("disk") + rate("row"))) for n in ITEMS]
    yield "", *(count(n) for n in ITEMS), "what stops it"
    yield "`crawl`: requests in flight", *([f"{flight:.0f}"] * len(ITEMS)), f"{HOST_RATES[1]} a second to the one host"
    yield "`describe`, `embed`: ranks", *shards, "a rank takes whole shards"
    yield "`distill`: ranks", *([str(BATCH["distill"])] * len(ITEMS)), "each takes a sample of the batch"
    yield "`tune`: ranks", *([str(BATCH["tune"])] * len(ITEMS)), "each takes a sample of the batch"
    yield "`distill`, `embed`: indexes in a node's memory", *indexes, "all its processes share them"
    yield "`tune`, `evaluate`: indexes in a node's memory", *stored, "all its processes share them"
    yield "making them, once on a node", *build_times, "one process reads the shards' ledgers"


def simulation_table() -> Iterator[Sequence[str]]:
    yield "simulated crawl", "photos a second", "last idle", "nodes lost", "fetched twice"
    for row in json.loads((HERE / "crawl_simulation.json").read_text()):
        yield row["case"], f"{row['rate']:.0f}", span(row["idle_s"]), str(row["lost"]), f"{row['wasted']:.1%}"


def check_table() -> Iterator[Sequence[str]]:
    yield "small crawl", "simulated", "real", "off", "requests, simulated", "real"
    for row in json.loads((HERE / "crawl_check.json").read_text()):
        off = row["simulated_s"] / row["real_s"] - 1
        requests = (str(row["simulated_requests"]), str(row["real_requests"]))
        yield row["case"], f"{row['simulated_s']:.1f} s", f"{row['real_s']:.1f} s", f"{off:+.1%}", *requests


TABLES: dict[str, Callable[[], Iterator[Sequence[str]]]] = {
    "rates": rates_table,
    "derived": derived_table,
    "growth": growth_table,
    "traffic": traffic_table,
    "memory": memory_table,
    "limits": limits_table,
    "simulation": simulation_table,
    "check": check_table,
}

# -- Text -------------------------------------------------------------------------------------------------------------


def count(number: float) -> str:
    """A number of things, short."""
    for unit, name in ((1e6, " M"), (1e3, " k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:.0f}"


def size(number: float) -> str:
    """Bytes, short."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number:.0f} B"


def tera(number: float) -> str:
    """FLOPs, short."""
    return f"{number / 1e12:.1f} TFLOP"


def span(seconds: float) -> str:
    """A time, short."""
    for unit, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds:.0f} s"


def hours(seconds: float) -> str:
    """Hours of something."""
    number = seconds / 3600
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def main(argv: Sequence[str]) -> int:
    """Writes or checks the document; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail where the tables differ")
    chosen = parser.parse_args(argv)
    tables = {name: table() for name, table in TABLES.items()}
    hint = f"what {Path(__file__).name} computes; run it without --check"
    return document.update(DOCUMENT, tables, check=chosen.check, hint=hint)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
