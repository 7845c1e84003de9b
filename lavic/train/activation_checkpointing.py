"""How the layers of a model run: what they keep for the way back, and whether they are compiled."""

from __future__ import annotations

import warnings

from torch import nn

from lavic.model.prompt_encoder import core
from lavic.train.config import LoopSettings


def arrange(model: nn.Module, loop: LoopSettings) -> None:
    """Sets a model's layers up as the settings say, in place; before it is handed to an engine.

    Args:
        model: A LlavaNext model with its adapter.
        loop: `activation_checkpointing` and `compile`.
    """
    llava = core(model)
    if loop.activation_checkpointing:
        with warnings.catch_warnings():
            # transformers 5.23 renames it; 5.5 has this name alone
            warnings.filterwarnings("ignore", message=".*gradient_checkpointing_enable", category=FutureWarning)
            # the other kind, reentrant, gives no gradient to a layer whose input wants none: the first with an adapter
            llava.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if loop.compile:
        for layer in layers(llava):
            # one by one: all layers share one compiled graph, and lengths change with every batch
            layer.compile(dynamic=True)


def layers(llava: nn.Module) -> list[nn.Module]:
    """The layers of language model and, where it is there, vision tower."""
    stacks = [module for name, module in llava.named_modules() if name.endswith(".layers")]
    return [layer for stack in stacks for layer in stack.children()]
