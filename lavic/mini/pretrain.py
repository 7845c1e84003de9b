"""Pretrains a miniature base model from scratch: language first, then vision.

LLaVA-v1.6-Mistral-7B comes with a language model that can look things up and a vision side that can describe photos.
The miniature learns both here, the first from `curriculum`, the second from described photos. It never sees item
tokens: the [CLS] outputs, which stage 1 trains, do not pass through the projector here.
"""

from __future__ import annotations

import math
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import nn
from torch.nn import functional
from transformers import LlavaNextForConditionalGeneration

from lavic.errors import DataError
from lavic.mini import curriculum
from lavic.mini.architecture import MEAN, STD
from lavic.mini.curriculum import LEVELS, PHOTO_LEVELS, Level, Listing, LookupBatch, token_distribution
from lavic.mini.pretrain_data import Photo, prompt_texts
from lavic.mini.pretrain_settings import PretrainSettings
from lavic.mini.tokenizer import digit_pair_ids, word_ids
from lavic.model import prompts
from lavic.model.inputs.label_mask import IGNORED, Batch, collate
from lavic.model.inputs.prompt_encoder import Encoder
from lavic.model.inputs.token_loss import splice, token_losses
from lavic.model.tiling import VIEWS, Geometry
from lavic.model.visual_tokens import all_tokens, cls_tokens, patch_tokens

Log = Callable[[dict], None]
KEYS = 300
"""Words that serve as keys, besides those of looks: with thousands, each would occur too rarely."""
LOOKUP_LAYER = 2
"""The lookup head reads the requested words from the output of this layer of the language model."""
LOOKUP_AT = (-1, 0, 1, 2)
"""Positions that it reads at, counted from the first token of the answer's id."""


class Pretrainer:
    """Both phases of the pretraining of one miniature."""

    def __init__(
        self,
        model: LlavaNextForConditionalGeneration,
        encoder: Encoder,
        settings: PretrainSettings,
        listings: Sequence[Listing],
        log: Log,
    ) -> None:
        self.model, self.encoder, self.settings, self.listings, self.log = model, encoder, settings, listings, log
        vision: Any = model.config.vision_config
        text: Any = model.config.text_config
        self.geometry = Geometry(size=vision.image_size, patch=vision.patch_size, mean=MEAN, std=STD)
        self.rng = random.Random(settings.seed)
        # Words of the prompt make poor keys: they occur between every key and its answer.
        prompt_tokens = {t for piece in prompt_texts() for t in encoder.tokenizer(piece).input_ids}
        requested = {t for listing in listings for t in encoder.tokenizer(listing.looks[listing.target]).input_ids}
        words = [w for w in word_ids(encoder.tokenizer) if w not in prompt_tokens]
        sampled = random.Random(settings.seed).sample(words, min(KEYS, len(words)))
        self.words = [w for w in words if w in requested or w in sampled]
        if len(self.words) < (fewest := max(level.max_items for level in LEVELS)):
            raise DataError(
                f"the tokenizer knows {len(self.words)} words besides the prompt's own; lists of keys need {fewest}: "
                "lower --minimum, or give more descriptions"
            )
        self.word_texts = encoder.tokenizer.batch_decode([[w] for w in self.words])
        # Discarded after training: predicts the requested words from the middle of the language model.
        self.lookup_head = nn.Linear(text.hidden_size, len(encoder.tokenizer))
        # Discarded too: predicts a photo's title from a view's [CLS].
        self.title_head = nn.Linear(vision.hidden_size, len(encoder.tokenizer)) if settings.title_weight else None
        self.ids = sorted({id for listing in listings for id in listing.ids})
        self.started = time.monotonic()

    # language ----------------------------------------------------------------------------------------------------

    def train_language(self) -> None:
        """Repeat, recall, then lists of growing length; ends when the last level is mastered."""
        language = [*self.model.model.language_model.parameters(), *self.model.lm_head.parameters()]
        optimizer = _adamw([*language, *self.lookup_head.parameters()], self.settings)
        steps = iter(range(self.settings.language_steps))
        generator = torch.Generator().manual_seed(self.settings.seed)
        reserved, vocabulary = 7, len(self.encoder.tokenizer)

        def repeat() -> tuple[torch.Tensor, float]:
            return self._language_loss(curriculum.make_repeat_batch(128, vocabulary, reserved, generator))

        self._until_mastered("repeat", steps, repeat, optimizer, self.settings.recall_lr, warmup=40)
        digits = digit_pair_ids(self.encoder.tokenizer)
        for level in range(3):

            def recall(level: int = level) -> tuple[torch.Tensor, float]:
                batch = curriculum.make_recall_batch(64, level, self.words, digits, self.ids[0], self.encoder, self.rng)
                return self._lookup_loss(batch)

            self._until_mastered(f"recall {level}", steps, recall, optimizer, self.settings.recall_lr)
        for n, _ in enumerate(LEVELS):

            def lookup(n: int = n) -> tuple[torch.Tensor, float | None]:
                # One batch in five is of a level already mastered.
                review = n > 0 and self.rng.random() < 0.2
                loss, right = self._lookup_loss(self._lists(self.rng.randrange(n) if review else n))
                return loss, None if review else right

            last = n + 1 == len(LEVELS)
            mastery = self.settings.final_mastery if last else self.settings.mastery
            self._until_mastered(f"lists {n}", steps, lookup, optimizer, self.settings.lookup_lr, mastery=mastery)

    def _until_mastered(
        self,
        name: str,
        steps: Iterator[int],
        attempt: Callable[[], tuple[torch.Tensor, float | None]],
        optimizer: torch.optim.Optimizer,
        lr: float,
        warmup: int = 0,
        mastery: float | None = None,
    ) -> None:
        recent: deque[float] = deque(maxlen=8)
        mastery = self.settings.mastery if mastery is None else mastery
        for step in steps:
            loss, right = attempt()
            _update(loss, optimizer, lr * min(1.0, (step + 1) / max(1, warmup)))
            if right is not None:
                recent.append(right)
            mastered = len(recent) == recent.maxlen and np.mean(recent) > mastery
            if mastered or step % 50 == 49:
                self._record("language", step + 1, level=name, loss=loss.item(), right=float(np.mean(recent or [0.0])))
            if mastered:
                return

    # vision ------------------------------------------------------------------------------------------------------

    def train_vision(self, photos: Sequence[Photo], held_out: Sequence[Photo]) -> None:
        """Descriptions from all photo tokens, with look-up batches in between."""
        settings = self.settings
        heads = [head for head in (self.lookup_head, self.title_head) if head]
        optimizer = _adamw([p for part in (self.model, *heads) for p in part.parameters()], settings)
        by_id = {photo.id: photo for photo in photos}
        listings = [listing for listing in self.listings if all(id in by_id for id in listing.ids)]
        captions: deque[float] = deque(maxlen=50)
        text_right: deque[float] = deque(maxlen=12)
        photo_right: deque[float] = deque(maxlen=8)
        level = 0
        levels = [
            replace(
                level,
                extra_requests=max(level.extra_requests, settings.photo_lookup_extra_requests),
                max_distance=settings.photo_lookup_max_distance,
            )
            for level in PHOTO_LEVELS
        ]
        for step in range(settings.vision_steps):
            batch = self.rng.choices(photos, k=settings.batch_size)
            # Draws no random number where the setting is off, so that the packaged base stays reproducible.
            as_items = bool(settings.describe_as_items) and self.rng.random() < settings.describe_as_items
            caption = self.caption_losses(batch, augment=settings.augment, as_items=as_items).mean()
            loss = caption
            if self.title_head:
                loss = loss + settings.title_weight * self.title_loss(batch, self.title_head)
            if step % settings.text_lookup_every == 0:
                lookup_loss, right = self._lookup_loss(self._lists(len(LEVELS) - 1))
                loss = loss + lookup_loss
                text_right.append(right)
            if listings and step >= settings.photo_lookup_start and (step + 1) % settings.photo_lookup_every == 0:
                lookup_loss, right = self._photo_lookup_loss(levels[level], listings, by_id)
                loss = loss + lookup_loss
                photo_right.append(right)
                share = np.mean(photo_right) if len(photo_right) == photo_right.maxlen else 0.0
                if share > settings.photo_lookup_mastery and level + 1 < len(levels):
                    level += 1
                    photo_right.clear()
            cosine = 0.5 * (1 + math.cos(math.pi * step / settings.vision_steps)) * 0.98 + 0.02
            _update(loss, optimizer, settings.vision_lr * min(1.0, (step + 1) / 80) * cosine)
            captions.append(caption.item())
            if step % 50 == 49:
                self._record(
                    "vision",
                    step + 1,
                    caption=float(np.mean(captions)),
                    right=float(np.mean(text_right)),
                    photo_level=level,
                    photo_right=float(np.mean(photo_right or [0.0])),
                )
            if held_out and (step % 300 == 299 or step + 1 == settings.vision_steps):
                self._record("vision", step + 1, held_out_perplexity=self.perplexity(held_out))

    def caption_losses(self, photos: Sequence[Photo], *, augment: bool = False, as_items: bool = False) -> torch.Tensor:
        """Loss of every description token, [targets], given all photo tokens or as many as an item has."""
        images = self._prepare(photos, augment)
        if as_items:
            tokens = list(self._as_items(images))
        else:
            views = torch.from_numpy(np.stack([self.geometry.cut(i) for i in images]))
            tokens = all_tokens(self.model, views, [i.size for i in images])
        examples = [
            self.encoder.example(prompts.describe(p.title, len(t)), p.description)
            for p, t in zip(photos, tokens, strict=True)
        ]
        return token_losses(self.model, collate(examples, self.encoder.pad), torch.cat(tokens))

    def title_loss(self, photos: Sequence[Photo], head: nn.Linear) -> torch.Tensor:
        """Cross-entropy of the titles' words, predicted from each view's [CLS]."""
        images = self._prepare(photos, self.settings.augment)
        views = torch.from_numpy(np.stack([self.geometry.cut(i) for i in images]))
        logits = head(cls_tokens(self.model, views).flatten(0, 1))
        requested = torch.stack([token_distribution(p.title, self.encoder) for p in photos]).repeat_interleave(
            views.shape[1], 0
        )
        return functional.cross_entropy(logits, requested)

    def _photo_lookup_loss(
        self, level: Level, listings: Sequence[Listing], by_id: dict[str, Photo]
    ) -> tuple[torch.Tensor, float]:
        """Loss of a look-up batch with photos, each given by the patches of its whole view, as LLaVA reads several at
        once, or by as many tokens as an item has.

        `photo_lookup_alignment` weighs the distance of these tokens from words.
        """
        as_items, neighbor_share = self.settings.photo_lookup_as_items, self.settings.neighboring_ids
        per_photo = VIEWS if as_items else (self.geometry.size // self.geometry.patch) ** 2 + 1
        lists = curriculum.make_lookup_batch(
            level, listings, (), self.ids, self.encoder, self.rng, per_photo, neighbor_share
        )
        images = self._prepare([by_id[id] for id in lists.photos], self.settings.augment)
        llava = self.model.model
        if as_items:
            photo_embeds = tokens = self._as_items(images)
        else:
            tokens = patch_tokens(self.model, torch.from_numpy(np.stack([self.geometry.cut(i)[0] for i in images])))
            photo_embeds = torch.cat([tokens, llava.image_newline.expand(len(tokens), 1, -1)], 1)
        loss, right = self._lookup_loss(lists, photo_embeds.flatten(0, 1))
        if self.settings.photo_lookup_alignment:
            loss = loss + self.settings.photo_lookup_alignment * self._alignment_loss(tokens, lists.looks)
        return loss, right

    @torch.no_grad()
    def perplexity(self, photos: Sequence[Photo]) -> float:
        """The perplexity of the descriptions, given all photo tokens."""
        losses = [self.caption_losses(photos[i : i + 64]) for i in range(0, len(photos), 64)]
        return math.exp(torch.cat(losses).mean().item())

    def _prepare(self, photos: Sequence[Photo], augment: bool) -> list[Image]:
        return [p.prepare(self.rng if augment else None) for p in photos]

    def _as_items(self, images: Sequence[Image]) -> torch.Tensor:
        """The mean of each view's patches, [photos, 5, d_text]: like item tokens, without a [CLS]."""
        views = torch.from_numpy(np.stack([self.geometry.cut(i) for i in images]))
        return patch_tokens(self.model, views.flatten(0, 1)).mean(1).unflatten(0, (len(images), VIEWS))

    def _alignment_loss(self, tokens: torch.Tensor, looks: torch.Tensor) -> torch.Tensor:
        """Distance of photo tokens, [photos, n, d_text], from the embeddings of the words of their looks.

        In direction: cross-entropy of the look's words, with the similarities of the tokens' mean to all words as
        logits. In length: the squared log-ratio, since the layers of the language model hardly change tokens that are
        much longer than words.
        """
        words = self.model.model.language_model.embed_tokens.weight.detach()
        word_rms, token_rms = (t.square().mean(-1, keepdim=True).sqrt() for t in (words, tokens))
        logits = (tokens / token_rms).mean(1) @ (words / word_rms.mean()).T / math.sqrt(words.shape[1])
        return functional.cross_entropy(logits, looks) + (token_rms / word_rms.mean()).log().square().mean()

    # shared ------------------------------------------------------------------------------------------------------

    def _lists(self, level: int) -> LookupBatch:
        neighbor_share = self.settings.neighboring_ids
        return curriculum.make_lookup_batch(
            LEVELS[level],
            self.listings,
            self.word_texts,
            self.ids,
            self.encoder,
            self.rng,
            neighbor_share=neighbor_share,
        )

    def _language_loss(self, batch: Batch) -> tuple[torch.Tensor, float]:
        """Language-model loss, and the share of target tokens that are predicted right."""
        hidden = self._language(batch).last_hidden_state
        is_target = batch.labels[:, 1:] != IGNORED
        logits, labels = self.model.lm_head(hidden[:, :-1][is_target]), batch.labels[:, 1:][is_target]
        right = (logits.argmax(-1) == labels).float().mean().item()
        return functional.cross_entropy(logits, labels), right

    def _lookup_loss(self, lists: LookupBatch, photos: torch.Tensor | None = None) -> tuple[torch.Tensor, float]:
        """Loss of language model and lookup head, and the share of far requests that are answered right."""
        output = self._language(lists.batch, photos, layers=True)
        labels = lists.batch.labels[:, 1:]
        is_target = labels != IGNORED
        logits = self.model.lm_head(output.last_hidden_state[:, :-1][is_target])
        loss = functional.cross_entropy(logits, labels[is_target])
        middle = output.hidden_states[LOOKUP_LAYER]
        middle = middle * torch.rsqrt(middle.pow(2).mean(-1, keepdim=True) + 1e-5)
        for offset in LOOKUP_AT:
            # An answer may be shorter than the offset.
            positions = (lists.answer + offset).clamp(max=is_target.shape[1] - 1)
            inside = (
                is_target[lists.row, positions] & (positions == lists.answer + offset)
                if offset > 0
                else torch.ones_like(lists.far)
            )
            log_probs = self.lookup_head(middle[lists.row, positions][inside]).log_softmax(-1)
            share = self.settings.lookup_weight / len(LOOKUP_AT)
            loss = loss - share * (log_probs * lists.requested[inside]).sum(-1).sum() / len(lists.row)
        return loss, _share_right(is_target, logits.argmax(-1) == labels[is_target], lists.far)

    def _language(self, batch: Batch, photos: torch.Tensor | None = None, *, layers: bool = False) -> Any:
        embeds = splice(self.model, batch.input_ids, photos)
        return self.model.model.language_model(inputs_embeds=embeds, use_cache=False, output_hidden_states=layers)

    def _record(self, phase: str, step: int, **values: object) -> None:
        rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}
        self.log({"phase": phase, "step": step, "seconds": round(time.monotonic() - self.started, 1), **rounded})


def _share_right(is_target: torch.Tensor, right: torch.Tensor, far: torch.Tensor) -> float:
    """The share of far requests whose answer is right in every token.

    Args:
        is_target: bool [b, length], target positions.
        right: bool [targets], whether each is predicted right.
        far: bool [answers], in reading order; an answer is a run of target positions.
    """
    starts = is_target.clone()
    starts[:, 1:] &= ~is_target[:, :-1]
    answer = starts.flatten().cumsum(0)[is_target.flatten()] - 1
    wrong = torch.zeros(len(far)).index_add_(0, answer, (~right).float())
    return (wrong[far] == 0).float().mean().item() if far.any() else 0.0


def _adamw(parameters: Sequence[nn.Parameter], settings: PretrainSettings) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=settings.recall_lr, weight_decay=settings.weight_decay, betas=(0.9, 0.98))


def _update(loss: torch.Tensor, optimizer: torch.optim.Optimizer, lr: float) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
