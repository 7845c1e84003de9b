"""Free text from prompts that hold photo tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lavic.model.inputs.prompt_encoder import Encoder
from lavic.model.inputs.token_loss import splice, unwrap_peft


@dataclass(frozen=True)
class Continuation:
    """What a model wrote after a prompt."""

    text: str
    logprob: float
    """Natural logarithm of its probability, the end-of-sequence token included where it was written."""


@torch.no_grad()
def generate(
    model: nn.Module,
    encoder: Encoder,
    prompts: Sequence[list[int]],
    photos: torch.Tensor | None,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float | None = None,
    seed: int = 0,
) -> list[Continuation]:
    """The continuation of each prompt up to the end-of-sequence token; by default the likeliest one, token by token.

    Args:
        model: A LlavaNext model, wrapped by PEFT or not.
        encoder: Of the same base model.
        prompts: Token ids; of any lengths, padded on the left here.
        photos: [n, d_text], one row for each image token, in reading order.
        max_new_tokens: Where to stop at the latest.
        temperature: Above 0, tokens are drawn: the same ones for the same batch and seed. `logprob` stays that of the
            likeliest tokens.
        top_p: Draw among the likeliest tokens that together have this probability.
        seed: Of the draws.
    """
    device = next(unwrap_peft(model).parameters()).device
    longest = max(len(p) for p in prompts)
    ids = torch.full((len(prompts), longest), encoder.pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    ids, mask = ids.to(device), mask.to(device)
    logprobs = _GreedyLogprobs(len(prompts), encoder.eos, device)
    draws = temperature > 0
    sampling = {"do_sample": draws, "temperature": temperature or None, "top_p": top_p if draws else None}
    with torch.random.fork_rng(enabled=draws):
        if draws:
            torch.manual_seed(seed)
        written = unwrap_peft(model).generate(
            inputs_embeds=splice(model, ids, photos),
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            num_beams=1,
            **sampling,
            **({"top_k": 0} if draws else {}),  # the library's own default is 50
            eos_token_id=encoder.eos,
            pad_token_id=encoder.pad,
            logits_processor=[logprobs],
        )
    texts = encoder.tokenizer.batch_decode(written, skip_special_tokens=True)
    return [Continuation(text.strip(), logprob) for text, logprob in zip(texts, logprobs.sums.tolist(), strict=True)]


class _GreedyLogprobs:
    """Adds up the log-probability of each row's likeliest tokens; kept logits would take a vocabulary a token."""

    def __init__(self, rows: int, eos: int, device: torch.device) -> None:
        self.sums = torch.zeros(rows, dtype=torch.float64, device=device)
        self._eos = eos

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        going_on = ~input_ids.eq(self._eos).any(-1)
        self.sums += scores.float().log_softmax(-1).max(-1).values.double() * going_on
        return scores
