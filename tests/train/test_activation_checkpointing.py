"""Recomputed activations and compiled layers: the same losses and gradients for less memory or time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lavic.data.conversations import read_conversations
from lavic.data.shard_dataset import ShardDataset
from lavic.model.config import LoraSettings, ModelSettings
from lavic.model.item_store import ItemStore
from lavic.model.loading import Backbone
from lavic.model.lora import add_adapter
from lavic.train.activation_checkpointing import configure_layers, transformer_layers
from lavic.train.config import LoopSettings
from lavic.train.distillation.dataset import DistillDataset
from lavic.train.distillation.task import DistillTask
from lavic.train.recommendation.dataset import TuneDataset
from lavic.train.recommendation.task import TuneTask
from tests.train.assets import KEY, Assets

pytestmark = pytest.mark.slow


def build(assets: Assets, stage: int, loop: LoopSettings) -> tuple[nn.Module, object]:
    backbone = Backbone.load(ModelSettings(name=str(assets.base)))
    torch.manual_seed(0)
    model = add_adapter(backbone, "vision" if stage == 1 else "language", LoraSettings(r=2, dropout=0.3))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    configure_layers(model, loop)
    if stage == 1:
        photos = DistillDataset(ShardDataset(assets.photos), backbone.geometry, backbone.encoder, max_length=64)
        return DistillTask(model), photos.collate([photos[p] for p in range(3)])
    rows = read_conversations(assets.rows)
    lists = TuneDataset(rows, ItemStore.open(assets.store), backbone.encoder, candidates=KEY, max_length=400)
    return TuneTask(model), lists.collate([lists[p] for p in range(3)])


def run(task: nn.Module, batch: object) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Losses, gradients, and the bytes saved for the backward pass."""
    saved_bytes: dict[int, int] = {}
    references = []  # keeps tensors alive: reused memory would be counted once
    parameters = {p.untyped_storage().data_ptr() for p in task.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved_bytes[storage.data_ptr()] = storage.nbytes()
            references.append(tensor)
        return tensor

    task.train()
    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = task(batch)
    total = sum(saved_bytes.values())
    losses.sum().backward()
    return losses.detach(), {n: p.grad for n, p in task.named_parameters() if p.grad is not None}, total


@pytest.mark.parametrize("stage", [1, 2])
def test_checkpointing_changes_memory_but_not_gradients(assets: Assets, stage: int) -> None:
    plain = run(*build(assets, stage, LoopSettings()))
    recomputed = run(*build(assets, stage, LoopSettings(activation_checkpointing=True)))
    assert torch.equal(plain[0], recomputed[0])
    assert plain[1].keys() == recomputed[1].keys()
    for name in plain[1]:
        torch.testing.assert_close(recomputed[1][name], plain[1][name], rtol=1e-6, atol=1e-7)
    assert recomputed[2] < plain[2] / 3


def test_transformer_layers_lists_every_layer(assets: Assets) -> None:
    model = Backbone.load(ModelSettings(name=str(assets.base))).model
    assert [type(layer).__name__ for layer in transformer_layers(model)] == ["CLIPEncoderLayer"] * 2 + [
        "MistralDecoderLayer"
    ] * 2


def test_compiled_layers_give_the_same_gradients(assets: Assets, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the eager backend: graphs are traced but no code is generated, which needs a compiler and a minute."""
    real = torch.compile
    traced = []

    def eager(module, **options):
        traced.append(options)
        return real(module, **{**options, "backend": "eager"})

    monkeypatch.setattr(torch, "compile", eager)
    plain = run(*build(assets, 2, LoopSettings()))
    compiled = run(*build(assets, 2, LoopSettings(compile=True)))
    assert len(traced) == 4
    torch.testing.assert_close(compiled[0], plain[0], rtol=1e-5, atol=1e-6)
    for name in plain[1]:
        torch.testing.assert_close(compiled[1][name], plain[1][name], rtol=1e-4, atol=1e-6)
