"""Model, task and data of each training stage, and a process group of two ranks in one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lavic.data.conversations import read_conversations
from lavic.data.shard_dataset import ShardDataset
from lavic.distributed.context import DistributedContext
from lavic.model.config import LoraSettings, ModelSettings
from lavic.model.item_store import ItemStore
from lavic.model.loading import Backbone
from lavic.model.lora import add_adapter, apply_adapter
from lavic.train.config import LoopSettings
from lavic.train.distillation.dataset import DistillDataset
from lavic.train.distillation.task import DistillTask
from lavic.train.recommendation.dataset import TuneDataset
from lavic.train.recommendation.task import TuneTask
from tests.train.assets import KEY, Assets

LORA = LoraSettings(r=2, dropout=0.1)
LOOP = LoopSettings(global_batch_size=4, lr=0.01)


def trained(task: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters, by name."""
    return {name: p for name, p in task.named_parameters() if p.requires_grad}


def stage_1(assets: Assets, dtype: str = "float32") -> tuple[Backbone, Any, DistillTask, DistillDataset]:
    backbone = Backbone.load(ModelSettings(name=str(assets.base), dtype=dtype))
    torch.manual_seed(3)
    model = add_adapter(backbone, "vision", LORA)
    data = DistillDataset(ShardDataset(assets.photos), backbone.geometry, backbone.encoder, max_length=64)
    return backbone, model, DistillTask(model), data


def stage_2(assets: Assets, dtype: str = "float32") -> tuple[Backbone, Any, TuneTask, TuneDataset]:
    backbone = Backbone.load(ModelSettings(name=str(assets.base), dtype=dtype), vision=False)
    apply_adapter(backbone, assets.vision, "vision")
    torch.manual_seed(3)
    model = add_adapter(backbone, "language", LORA)
    rows, store = read_conversations(assets.rows), ItemStore.open(assets.store)
    return backbone, model, TuneTask(model), TuneDataset(rows, store, backbone.encoder, candidates=KEY, max_length=400)


@dataclass(frozen=True)
class TwoRanks(DistributedContext):
    """Rank 0 of two; rank 1 sends the same values, changed by `other`."""

    size: int = 2
    other: Callable[[Any], Any] = lambda value: value

    def all_gather_object(self, value: Any) -> list[Any]:
        return [value, self.other(value)]
