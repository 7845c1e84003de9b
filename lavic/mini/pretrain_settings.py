"""Settings of `lavic mini pretrain`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from lavic.config import Seed, settings
from lavic.mini.architecture import Architecture

Share = Annotated[float, Field(ge=0, le=1)]


@settings
class PretrainSettings:
    """Both phases of pretraining."""

    language_steps: PositiveInt = 3000
    """Maximum number of steps of the first phase; it ends when the last level is mastered."""
    recall_lr: PositiveFloat = 2e-3
    """Peak learning rate while repeating and recalling."""
    lookup_lr: PositiveFloat = 1.5e-3
    """Peak learning rate on the look-up lists."""
    mastery: Share = 0.9
    """Share of right answers, over the last eight batches, at which the next level begins."""
    final_mastery: Share = 0.9
    """The same for the last level, the real prompt with looks in words."""
    vision_steps: PositiveInt = 1200
    """Steps of the second phase."""
    vision_lr: PositiveFloat = 1.5e-3
    """Peak learning rate of the second phase, with a cosine to 2 % of it."""
    batch_size: PositiveInt = 32
    """Photos a step in the second phase."""
    describe_as_items: Share = 0.0
    """Share of the batches of photos that are described from the mean of each view's patches, five tokens as an item
    will have, and not from all of them."""
    title_weight: NonNegativeFloat = 0.0
    """Weight of the loss that trains each view's [CLS] to predict the words of the photo's title, as CLIP's was trained
    on captions. The head that predicts them is discarded: projector and language model never see a [CLS]."""
    text_lookup_every: PositiveInt = 4
    """Steps between additional batches of look-up lists in words, so that reading is not forgotten."""
    photo_lookup_every: PositiveInt = 2
    """Steps between additional batches of lists with photos."""
    photo_lookup_start: NonNegativeInt = 150
    """Step of the second phase at which these batches begin."""
    photo_lookup_mastery: Share = 0.9
    """Share of right answers at which the lists with photos become longer."""
    photo_lookup_extra_requests: NonNegativeInt = 0
    """Requests that follow the first under the longest lists with photos too, each with its own answer."""
    photo_lookup_max_distance: NonNegativeInt = 10
    """Maximum number of items of a list with photos between the request and the answer. With 0 the request follows all
    photos, as in LLaVA's training; the order of `lavic tune` is then new."""
    photo_lookup_as_items: bool = False
    """Show a photo of a list as an item will be shown, by five tokens: the mean of each view's patches. Otherwise by
    every patch of the whole view and the newline, as LLaVA shows a view."""
    photo_lookup_alignment: NonNegativeFloat = 0.0
    """Weight of the loss on the distance, in direction and in length, between the tokens of a photo in a list and the
    embeddings of its look's words, which the first phase has learnt to look up."""
    neighboring_ids: Share = 0.0
    """Share of the lists in which the ids are neighbours, with common first tokens."""
    lookup_weight: NonNegativeFloat = 1.0
    """Weight of the look-up supervision; that of the language-model loss is 1."""
    weight_decay: NonNegativeFloat = 0.02
    """Weight decay of AdamW."""
    augment: bool = False
    """Mirror and crop the photos at random."""
    seed: Seed = 0
    """Seed of weights, order and lists."""


@settings
class MiniPretrainSettings:
    """Train a miniature LLaVA-NeXT from scratch: first to read (look-up in lists), then to see (photos described)."""

    shards: Path
    """Set of training photos; those with a description are used."""
    valid: Path
    """Set of held-out photos: excluded from training even if `shards` has them."""
    train: Path
    """Conversations with candidates, as `lavic tune` takes them."""
    candidates: str = "candidates_st"
    """Key of the candidate list."""
    looks: Path
    """What training items look like in a few words, lines of `{"id", "look"}`: for lists that words alone answer."""
    out: Path
    """Folder of the model."""
    start: str | None = None
    """A miniature whose language model is copied, and its vision side if that has the same sizes, as LLaVA began with
    Mistral's and CLIP's; `mini` is the packaged one."""
    architecture: Architecture = Architecture()
    pretrain: PretrainSettings = PretrainSettings()
    minimum: PositiveInt = 1
    """Words seen less often are unknown to the tokenizer."""
    threads: PositiveInt = 2
    """CPU threads."""
