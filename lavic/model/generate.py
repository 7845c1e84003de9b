"""Free text from prompts that hold photo tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from lavic.model.inputs import Encoder, core, splice


@torch.no_grad()
def generate(
    model: nn.Module,
    encoder: Encoder,
    prompts: Sequence[list[int]],
    photos: torch.Tensor | None,
    *,
    max_new_tokens: int,
) -> list[str]:
    """The likeliest continuation of each prompt, token by token (greedy), up to the end-of-sequence token.

    Args:
        model: A LlavaNext model, wrapped by PEFT or not.
        encoder: Of the same base model.
        prompts: Token ids; of any lengths, padded on the left here.
        photos: [n, d_text], one row for each image token, in reading order.
        max_new_tokens: Where to stop at the latest.
    """
    device = next(core(model).parameters()).device
    longest = max(len(p) for p in prompts)
    ids = torch.full((len(prompts), longest), encoder.pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    ids, mask = ids.to(device), mask.to(device)
    said = core(model).generate(
        inputs_embeds=splice(model, ids, photos),
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        eos_token_id=encoder.eos,
        pad_token_id=encoder.pad,
    )
    return [text.strip() for text in encoder.tokenizer.batch_decode(said, skip_special_tokens=True)]
