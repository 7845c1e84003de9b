"""The loop that our training is measured against: what the released scripts do in a step, with today's libraries.

Their habits, as far as they cost time: photos are opened, resized and cut in the main process, between the steps, one
after the other; the vision tower runs over every view of every candidate at every step, in stage 2 without gradients;
each photo vector is put into the prompt by a write of its own, at an index fetched from the device; a batch is padded
as it comes; the language model's head is applied to every position; one AdamW, no accumulation across processes. Not
copied: what makes the released scripts fail today (docs/differences.md), float16 with a gradient scaler, and batches of
one: the plain loop gets the samples and the batch size of ours.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional

IGNORED = -100
VIEWS = 5


class Plain:
    """One of the two stages, trained plainly."""

    def __init__(self, model: nn.Module, cut: Callable[[object], torch.Tensor], *, lr: float, pad: int) -> None:
        """Begins.

        Args:
            model: A LlavaNext model with an adapter, its vision tower there.
            cut: A photo, as it lies on the disk, to its views [5, 3, size, size].
            lr: AdamW's.
            pad: Token that fills a batch up.
        """
        self.model, self.cut, self.pad = model, cut, pad
        self.llava = model.get_base_model()
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.device = self.trained[0].device
        self.sees = any("vision_tower" in name for name, p in model.named_parameters() if p.requires_grad)
        self.adam = torch.optim.AdamW(self.trained, lr=lr, weight_decay=0.0)

    def step(
        self, batch: Sequence[tuple[Sequence[int], Sequence[int], Sequence[object]]], micro_batch: int
    ) -> torch.Tensor:
        """One optimizer step.

        Args:
            batch: For each sample: input ids, labels, and its photos.
            micro_batch: Samples of one forward pass.

        Returns:
            The mean loss of a target token.
        """
        self.model.train()
        targets = sum(label != IGNORED for _, labels, _ in batch for label in labels)
        total = torch.zeros((), device=self.device)
        for start in range(0, len(batch), micro_batch):
            loss = self.losses(batch[start : start + micro_batch]).sum() / targets
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.adam.step()
        self.adam.zero_grad()
        return total

    def losses(self, samples: Sequence[tuple[Sequence[int], Sequence[int], Sequence[object]]]) -> torch.Tensor:
        """Of every position of a batch; zero where there is no target."""
        longest = max(len(ids) for ids, _, _ in samples)
        ids = torch.full((len(samples), longest), self.pad)
        labels = torch.full((len(samples), longest), IGNORED)
        mask = torch.zeros_like(ids)
        for row, (tokens, wanted, _) in enumerate(samples):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            labels[row, : len(tokens)] = torch.tensor(wanted)
            mask[row, : len(tokens)] = 1
        views = torch.cat([self.cut(photo) for _, _, photos in samples for photo in photos])
        ids, labels, mask = ids.to(self.device), labels.to(self.device), mask.to(self.device)
        embeds = self.llava.get_input_embeddings()(ids)
        embeds = self._insert(embeds, ids, self._photos(views.to(self.device, embeds.dtype)))
        hidden = self.llava.model.language_model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
        logits = self.llava.lm_head(hidden).float()
        return functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="none"
        )

    def _photos(self, views: torch.Tensor) -> torch.Tensor:
        tower, projector = self.llava.model.vision_tower, self.llava.model.multi_modal_projector
        with torch.set_grad_enabled(self.sees):
            cls = tower(views).last_hidden_state[:, 0]
        return projector(cls)

    def _insert(self, embeds: torch.Tensor, ids: torch.Tensor, photos: torch.Tensor) -> torch.Tensor:
        if self.sees:
            # gradients flow through the photos' vectors: the released stage 1 scatters them
            places = (ids == self.llava.config.image_token_id).unsqueeze(-1)
            return embeds.masked_scatter(places, photos.to(embeds.dtype))
        embeds = embeds.clone()
        places = (ids == self.llava.config.image_token_id).nonzero()
        for number in range(len(places)):
            row, column = places[number, 0].item(), places[number, 1].item()
            embeds[row, column] = photos[number].to(embeds.dtype)
        return embeds


def stock_cut(
    size: int, mean: Sequence[float], std: Sequence[float], pinpoints: object
) -> Callable[[object], torch.Tensor]:
    """The stock preparation of a JPEG, by transformers and Pillow."""
    from PIL import Image
    from transformers.models.llava_next import LlavaNextImageProcessorPil

    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_grid_pinpoints=pinpoints,
        image_mean=list(mean),
        image_std=list(std),
    )

    def cut(jpg: object) -> torch.Tensor:
        photo = Image.open(io.BytesIO(jpg)).convert("RGB")
        return torch.as_tensor(processor(photo, return_tensors="pt").pixel_values[0])

    return cut
