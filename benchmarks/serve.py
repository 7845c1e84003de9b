"""How fast is the recommender, as an object and over HTTP?

    lavic demo --out demo
    python benchmarks/serve.py demo --json serve.json

On the demo's bundle, store and test conversations:

  one      one request against the released way: the vision tower over 50 views, then greedy generation
  batch    the object with batches of 64 against one request at a time
  groups   lists of 30 candidates in one prompt and in groups of ten, and of 100: time, hit rate, MRR
  http     clients that ask one after the other over HTTP, 1, 8 and 64 of them: answers/s, p50, p99
  ray      the same on Ray Serve
  overload four times the requests that the server can answer, for two minutes: statuses, latest answer, memory

Bars: one >= 8x, batch >= 2x, overload: 200, 429 and 503 alone, no answer after the deadline, memory flat.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from http_load import closed_loop, open_loop
from plain import stock_cut

from lavic.data.conversations import read_conversations
from lavic.data.schema import Conversation
from lavic.data.shard_dataset import ShardDataset
from lavic.model.bundle import Bundle
from lavic.model.item_store import ItemStore
from lavic.model.visual_tokens import cls_tokens, project
from lavic.recommend.ranking.ranker import Ranker
from lavic.recommend.ranking.request import Request
from lavic.recommend.recommendation import Query
from lavic.recommend.recommender import Recommender

KEY = "candidates_st"
LONG, LONGER = 30, 100
"""Candidates: as many as fit into one prompt of the miniature, and more."""
NEW_TOKENS = 10
"""Of a generated answer, as in the released script."""
PARTS = ("one", "batch", "groups", "http", "ray", "overload")


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class Demo:
    """What a demo left: bundle, store, shards, test conversations."""

    def __init__(self, folder: Path) -> None:
        self.bundle, self.store = folder / "runs" / "tune" / "bundle", folder / "store"
        self.shards = folder / "shards" / "train"
        self.conversations = read_conversations(folder / "catalog" / "test.jsonl", candidates=KEY)
        self.recommender = Recommender.load(self.bundle, self.store)

    def queries(self, count: int) -> list[Query]:
        rows = [self.conversations[number % len(self.conversations)] for number in range(count)]
        return [Query(conversation=row, candidates=row.candidates[KEY]) for row in rows]


class ReleasedWay:
    """What the released script does for a request.

    Each photo is prepared by the stock processor, each of its views goes through the vision tower, each vector is put
    into the prompt by a write of its own, and the answer is generated greedily.
    """

    def __init__(self, demo: Demo) -> None:
        self.bundle = Bundle.load(demo.bundle, vision=True)
        self.store = ItemStore.open(demo.store)
        self.ranker = Ranker(self.bundle, self.store)
        geometry = self.bundle.backbone.geometry
        pinpoints = [[2 * geometry.size, 2 * geometry.size]]
        self.cut = stock_cut(geometry.size, geometry.mean, geometry.std, pinpoints)
        data = ShardDataset(demo.shards, descriptions=None)
        self.jpgs: dict[str, bytes] = {}
        for item in {item for row in demo.conversations for item in row.candidates[KEY]}:
            self.jpgs[item] = data[data.index.find_stored(self.store.key(item))].jpg

    @torch.inference_mode()
    def answer(self, row: Conversation) -> str:
        backbone = self.bundle.backbone
        items = row.candidates[KEY]
        views = torch.cat([self.cut(self.jpgs[item]) for item in items])
        tokens = project(backbone.model, torch.cat([cls_tokens(backbone.model, view[None]) for view in views]))
        ids = torch.tensor([self.ranker.encode(Request(conversation=row, candidates=items)).prompt])
        embeds = backbone.model.get_input_embeddings()(ids)
        positions = (ids[0] == backbone.encoder.image_token_id).nonzero()[:, 0]
        for number in range(len(positions)):
            embeds[0, positions[number].item()] = tokens[number]
        output = backbone.model.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=backbone.encoder.pad,
            eos_token_id=backbone.encoder.eos,
        )
        return str(backbone.tokenizer.decode(output[0], skip_special_tokens=True))


def one(demo: Demo) -> dict[str, Any]:
    released = ReleasedWay(demo)
    times: dict[str, list[float]] = {"released": [], "lavic": []}
    for number, row in enumerate(demo.conversations[:40]):
        released_s = seconds(lambda row=row: released.answer(row))
        ours_s = seconds(lambda row=row: demo.recommender.recommend(row, row.candidates[KEY]))
        if number >= 5:  # the first ones warm up
            times["released"].append(released_s)
            times["lavic"].append(ours_s)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {"seconds": medians, "ratio": medians["released"] / medians["lavic"]}


def batch(demo: Demo) -> dict[str, Any]:
    queries = demo.queries(256)
    demo.recommender.recommend_batch(queries[:64])
    alone, together = [], []
    for start in range(0, 256, 64):
        part = queries[start : start + 64]
        alone.append(seconds(lambda part=part: [demo.recommender.recommend_batch([query]) for query in part]) / 64)
        together.append(seconds(lambda part=part: demo.recommender.recommend_batch(part)) / 64)
    figures = {"one_at_a_time": statistics.median(alone), "batches_of_64": statistics.median(together)}
    return {"seconds_a_request": figures, "ratio": figures["one_at_a_time"] / figures["batches_of_64"]}


def long_lists(demo: Demo, count: int, size: int) -> tuple[list[Query], list[str]]:
    """Lists with the target among others of the catalogue, in a random order; and the targets."""
    rng, all_ids = random.Random(0), list(demo.recommender.store.ids)
    queries, targets = [], []
    for row in demo.conversations[:count]:
        (target, *_) = row.targets
        distractors = [item for item in rng.sample(all_ids, size + 5) if item not in row.targets][: size - 1]
        candidates = [target, *distractors]
        rng.shuffle(candidates)
        queries.append(Query(conversation=row, candidates=candidates, k=size))
        targets.append(target)
    return queries, targets


def groups(demo: Demo, count: int) -> dict[str, Any]:
    result = {}
    settings = (("30 in one prompt", LONG, LONG), ("30 in groups of 10", LONG, 10), ("100 in groups of 10", LONGER, 10))
    for name, length, size in settings:
        queries, targets = long_lists(demo, count, length)
        recommender = Recommender(demo.recommender.ranker, list_size=size)
        answers: list[Any] = []
        seconds_taken = seconds(lambda r=recommender, a=answers, q=queries: a.extend(r.recommend_batch(q)))
        ranks = [[item.id for item in a].index(target) + 1 for a, target in zip(answers, targets, strict=True)]
        result[name] = {
            "seconds_a_request": seconds_taken / len(queries),
            "hit_rate": sum(rank == 1 for rank in ranks) / len(ranks),
            "hit_rate_at_10": sum(rank <= 10 for rank in ranks) / len(ranks),
            "mrr": statistics.fmean(1 / rank for rank in ranks),
        }
    return {"requests": count, **result}


@contextmanager
def server(demo: Demo, *args: object) -> Iterator[tuple[int, psutil.Process]]:
    command = [sys.executable, "-m", "lavic", "serve", "--bundle", demo.bundle, "--store", demo.store, "--port", 0]
    env = {**os.environ, "RAY_ADDRESS": "", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(list(map(str, [*command, *args])), stdout=subprocess.PIPE, text=True, env=env)
    try:
        assert process.stdout is not None
        port = next(
            int(match[1]) for line in process.stdout if (match := re.search(r"serving on http://.*:(\d+)", line))
        )
        yield port, psutil.Process(process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)


def bodies(demo: Demo) -> list[bytes]:
    return [
        json.dumps({"conversation": row.turns[0].text, "candidates": list(row.candidates[KEY])}).encode()
        for row in demo.conversations
    ]


def http(demo: Demo, duration: float, *args: object) -> dict[str, Any]:
    with server(demo, *args) as (port, _):
        asyncio.run(closed_loop(port, bodies(demo), 8, 2))  # warm
        return {str(n): asyncio.run(closed_loop(port, bodies(demo), n, duration)) for n in (1, 8, 64)}


def overload(demo: Demo, duration: float, deadline: float = 2.0) -> dict[str, Any]:
    with server(demo, "--deadline", deadline, "--queue", 512) as (port, process):
        asyncio.run(closed_loop(port, bodies(demo), 64, 3))
        capacity = asyncio.run(closed_loop(port, bodies(demo), 64, 5))["answers_s"]
        asyncio.run(open_loop(port, bodies(demo), 4 * capacity, duration / 8))
        rss_before = process.memory_info().rss
        result = asyncio.run(open_loop(port, bodies(demo), 4 * capacity, duration))
        rss_after = process.memory_info().rss
        afterwards = asyncio.run(closed_loop(port, bodies(demo), 8, 3))
    return {
        "capacity_s": capacity,
        "deadline_s": deadline,
        **result,
        "memory_mb": {"before": rss_before / 1e6, "after": rss_after / 1e6},
        "afterwards": afterwards,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rows", type=int, default=200, help="conversations of `groups`")
    parser.add_argument("--seconds", type=float, default=10, help="of each closed loop")
    parser.add_argument("--overload-seconds", type=float, default=120)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    demo = Demo(chosen.demo)
    runs: dict[str, Callable[[], dict[str, Any]]] = {
        "one": lambda: one(demo),
        "batch": lambda: batch(demo),
        "groups": lambda: groups(demo, chosen.rows),
        "http": lambda: http(demo, chosen.seconds),
        "ray": lambda: http(demo, chosen.seconds, "--ray"),
        "overload": lambda: overload(demo, chosen.overload_seconds),
    }
    results: dict[str, Any] = {
        "machine": {"cpus": os.cpu_count(), "threads": torch.get_num_threads(), "load": os.getloadavg()[0]},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    for part in chosen.parts:
        results[part] = runs[part]()
        print(part, json.dumps(results[part], indent=2), flush=True)
        if chosen.json:
            chosen.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
