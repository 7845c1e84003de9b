"""Text generation from prompts with photo tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lavic.model.inputs.prompt_encoder import Encoder
from lavic.model.inputs.token_loss import splice, unwrap_peft


@dataclass(frozen=True)
class Continuation:
    """The text that a model generated after a prompt."""

    text: str
    logprob: float
    """Natural logarithm of its probability, with the end-of-sequence token if it was generated."""


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
    """The continuation of each prompt up to the end-of-sequence token; by default by greedy decoding.

    Args:
        model: A LlavaNext model, wrapped by PEFT or not.
        encoder: Of the same base model.
        prompts: Token ids of any lengths; padded on the left here.
        photos: [n, d_text], one row for each image token, in reading order.
        max_new_tokens: Limit of the length.
        temperature: Above 0, tokens are sampled: the same ones for the same batch and seed. `logprob` remains that of
            the most likely tokens.
        top_p: Nucleus sampling: the most likely tokens that together have this probability.
        seed: Of the sampling.
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
    do_sample = temperature > 0
    sampling = {"do_sample": do_sample, "temperature": temperature or None, "top_p": top_p if do_sample else None}
    with torch.random.fork_rng(enabled=do_sample):
        if do_sample:
            torch.manual_seed(seed)
        generated = unwrap_peft(model).generate(
            inputs_embeds=splice(model, ids, photos),
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            num_beams=1,
            **sampling,
            **({"top_k": 0} if do_sample else {}),  # the library's default is 50
            eos_token_id=encoder.eos,
            pad_token_id=encoder.pad,
            logits_processor=[logprobs],
        )
    texts = encoder.tokenizer.batch_decode(generated, skip_special_tokens=True)
    return [Continuation(text.strip(), logprob) for text, logprob in zip(texts, logprobs.sums.tolist(), strict=True)]


class _GreedyLogprobs:
    """Sums the log-probability of each row's most likely tokens; storing the logits would need too much memory."""

    def __init__(self, rows: int, eos: int, device: torch.device) -> None:
        self.sums = torch.zeros(rows, dtype=torch.float64, device=device)
        self._eos = eos

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        unfinished = ~input_ids.eq(self._eos).any(-1)
        self.sums += scores.float().log_softmax(-1).max(-1).values.double() * unfinished
        return scores
