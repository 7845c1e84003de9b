"""Trains a miniature base model from scratch: first to read, then to see.

What it stands in for: LLaVA-v1.6-Mistral-7B comes with a language model that can look things up and a vision side that
can describe photos. The miniature learns both here, the first from `curriculum`, the second from photos with their
descriptions. It is never shown item tokens: no [CLS] output, which stage 1 works on, goes through the projector here.
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
from lavic.mini.curriculum import LEVELS, PHOTO_LEVELS, Level, Listing, Lists, spread
from lavic.mini.lessons import Photo, prompt_pieces
from lavic.mini.settings import PretrainSettings
from lavic.mini.tokenizer import free_words, pairs
from lavic.model import prompts
from lavic.model.prompt_encoder import IGNORED, Batch, Encoder, collate, splice, token_losses
from lavic.model.tiling import VIEWS, Geometry
from lavic.model.visual_tokens import all_tokens, cls_tokens, patch_tokens

Log = Callable[[dict], None]
KEYS = 300
"""Words that serve as keys, beside those of looks: with thousands, each is met too rarely to be looked up."""
FETCH_LAYER = 2
"""After this layer of the language model the requested words must be readable where the answer is said."""
FETCH_AT = (-1, 0, 1, 2)
"""Positions, counted from the first token of the answer's id, that this is asked of."""


class Pretrainer:
    """One miniature on its way."""

    def __init__(
        self,
        model: LlavaNextForConditionalGeneration,
        encoder: Encoder,
        chosen: PretrainSettings,
        listings: Sequence[Listing],
        log: Log,
    ) -> None:
        self.model, self.encoder, self.chosen, self.listings, self.log = model, encoder, chosen, listings, log
        vision: Any = model.config.vision_config
        text: Any = model.config.text_config
        self.geometry = Geometry(size=vision.image_size, patch=vision.patch_size, mean=MEAN, std=STD)
        self.rng = random.Random(chosen.seed)
        # words of the prompt itself make poor keys: they stand between every key and its answer
        own = {t for piece in prompt_pieces() for t in encoder.tokenizer(piece).input_ids}
        wanted = {t for listing in listings for t in encoder.tokenizer(listing.looks[listing.target]).input_ids}
        words = [w for w in free_words(encoder.tokenizer) if w not in own]
        some = random.Random(chosen.seed).sample(words, min(KEYS, len(words)))
        self.words = [w for w in words if w in wanted or w in some]
        if len(self.words) < (fewest := max(level.most for level in LEVELS)):
            raise DataError(
                f"the tokenizer knows {len(self.words)} words besides the prompt's own; lists of keys need {fewest}: "
                "lower --minimum, or give more descriptions"
            )
        self.word_texts = encoder.tokenizer.batch_decode([[w] for w in self.words])
        # thrown away at the end: reads the requested words off the middle of the language model
        self.fetch_head = nn.Linear(text.hidden_size, len(encoder.tokenizer))
        # thrown away too: reads a photo's title off a view's [CLS]
        self.title_head = nn.Linear(vision.hidden_size, len(encoder.tokenizer)) if chosen.title_weight else None
        self.ids = sorted({id for listing in listings for id in listing.ids})
        self.started = time.monotonic()

    # reading -----------------------------------------------------------------------------------------------------

    def read(self) -> None:
        """Repeat, recall, then lists of growing length and form; ends when the last level is mastered."""
        language = [*self.model.model.language_model.parameters(), *self.model.lm_head.parameters()]
        optimizer = _adamw([*language, *self.fetch_head.parameters()], self.chosen)
        steps = iter(range(self.chosen.read_steps))
        generator = torch.Generator().manual_seed(self.chosen.seed)
        reserved, vocabulary = 7, len(self.encoder.tokenizer)

        def repeat() -> tuple[torch.Tensor, float]:
            return self._answer(curriculum.repeat(128, vocabulary, reserved, generator))

        self._until_mastered("repeat", steps, repeat, optimizer, self.chosen.read_lr, warmup=40)
        digits = pairs(self.encoder.tokenizer)
        for level in range(3):

            def recall(level: int = level) -> tuple[torch.Tensor, float]:
                batch = curriculum.recall(64, level, self.words, digits, self.ids[0], self.encoder, self.rng)
                return self._fetch(batch)

            self._until_mastered(f"recall {level}", steps, recall, optimizer, self.chosen.read_lr)
        for n, _ in enumerate(LEVELS):

            def fetch(n: int = n) -> tuple[torch.Tensor, float | None]:
                # one batch in five goes back to a level already mastered
                back = n > 0 and self.rng.random() < 0.2
                loss, right = self._fetch(self._lists(self.rng.randrange(n) if back else n))
                return loss, None if back else right

            last = n + 1 == len(LEVELS)
            mastery = self.chosen.last_mastery if last else self.chosen.mastery
            self._until_mastered(f"lists {n}", steps, fetch, optimizer, self.chosen.fetch_lr, mastery=mastery)

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
        mastery = self.chosen.mastery if mastery is None else mastery
        for step in steps:
            loss, right = attempt()
            _update(loss, optimizer, lr * min(1.0, (step + 1) / max(1, warmup)))
            if right is not None:
                recent.append(right)
            mastered = len(recent) == recent.maxlen and np.mean(recent) > mastery
            if mastered or step % 50 == 49:
                self._record("read", step + 1, level=name, loss=loss.item(), right=float(np.mean(recent or [0.0])))
            if mastered:
                return

    # seeing ------------------------------------------------------------------------------------------------------

    def see(self, photos: Sequence[Photo], held_out: Sequence[Photo]) -> None:
        """Descriptions from all photo tokens, with look-up lists between."""
        chosen = self.chosen
        heads = [head for head in (self.fetch_head, self.title_head) if head]
        optimizer = _adamw([p for part in (self.model, *heads) for p in part.parameters()], chosen)
        by_id = {photo.id: photo for photo in photos}
        listings = [listing for listing in self.listings if all(id in by_id for id in listing.ids)]
        captions: deque[float] = deque(maxlen=50)
        fetched: deque[float] = deque(maxlen=12)
        found: deque[float] = deque(maxlen=8)
        level = 0
        levels = [
            replace(one, more=max(one.more, chosen.compare_more), reach=chosen.compare_reach) for one in PHOTO_LEVELS
        ]
        for step in range(chosen.see_steps):
            batch = self.rng.choices(photos, k=chosen.batch_size)
            # no draw where nothing is to be drawn: the packaged base was made before this setting
            as_items = bool(chosen.describe_as_items) and self.rng.random() < chosen.describe_as_items
            caption = self.caption_losses(batch, augment=chosen.augment, as_items=as_items).mean()
            loss = caption
            if self.title_head:
                loss = loss + chosen.title_weight * self.title_loss(batch, self.title_head)
            if step % chosen.rehearse_every == 0:
                rehearsal, right = self._fetch(self._lists(len(LEVELS) - 1))
                loss = loss + rehearsal
                fetched.append(right)
            if listings and step >= chosen.compare_from and (step + 1) % chosen.compare_every == 0:
                rehearsal, right = self._fetch_photos(levels[level], listings, by_id)
                loss = loss + rehearsal
                found.append(right)
                mastered = len(found) == found.maxlen and np.mean(found) > chosen.compare_mastery
                if mastered and level + 1 < len(levels):
                    level += 1
                    found.clear()
            cosine = 0.5 * (1 + math.cos(math.pi * step / chosen.see_steps)) * 0.98 + 0.02
            _update(loss, optimizer, chosen.see_lr * min(1.0, (step + 1) / 80) * cosine)
            captions.append(caption.item())
            if step % 50 == 49:
                self._record(
                    "see",
                    step + 1,
                    caption=float(np.mean(captions)),
                    right=float(np.mean(fetched)),
                    photo_level=level,
                    photo_right=float(np.mean(found or [0.0])),
                )
            if held_out and (step % 300 == 299 or step + 1 == chosen.see_steps):
                self._record("see", step + 1, held_out_perplexity=self.perplexity(held_out))

    def caption_losses(self, photos: Sequence[Photo], *, augment: bool = False, as_items: bool = False) -> torch.Tensor:
        """Losses of every description token, [targets], from all photo tokens or from as many as an item has."""
        images = self._prepared(photos, augment)
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
        """Cross-entropy of the titles' words, read off each view's [CLS]."""
        images = self._prepared(photos, self.chosen.augment)
        views = torch.from_numpy(np.stack([self.geometry.cut(i) for i in images]))
        said = head(cls_tokens(self.model, views).flatten(0, 1))
        wanted = torch.stack([spread(p.title, self.encoder) for p in photos]).repeat_interleave(views.shape[1], 0)
        return functional.cross_entropy(said, wanted)

    def _fetch_photos(
        self, level: Level, listings: Sequence[Listing], by_id: dict[str, Photo]
    ) -> tuple[torch.Tensor, float]:
        """Loss of a batch of lists with photos, each read from its whole view, as LLaVA reads several at once, or from
        as many tokens as an item has.

        `compare_align` adds how far its tokens are from words.
        """
        as_items, near = self.chosen.compare_as_items, self.chosen.near_ids
        per_photo = VIEWS if as_items else (self.geometry.size // self.geometry.patch) ** 2 + 1
        lists = curriculum.lists(level, listings, (), self.ids, self.encoder, self.rng, per_photo, near)
        images = self._prepared([by_id[id] for id in lists.photos], self.chosen.augment)
        llava = self.model.model
        if as_items:
            shown = tokens = self._as_items(images)
        else:
            tokens = patch_tokens(self.model, torch.from_numpy(np.stack([self.geometry.cut(i)[0] for i in images])))
            shown = torch.cat([tokens, llava.image_newline.expand(len(tokens), 1, -1)], 1)
        loss, right = self._fetch(lists, shown.flatten(0, 1))
        if self.chosen.compare_align:
            loss = loss + self.chosen.compare_align * self._strangeness(tokens, lists.looks)
        return loss, right

    @torch.no_grad()
    def perplexity(self, photos: Sequence[Photo]) -> float:
        """Of the descriptions, from all photo tokens."""
        losses = [self.caption_losses(photos[i : i + 64]) for i in range(0, len(photos), 64)]
        return math.exp(torch.cat(losses).mean().item())

    def _prepared(self, photos: Sequence[Photo], augment: bool) -> list[Image]:
        return [p.prepared(2 * self.geometry.size, self.rng if augment else None) for p in photos]

    def _as_items(self, images: Sequence[Image]) -> torch.Tensor:
        """The mean of each view's patches, [photos, 5, d_text]: like item tokens, without a [CLS]."""
        views = torch.from_numpy(np.stack([self.geometry.cut(i) for i in images]))
        return patch_tokens(self.model, views.flatten(0, 1)).mean(1).unflatten(0, (len(images), VIEWS))

    def _strangeness(self, tokens: torch.Tensor, looks: torch.Tensor) -> torch.Tensor:
        """How far photo tokens, [photos, n, d_text], are from the embeddings of the words of their looks.

        In direction: cross-entropy of naming the look by comparing the tokens' mean with every word. In length: the
        squared log-ratio: beside tokens much longer than words, what the language model's layers add to them is little.
        """
        words = self.model.model.language_model.embed_tokens.weight.detach()
        word, token = (t.square().mean(-1, keepdim=True).sqrt() for t in (words, tokens))
        named = (tokens / token).mean(1) @ (words / word.mean()).T / math.sqrt(words.shape[1])
        return functional.cross_entropy(named, looks) + (token / word.mean()).log().square().mean()

    # shared ------------------------------------------------------------------------------------------------------

    def _lists(self, level: int) -> Lists:
        near = self.chosen.near_ids
        return curriculum.lists(
            LEVELS[level], self.listings, self.word_texts, self.ids, self.encoder, self.rng, near=near
        )

    def _answer(self, batch: Batch) -> tuple[torch.Tensor, float]:
        """Language-model loss, and the share of target tokens that would be said."""
        hidden = self._language(batch).last_hidden_state
        learnt = batch.labels[:, 1:] != IGNORED
        logits, labels = self.model.lm_head(hidden[:, :-1][learnt]), batch.labels[:, 1:][learnt]
        right = (logits.argmax(-1) == labels).float().mean().item()
        return functional.cross_entropy(logits, labels), right

    def _fetch(self, lists: Lists, photos: torch.Tensor | None = None) -> tuple[torch.Tensor, float]:
        """Language-model loss and fetch supervision; the share of far requests that are answered right."""
        output = self._language(lists.batch, photos, layers=True)
        labels = lists.batch.labels[:, 1:]
        learnt = labels != IGNORED
        logits = self.model.lm_head(output.last_hidden_state[:, :-1][learnt])
        loss = functional.cross_entropy(logits, labels[learnt])
        middle = output.hidden_states[FETCH_LAYER]
        middle = middle * torch.rsqrt(middle.pow(2).mean(-1, keepdim=True) + 1e-5)
        for offset in FETCH_AT:
            # an answer shorter than the offset has nothing left to say there
            at = (lists.answer + offset).clamp(max=learnt.shape[1] - 1)
            here = learnt[lists.row, at] & (at == lists.answer + offset) if offset > 0 else torch.ones_like(lists.far)
            guess = self.fetch_head(middle[lists.row, at][here]).log_softmax(-1)
            share = self.chosen.fetch_weight / len(FETCH_AT)
            loss = loss - share * (guess * lists.wanted[here]).sum(-1).sum() / len(lists.row)
        return loss, _answered(learnt, logits.argmax(-1) == labels[learnt], lists.far)

    def _language(self, batch: Batch, photos: torch.Tensor | None = None, *, layers: bool = False) -> Any:
        embeds = splice(self.model, batch.input_ids, photos)
        return self.model.model.language_model(inputs_embeds=embeds, use_cache=False, output_hidden_states=layers)

    def _record(self, phase: str, step: int, **values: object) -> None:
        rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}
        self.log({"phase": phase, "step": step, "seconds": round(time.monotonic() - self.started, 1), **rounded})


def _answered(learnt: torch.Tensor, right: torch.Tensor, far: torch.Tensor) -> float:
    """The share of far requests whose answer is right in every token.

    Args:
        learnt: bool [b, length], target positions.
        right: bool [targets], whether each would be said.
        far: bool [answers], in reading order; an answer is a run of target positions.
    """
    begins = learnt.clone()
    begins[:, 1:] &= ~learnt[:, :-1]
    answer = begins.flatten().cumsum(0)[learnt.flatten()] - 1
    wrong = torch.zeros(len(far)).index_add_(0, answer, (~right).float())
    return (wrong[far] == 0).float().mean().item() if far.any() else 0.0


def _adamw(parameters: Sequence[nn.Parameter], chosen: PretrainSettings) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=chosen.read_lr, weight_decay=chosen.weight_decay, betas=(0.9, 0.98))


def _update(loss: torch.Tensor, optimizer: torch.optim.Optimizer, lr: float) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
