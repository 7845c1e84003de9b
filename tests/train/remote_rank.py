"""One rank that reads an epoch of a set in an object store, as `lavic distill` does, and notes what it reads."""

from __future__ import annotations

import argparse
import os
import traceback
from pathlib import Path
from typing import Any

from lavic.data.remote_shards import CacheSettings
from lavic.data.shard_dataset import ShardDataset
from lavic.distributed.context import DistributedContext
from lavic.model.config import ModelSettings
from lavic.model.loading import Backbone
from lavic.train.config import LoopSettings
from lavic.train.distillation.dataset import DistillDataset
from lavic.train.input.data_loader import TrainDataLoader
from lavic.train.input.shuffle_order import ShuffleOrder


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shards")
    parser.add_argument("--base")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--size", type=int)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--micro-tokens", type=int)
    words = parser.parse_args()
    for name in ("__getitem__", "meta_and_text"):
        note(name, words.folder / f"{name.strip('_')}.log")
    backbone = Backbone.load(ModelSettings(name=words.base))
    photos = ShardDataset(words.shards, cache=CacheSettings(folder=words.folder / "cache"))
    data = DistillDataset(
        photos,
        backbone.geometry,
        backbone.encoder,
        max_length=64,
        order=ShuffleOrder(len(photos), 5, block=5, mix=2),
        table=words.folder / "x.lengths",
    )
    loop = LoopSettings(global_batch_size=8, micro_tokens=words.micro_tokens, num_workers=words.workers)
    for _ in TrainDataLoader(data, DistributedContext(rank=words.rank, size=words.size), loop).steps(
        0, len(photos) // 8
    ):
        pass


def note(name: str, log: Path) -> None:
    """Has a way of reading a sample write down which sample it is."""
    read = getattr(ShardDataset, name)

    def noted(self: ShardDataset, index: int) -> Any:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(file, f"{index}\n".encode())
        os.close(file)
        return read(self, index)

    setattr(ShardDataset, name, noted)


if __name__ == "__main__":
    try:
        main()
    except Exception:
        traceback.print_exc()
        os._exit(1)  # loader workers ignore the signal by which a clean exit would end them
