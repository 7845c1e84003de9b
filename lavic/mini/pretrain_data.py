"""The data of a miniature's pretraining: described photos, and conversations with every candidate's look in words."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageOps

from lavic.data.schema import Conversation
from lavic.data.shard_dataset import ShardDataset
from lavic.mini.curriculum import Listing
from lavic.model import prompts


@dataclass(frozen=True)
class Photo:
    """A described photo."""

    id: str
    """Id of its item."""
    image: Image.Image
    title: str
    description: str

    def prepare(self, rng: random.Random | None) -> Image.Image:
        """The photo, or with `rng` a random crop of it, by up to a twelfth, perhaps mirrored."""
        if rng is None:
            return self.image
        image = ImageOps.mirror(self.image) if rng.random() < 0.5 else self.image
        width, height = image.size
        dx, dy = (rng.randint(0, edge // 12) for edge in (width, height))
        return image.crop((dx // 2, dy // 2, width - (dx - dx // 2), height - (dy - dy // 2)))


def read_photos(data: ShardDataset, side: int, without: frozenset[str] = frozenset()) -> list[Photo]:
    """The described photos of a set, scaled down to what a cut photo of `side` pixels needs, `without` some keys."""
    photos = []
    for sample in (data[i] for i, key in enumerate(data.keys) if key not in without):
        if sample.text:
            image = sample.image
            # an eighth more, for the crops
            image.thumbnail((side * 9 // 8, side * 9 // 8))
            photos.append(Photo(sample.item_id, image, sample.title, sample.text))
    return photos


def make_listings(
    conversations: Iterable[Conversation], looks: Mapping[str, str], titles: Mapping[str, str]
) -> list[Listing]:
    """The conversations whose candidates all have a title and a look in words."""
    listings = []
    for conversation in conversations:
        for ids in conversation.candidates.values():
            targets = [t for t in conversation.targets if t in ids]
            if targets and all(i in looks and i in titles for i in ids):
                listings.append(
                    Listing(
                        ids=tuple(ids),
                        turns=tuple((turn.role, turn.text) for turn in conversation.turns),
                        titles=tuple(titles[i] for i in ids),
                        looks=tuple(looks[i] for i in ids),
                        target=ids.index(targets[0]),
                    )
                )
    return listings


def training_texts(photos: Sequence[Photo], listings: Sequence[Listing]) -> Iterator[str]:
    """All the text that the tokenizer's vocabulary is made from, prompts included."""
    for photo in photos:
        yield photo.title
        yield photo.description
    for listing in listings:
        yield from listing.ids
        yield from (text for _, text in listing.turns)
        yield from listing.titles
        yield from listing.looks
    yield from prompt_texts()
    # Colons and commas follow a word only in whole prompts.
    yield "word: word, word."


def prompt_texts() -> list[str]:
    """The fixed texts of the prompts."""
    listed = prompts.recommend([(role, "") for role in prompts.ROLES], [prompts.Candidate("", "", "")], photo_tokens=0)
    return [piece for piece in (*listed, *prompts.describe("", 0)) if isinstance(piece, str)]
