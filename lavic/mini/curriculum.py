"""What a miniature reads before it sees a photo: text in which answers must be fetched.

It stands in for what a large language model already can: to repeat, to look a key up, to find the line of a list that a
request means. Levels rise when the one below is mastered; without them a model of this size stays at chance.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from lavic.model import prompts
from lavic.model.prompt_encoder import IGNORED, Batch, Encoder, Example, collate
from lavic.model.prompts import Candidate, Piece, Text


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
    most: int
    """Longest list."""
    batch: int
    reach: int = 10
    """How many items may stand between the request and the answer."""
    more: int = 0
    """Requests that follow the first answer, each with its own."""


LEVELS = (
    Level(form="word", most=4, batch=32, reach=0, more=3),
    Level(form="word", most=8, batch=32, reach=0, more=3),
    *(Level(form="word", most=4, batch=128, reach=reach) for reach in (1, 2, 3, 4)),
    Level(form="word", most=8, batch=96),
    Level(form="look", most=5, batch=64),
    Level(form="look", most=10, batch=48),
    Level(form="full", most=10, batch=32),
)
PHOTO_LEVELS = (
    Level(form="photo", most=3, batch=16, more=4),
    Level(form="photo", most=6, batch=12, more=4),
    Level(form="photo", most=10, batch=12),
)
"""Rehearsed while the miniature learns to see: the same lists, with photos in the place of words."""


@dataclass(frozen=True)
class Lists:
    """A batch of look-up lists with m answers, and what supervises the fetch."""

    batch: Batch
    row: torch.Tensor
    """int64 [m]: the example an answer stands in."""
    answer: torch.Tensor
    """int64 [m]: position of the answer's first token, the ids' common prefix."""
    wanted: torch.Tensor
    """float32 [m, vocabulary]: the requested words, as a distribution."""
    far: torch.Tensor
    """bool [m]: the request stands as far before the answer as the level allows; before the whole list, as in the real
    prompt, at the later ones."""
    photos: tuple[str, ...] = ()
    """Ids of the items whose photos the image tokens stand for, in reading order."""
    looks: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """float32 [photos, vocabulary]: the words of each photo's look, as a distribution; empty without photos."""


def repeat(batch: int, vocabulary: int, reserved: int, generator: torch.Generator) -> Batch:
    """Random words, twice: the second time they are learnt."""
    length = int(torch.randint(4, 17, (1,), generator=generator))
    order = torch.rand(batch, vocabulary - reserved, generator=generator).argsort(1)[:, :length] + reserved
    ids = torch.cat([torch.ones(batch, 1, dtype=torch.long), order, order], 1)
    labels = ids.clone()
    labels[:, : length + 2] = IGNORED  # the first word of the second time cannot be known
    return Batch(ids, labels, torch.full((batch,), ids.shape[1]))


def recall(
    batch: int,
    level: int,
    words: Sequence[int],
    pairs: Sequence[int],
    id: str,
    encoder: Encoder,
    rng: random.Random,
) -> Lists:
    """Keys with values, then the keys again in another order: their values are learnt.

    Level 0 is bare, and half its examples put the key before the value, which is repeating by another name: without
    that bridge a run was seen near chance after two thousand steps. Level 1 mixes forms that grow towards `id: word`,
    and puts more and more of the real prompt's end between the key and the answer; level 2 has three-token values as
    ids have.
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
        long = level == 2 and rng.random() < 0.6
        forward = level == 0 and rng.random() < 0.5
        before = [prefix] if form > 0.25 else []
        between = [colon] if form > 0.5 else []
        filler = rng.randint(0, level) if form > 0.75 else 0
        keys = rng.sample(words, count)
        values = [rng.choices(pairs, k=3 if long else 1) for _ in keys]
        ids, labels = [encoder.tokenizer.bos_token_id], [IGNORED]
        for key, value in zip(keys, values, strict=True):
            part = [*before, *value, *between, *rng.choices(words, k=filler), key, encoder.eos]
            if forward:
                part = [key, *value, encoder.eos]
            ids += part
            labels += [IGNORED] * len(part)
        for j in rng.sample(range(count), count):
            tail = rng.randint(0, len(end)) if level else 0
            ask = [keys[j], *end[len(end) - tail :]]
            ids += ask
            answers.append((row, len(ids) - 1, keys[j]))
            ids += values[j]
            labels += [IGNORED] * len(ask) + values[j]
        examples.append(Example(ids, labels))
    rows, at, asked = zip(*answers, strict=True)
    wanted = functional.one_hot(torch.tensor(asked), len(encoder.tokenizer)).float()
    far = torch.ones(len(rows), dtype=torch.bool)
    return Lists(collate(examples, encoder.pad), torch.tensor(rows), torch.tensor(at), wanted, far)


def lists(
    level: Level,
    listings: Sequence[Listing],
    words: Sequence[str],
    ids: Sequence[str],
    encoder: Encoder,
    rng: random.Random,
    photo_tokens: int = 0,
    near: float = 0.0,
) -> Lists:
    """Lists with a request each, most often as far from the answer as the level allows, else nearer.

    `near` is the share of lists whose ids are neighbours in `ids` and so begin alike, as those of like products may:
    such an id is said right only by whoever keeps to the line after its first tokens.
    """
    size = rng.randint(2, level.most)
    examples: list[Example] = []
    answers: list[tuple[int, int, bool]] = []
    wanted: list[torch.Tensor] = []
    photos: list[str] = []
    looks: list[torch.Tensor] = []

    def expect(words: str, row: int, at: int, far: bool) -> None:
        wanted.append(spread(words, encoder))
        answers.append((row, at, far))

    for row in range(level.batch):
        turns, shown, target, seen = _draw(level.form, listings, words, size, rng)
        photos += seen
        looks += [spread(look, encoder) for _, _, look in shown] if seen else []
        reach = min(level.reach, len(shown))
        between = rng.choices((reach, rng.randint(0, reach), 0), (0.6, 0.25, 0.15))[0]
        # an item has another id in every list: what an id means stands in the list, never in the weights
        given = _deal(ids, len(shown), near, rng)
        candidates = [Candidate(i, title, look) for i, (title, look, _) in zip(given, shown, strict=True)]
        example = encoder.example(request_at(turns, candidates, len(shown) - between, photo_tokens), given[target])
        expect(shown[target][2], row, sum(label == IGNORED for label in example.labels), between == reach)
        times = Counter(look for _, _, look in shown)
        alone = [i for i, (_, _, look) in enumerate(shown) if i == target or times[look] == 1]
        for _ in range(level.more):
            again = rng.choice(alone)  # a look that two share has no one right answer
            request = encoder.prompt(request_at([("seeker", shown[again][2])], []))[2:]
            answer = encoder.target(given[again])
            expect(shown[again][2], row, len(example.input_ids) + len(request), True)
            example.input_ids.extend([*request, *answer])
            example.labels.extend([*[IGNORED] * len(request), *answer])
        examples.append(example)
    rows, at, far = zip(*answers, strict=True)
    batch = collate(examples, encoder.pad)
    return Lists(
        batch,
        torch.tensor(rows),
        torch.tensor(at),
        torch.stack(wanted),
        torch.tensor(far),
        tuple(photos),
        torch.stack(looks) if looks else torch.empty(0),
    )


def spread(words: str, encoder: Encoder) -> torch.Tensor:
    """The tokens of some words as a distribution, float32 [vocabulary]; all zero where there are none."""
    counts = torch.zeros(len(encoder.tokenizer))
    for token in encoder.tokenizer(words, add_special_tokens=False).input_ids:
        counts[token] += 1
    return counts / counts.sum().clamp(min=1)


def request_at(
    turns: Sequence[tuple[str, str]], candidates: Sequence[Candidate], at: int = 0, photo_tokens: int = 0
) -> tuple[Piece, ...]:
    """The real prompt with the conversation moved before candidate `at`; 0 is the real prompt itself."""
    if at == 0:
        return prompts.recommend(turns, candidates, photo_tokens=photo_tokens)
    head = prompts.recommend((), candidates[:at], photo_tokens=photo_tokens)[:-1]
    asked: list[Piece] = []
    for role, text in turns:
        asked += [f"{prompts.ROLES[role]}: ", Text(text), "\n"]
    tail = prompts.recommend((), candidates[at:], photo_tokens=photo_tokens)[2:]
    return (*head, *asked, *tail)


def _draw(
    form: str, listings: Sequence[Listing], words: Sequence[str], size: int, rng: random.Random
) -> tuple[Sequence[tuple[str, str]], list[tuple[str, str | None, str]], int, list[str]]:
    """A request, `size` candidates as (title, look, the words that decide), the right one's index, photos to show."""
    if form == "word":
        keys = rng.sample(words, size)
        target = rng.randrange(size)
        return [("seeker", keys[target])], [(key, None, key) for key in keys], target, []
    listing = rng.choice(listings)
    others = [i for i in range(len(listing.looks)) if i != listing.target]
    chosen = [*rng.sample(others, min(size - 1, len(others))), listing.target]
    rng.shuffle(chosen)
    target, looks = chosen.index(listing.target), [listing.looks[i] for i in chosen]
    if form == "look":
        asked = rng.sample(looks[target].split(), len(looks[target].split()))
        return [("seeker", " ".join(asked))], [(look, None, look) for look in looks], target, []
    titles = [listing.titles[i] for i in chosen]
    if form == "photo":
        unsaid: list[tuple[str, str | None, str]] = [(t, None, look) for t, look in zip(titles, looks, strict=True)]
        return listing.turns, unsaid, target, [listing.ids[i] for i in chosen]
    return listing.turns, list(zip(titles, looks, looks, strict=True)), target, []


def _deal(ids: Sequence[str], count: int, near: float, rng: random.Random) -> list[str]:
    window = 3 * count
    if near and rng.random() < near and len(ids) > window:
        start = rng.randrange(len(ids) - window)
        return rng.sample(ids[start : start + window], count)
    return rng.sample(ids, count)
