"""A few steps of a real stage as a program, so that a test can start ranks of it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from safetensors.torch import save_file

from lavic.data.conversations import read_conversations
from lavic.data.shard_dataset import ShardDataset
from lavic.distributed.context import DistributedContext
from lavic.distributed.failure import exit_process
from lavic.distributed.signals import StopRequest
from lavic.model.config import LoraSettings, ModelSettings
from lavic.model.item_store import ItemStore
from lavic.model.loading import Backbone
from lavic.model.lora import add_adapter, apply_adapter
from lavic.tracking.tracker import Tracker
from lavic.train.checkpoint import CheckpointManager
from lavic.train.config import LoopSettings
from lavic.train.deepspeed.engine import Engine
from lavic.train.distillation.dataset import DistillDataset
from lavic.train.distillation.task import DistillTask
from lavic.train.recommendation.dataset import TuneDataset
from lavic.train.recommendation.task import TuneTask
from lavic.train.trainer import Trainer
from tests.train.assets import KEY
from tests.train.toy import make_callbacks

LOOP = LoopSettings(
    steps=3, global_batch_size=8, lr=1e-3, weight_decay=0.01, max_grad_norm=0.5, schedule="constant", warmup=0.0
)


def train(stage: str, assets: Path, adapter: Path, out: Path, loop: LoopSettings, world: DistributedContext) -> None:
    """Trains from a saved adapter's weights; rank 0 writes those at the end."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    backbone = Backbone.load(ModelSettings(name=str(assets / "base")), vision=stage == "distill")
    if stage == "distill":
        kind, task = "vision", DistillTask
        sets = [
            DistillDataset(ShardDataset(assets / name), backbone.geometry, backbone.encoder, max_length=64)
            for name in ("photos", "valid")
        ]
    else:
        kind, task = "language", TuneTask
        apply_adapter(backbone, assets / "vision", "vision")
        rows, store = read_conversations(assets / "rows.jsonl"), ItemStore.open(assets / "store")
        sets = [TuneDataset(rows, store, backbone.encoder, candidates=KEY, max_length=400)] * 2
    model = add_adapter(backbone, kind, LoraSettings(r=2, dropout=0.0))
    set_peft_model_state_dict(model, load_file(adapter / "adapter_model.safetensors"))
    engine = Engine(task(model), world, loop)
    tracker = Tracker.open(out, main=world.is_main)
    checkpoints = CheckpointManager(out / "checkpoints", world)
    with StopRequest() as stop:
        Trainer(engine, *sets, loop, world, make_callbacks(stop, checkpoints, tracker)).fit()
    if world.is_main:
        weights = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
        save_file({name.replace(".default", ""): p for name, p in weights.items()}, out / "end.safetensors")


def main() -> int:
    reader = argparse.ArgumentParser()
    reader.add_argument("stage")
    for name in ("assets", "adapter", "out"):
        reader.add_argument(name, type=Path)
    reader.add_argument("--loop", type=json.loads, default={})
    chosen = reader.parse_args()
    world = DistributedContext.from_env()
    world.init_process_group(timeout_s=120)
    try:
        loop = LoopSettings(**{**vars(LOOP), **chosen.loop})
        train(chosen.stage, chosen.assets, chosen.adapter, chosen.out, loop, world)
    finally:
        world.destroy_process_group()
    return 0


if __name__ == "__main__":
    exit_process(main())
