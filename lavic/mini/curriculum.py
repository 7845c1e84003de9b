"""The text-only curriculum of the miniature: look-up tasks of rising difficulty.

It teaches what a large language model can do already: repeat, look a key up, find the line of a list that a request
refers to. A level starts when the previous one is mastered; without levels a model of this size stays at chance.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from lavic.model import prompts
from lavic.model.inputs.label_mask import IGNORED, Batch, Example, collate
from lavic.model.inputs.prompt_encoder import Encoder
from lavic.model.prompts import Candidate, Piece


@dataclass(frozen=True, kw_only=True)
class Listing:
    """A training conversation with the look of every candidate in words."""

    ids: tuple[str, ...]
    turns: tuple[tuple[str, str], ...]
    titles: tuple[str, ...]
    looks: tuple[str, ...]
    target: int
    """Index of the right candidate."""


@dataclass(frozen=True, kw_only=True)
class Level:
    """One level of the look-up lists."""

    form: str
    """`word`: one random word each; `look`: the look alone; `full`: conversation, title and look; `photo`:
    conversation, title and photo."""
    max_items: int
    """Length of the longest list."""
    batch: int
    max_distance: int = 10
    """Maximum number of items between the request and the answer."""
    extra_requests: int = 0
    """Further requests after the first answer, each with its own answer."""


LEVELS = (
    Level(form="word", max_items=4, batch=32, max_distance=0, extra_requests=3),
    Level(form="word", max_items=8, batch=32, max_distance=0, extra_requests=3),
    *(Level(form="word", max_items=4, batch=128, max_distance=distance) for distance in (1, 2, 3, 4)),
    Level(form="word", max_items=8, batch=96),
    Level(form="look", max_items=5, batch=64),
    Level(form="look", max_items=10, batch=48),
    Level(form="full", max_items=10, batch=32),
)
PHOTO_LEVELS = (
    Level(form="photo", max_items=3, batch=16, extra_requests=4),
    Level(form="photo", max_items=6, batch=12, extra_requests=4),
    Level(form="photo", max_items=10, batch=12),
)
"""Used in the second phase: the same lists, with photos in place of words."""


@dataclass(frozen=True)
class LookupBatch:
    """A batch of look-up tasks with m answers, and the targets of the lookup head."""

    batch: Batch
    row: torch.Tensor
    """int64 [m]: the example that an answer belongs to."""
    answer: torch.Tensor
    """int64 [m]: position of the answer's first token, the ids' common prefix."""
    requested: torch.Tensor
    """float32 [m, vocabulary]: the requested words, as a distribution."""
    far: torch.Tensor
    """bool [m]: whether the request is as far before the answer as the level allows; at the later levels before the
    whole list, as in the real prompt."""
    photos: tuple[str, ...] = ()
    """Ids of the items whose photos the image tokens are placeholders for, in order."""
    looks: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """float32 [photos, vocabulary]: the words of each photo's look, as a distribution; empty without photos."""


def make_repeat_batch(batch: int, vocabulary: int, reserved: int, generator: torch.Generator) -> Batch:
    """Random words, repeated once; the repetition is the target."""
    length = int(torch.randint(4, 17, (1,), generator=generator))
    order = torch.rand(batch, vocabulary - reserved, generator=generator).argsort(1)[:, :length] + reserved
    ids = torch.cat([torch.ones(batch, 1, dtype=torch.long), order, order], 1)
    labels = ids.clone()
    labels[:, : length + 2] = IGNORED  # the first repeated word cannot be predicted
    return Batch(ids, labels, torch.full((batch,), ids.shape[1]))


def make_recall_batch(
    batch: int,
    level: int,
    words: Sequence[int],
    pairs: Sequence[int],
    id: str,
    encoder: Encoder,
    rng: random.Random,
) -> LookupBatch:
    """Keys with values, then the keys again in another order: their values are the targets.

    Level 0 is bare, and half its examples put the key before the value, close to plain repetition: without these a run
    was near chance after two thousand steps. Level 1 mixes forms that approach `id: word`, with parts of the real
    prompt's end between the key and the answer; level 2 has values of three tokens, like ids.
    """
    colon = encoder.tokenizer("x:", add_special_tokens=False).input_ids[-1]
    prefix = encoder.target(id)[0]
    line = encoder.tokenizer("x\nx", add_special_tokens=False).input_ids[-2]
    end = encoder.prompt(prompts.recommend((), (), photo_tokens=0))
    end = [line, *end[end.index(line) + 1 :], prefix]
    count = rng.randint(2, 8)
    examples = []
    answers: list[tuple[int, int, int]] = []
    for row in range(batch):
        form = rng.random() if level else 0.0
        long_values = level == 2 and rng.random() < 0.6
        forward = level == 0 and rng.random() < 0.5
        before = [prefix] if form > 0.25 else []
        between = [colon] if form > 0.5 else []
        filler = rng.randint(0, level) if form > 0.75 else 0
        keys = rng.sample(words, count)
        values = [rng.choices(pairs, k=3 if long_values else 1) for _ in keys]
        ids, labels = [encoder.tokenizer.bos_token_id], [IGNORED]
        for key, value in zip(keys, values, strict=True):
            part = [*before, *value, *between, *rng.choices(words, k=filler), key, encoder.eos]
            if forward:
                part = [key, *value, encoder.eos]
            ids += part
            labels += [IGNORED] * len(part)
        for j in rng.sample(range(count), count):
            num_end_tokens = rng.randint(0, len(end)) if level else 0
            request = [keys[j], *end[len(end) - num_end_tokens :]]
            ids += request
            answers.append((row, len(ids) - 1, keys[j]))
            ids += values[j]
            labels += [IGNORED] * len(request) + values[j]
        examples.append(Example(ids, labels))
    rows, positions, requested_ids = zip(*answers, strict=True)
    requested = functional.one_hot(torch.tensor(requested_ids), len(encoder.tokenizer)).float()
    is_far = torch.ones(len(rows), dtype=torch.bool)
    return LookupBatch(collate(examples, encoder.pad), torch.tensor(rows), torch.tensor(positions), requested, is_far)


def make_lookup_batch(
    level: Level,
    listings: Sequence[Listing],
    words: Sequence[str],
    ids: Sequence[str],
    encoder: Encoder,
    rng: random.Random,
    photo_tokens: int = 0,
    neighbor_share: float = 0.0,
) -> LookupBatch:
    """Lists with one request each, most often as far from the answer as the level allows.

    `neighbor_share` is the share of lists whose ids are neighbours in `ids`, so that they share a prefix, as those of
    similar products may: to generate such an id, the model must keep to its line after the first tokens.
    """
    size = rng.randint(2, level.max_items)
    examples: list[Example] = []
    answers: list[tuple[int, int, bool]] = []
    requested: list[torch.Tensor] = []
    photos: list[str] = []
    looks: list[torch.Tensor] = []

    def expect(words: str, row: int, position: int, far: bool) -> None:
        requested.append(token_distribution(words, encoder))
        answers.append((row, position, far))

    for row in range(level.batch):
        turns, sampled, target, photo_ids = _sample_candidates(level.form, listings, words, size, rng)
        photos += photo_ids
        looks += [token_distribution(look, encoder) for _, _, look in sampled] if photo_ids else []
        farthest = min(level.max_distance, len(sampled))
        between = rng.choices((farthest, rng.randint(0, farthest), 0), (0.6, 0.25, 0.15))[0]
        # An item gets another id in every list, so that ids are read from the list and not memorized.
        item_ids = _sample_ids(ids, len(sampled), neighbor_share, rng)
        candidates = [Candidate(i, title, look) for i, (title, look, _) in zip(item_ids, sampled, strict=True)]
        example = encoder.example(
            prompt_with_request_at(turns, candidates, len(sampled) - between, photo_tokens), item_ids[target]
        )
        expect(sampled[target][2], row, sum(label == IGNORED for label in example.labels), between == farthest)
        look_counts = Counter(look for _, _, look in sampled)
        unambiguous = [i for i, (_, _, look) in enumerate(sampled) if i == target or look_counts[look] == 1]
        for _ in range(level.extra_requests):
            other = rng.choice(unambiguous)  # a look of two candidates has no single right answer
            request = encoder.prompt(prompt_with_request_at([("seeker", sampled[other][2])], []))[2:]
            answer = encoder.target(item_ids[other])
            expect(sampled[other][2], row, len(example.input_ids) + len(request), True)
            example.input_ids.extend([*request, *answer])
            example.labels.extend([*[IGNORED] * len(request), *answer])
        examples.append(example)
    rows, positions, far = zip(*answers, strict=True)
    batch = collate(examples, encoder.pad)
    return LookupBatch(
        batch,
        torch.tensor(rows),
        torch.tensor(positions),
        torch.stack(requested),
        torch.tensor(far),
        tuple(photos),
        torch.stack(looks) if looks else torch.empty(0),
    )


def token_distribution(words: str, encoder: Encoder) -> torch.Tensor:
    """The tokens of a text as a distribution, float32 [vocabulary]; all zero for an empty text."""
    counts = torch.zeros(len(encoder.tokenizer))
    for token in encoder.tokenizer(words, add_special_tokens=False).input_ids:
        counts[token] += 1
    return counts / counts.sum().clamp(min=1)


def prompt_with_request_at(
    turns: Sequence[tuple[str, str]], candidates: Sequence[Candidate], index: int = 0, photo_tokens: int = 0
) -> tuple[Piece, ...]:
    """The prompt with the conversation moved before candidate `index`; 0 gives the real prompt."""
    if index == 0:
        return prompts.recommend(turns, candidates, photo_tokens=photo_tokens)
    before_request = prompts.recommend((), candidates[:index], photo_tokens=photo_tokens)[:-1]
    request = [piece for role, text in turns for piece in prompts.turn(role, text)]
    after_request = prompts.recommend((), candidates[index:], photo_tokens=photo_tokens)[2:]
    return (*before_request, *request, *after_request)


def _sample_candidates(
    form: str, listings: Sequence[Listing], words: Sequence[str], size: int, rng: random.Random
) -> tuple[Sequence[tuple[str, str]], list[tuple[str, str | None, str]], int, list[str]]:
    """A request, `size` candidates as (title, look in the prompt, look), the target's index, ids of photos to show."""
    if form == "word":
        keys = rng.sample(words, size)
        target = rng.randrange(size)
        return [("seeker", keys[target])], [(key, None, key) for key in keys], target, []
    listing = rng.choice(listings)
    distractors = [i for i in range(len(listing.looks)) if i != listing.target]
    chosen = [*rng.sample(distractors, min(size - 1, len(distractors))), listing.target]
    rng.shuffle(chosen)
    target, looks = chosen.index(listing.target), [listing.looks[i] for i in chosen]
    if form == "look":
        request = rng.sample(looks[target].split(), len(looks[target].split()))
        return [("seeker", " ".join(request))], [(look, None, look) for look in looks], target, []
    titles = [listing.titles[i] for i in chosen]
    if form == "photo":
        pairs = zip(titles, looks, strict=True)
        return listing.turns, [(title, None, look) for title, look in pairs], target, [listing.ids[i] for i in chosen]
    return listing.turns, list(zip(titles, looks, looks, strict=True)), target, []


def _sample_ids(ids: Sequence[str], count: int, neighbor_share: float, rng: random.Random) -> list[str]:
    window = 3 * count
    if neighbor_share and rng.random() < neighbor_share and len(ids) > window:
        start = rng.randrange(len(ids) - window)
        return rng.sample(ids[start : start + window], count)
    return rng.sample(ids, count)
