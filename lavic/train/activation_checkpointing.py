"""Activation checkpointing and compilation of a model's layers."""

from __future__ import annotations

import warnings

from torch import nn

from lavic.model.inputs.token_loss import unwrap_peft
from lavic.train.config import LoopSettings


def configure_layers(model: nn.Module, loop: LoopSettings) -> None:
    """Enables activation checkpointing and compilation, in place; call it before the engine is created."""
    llava = unwrap_peft(model)
    if loop.activation_checkpointing:
        with warnings.catch_warnings():
            # transformers 5.23 renames it; 5.5 has only this name.
            warnings.filterwarnings("ignore", message=".*gradient_checkpointing_enable", category=FutureWarning)
            # Reentrant checkpointing computes no gradient for a layer whose input requires none: the first adapted one.
            llava.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if loop.compile:
        for layer in transformer_layers(llava):
            # Layer by layer, so that they share a compiled graph; dynamic, because lengths change with every batch.
            layer.compile(dynamic=True)


def transformer_layers(llava: nn.Module) -> list[nn.Module]:
    """The layers of the language model and, where it is loaded, of the vision tower."""
    stacks = [module for name, module in llava.named_modules() if name.endswith(".layers")]
    return [layer for stack in stacks for layer in stack.children()]
