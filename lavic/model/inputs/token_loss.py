"""The loss of target tokens: photo tokens are inserted into the embeddings, logits computed at target positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lavic.model.inputs.label_mask import IGNORED, Batch


def unwrap_peft(model: nn.Module) -> Any:
    """The LlavaNext model inside a PEFT wrapper, or the model itself. Typed `Any`: submodules have no static types."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def splice(model: nn.Module, input_ids: torch.Tensor, photos: torch.Tensor | None) -> torch.Tensor:
    """Token embeddings, with each image token replaced by a photo vector.

    Args:
        model: A LlavaNext model, wrapped by PEFT or not.
        input_ids: int64 [b, length]
        photos: [n, d_text], one row for each image token of the batch, in reading order; None without image tokens.

    Returns:
        [b, length, d_text]
    """
    llava = unwrap_peft(model)
    embeds = llava.get_input_embeddings()(input_ids)
    is_image = torch.eq(input_ids, llava.config.image_token_id)
    if photos is None:
        photos = embeds.new_zeros((0, embeds.shape[-1]))
    if int(is_image.sum()) != len(photos):
        raise ValueError(f"{int(is_image.sum())} image tokens in the batch, {len(photos)} photo vectors")
    return embeds.masked_scatter(is_image.unsqueeze(-1), photos.to(embeds.dtype))


def hidden_states(model: nn.Module, batch: Batch, photos: torch.Tensor | None) -> torch.Tensor:
    """The language model's last hidden states, [b, length, d_text]."""
    embeds = splice(model, batch.input_ids, photos)
    return unwrap_peft(model).model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state


def target_logits(model: nn.Module, batch: Batch, photos: torch.Tensor | None) -> torch.Tensor:
    """Logits at each target position, float32 [targets, vocabulary], row by row.

    `lm_head` is applied only at target positions: about ten of a 2,000-token prompt.
    """
    hidden = hidden_states(model, batch, photos)
    return unwrap_peft(model).lm_head(hidden[:, :-1][batch.labels[:, 1:] != IGNORED]).float()


def target_tokens(batch: Batch) -> torch.Tensor:
    """The target tokens, int64 [targets], row by row."""
    labels = batch.labels[:, 1:]
    return labels[labels != IGNORED]


def token_losses(model: nn.Module, batch: Batch, photos: torch.Tensor | None) -> torch.Tensor:
    """Negative log-likelihood of each target token, float32 [targets], row by row."""
    return functional.cross_entropy(target_logits(model, batch, photos), target_tokens(batch), reduction="none")
