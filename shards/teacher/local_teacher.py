"""The teacher in this process: the base model, from all tokens of each photo."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from lavic.shards.teacher.question import Question
from lavic.shards.teacher.teacher import Description, Sampling
from lavic.shards.teacher.text_check import check_text, complete_sentences

if TYPE_CHECKING:
    from lavic.data.tar_shards import Sample
    from lavic.model.loading import Backbone


@dataclass(kw_only=True)
class LocalTeacher:
    """Describes photos in batches. See `Teacher`."""

    backbone: Backbone
    origin: Mapping[str, str]
    batch_size: int
    max_new_tokens: int
    sampling: Sampling
    question: Question | None
    """None: the words of the model's prompt style."""

    def write(self, samples: Iterable[Sample], attempt: int, stopped: Callable[[], bool]) -> Iterator[Description]:
        """See `Teacher.write`."""
        remaining = iter(samples)
        while not stopped() and (batch := list(islice(remaining, self.batch_size))):
            sampling = self.sampling.for_attempt(attempt)
            texts = describe(self.backbone, batch, self.max_new_tokens, sampling, self.question)
            for sample, text in zip(batch, texts, strict=True):
                yield Description(text=complete_sentences(text), flag=check_text(text, sample.title))


def describe(
    backbone: Backbone,
    samples: Sequence[Sample],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    question: Question | None = None,
) -> list[str]:
    """A text about each sample, from all its photo tokens, as the model wrote it."""
    import numpy as np
    import torch

    from lavic.model.generation import generate
    from lavic.model.visual_tokens import all_tokens

    if not samples:
        return []
    sampling = sampling or Sampling()
    images = [s.image for s in samples]
    geometry, encoder, sizes = backbone.geometry, backbone.encoder, [image.size for image in images]
    views = torch.from_numpy(np.concatenate([geometry.cut(image) for image in images])).to(backbone.device)
    with torch.no_grad():
        tokens = all_tokens(backbone.model, views, sizes, [geometry.grid(size) for size in sizes])
    segments = question.segments if question else None
    questions = [
        encoder.prompt(encoder.describe(sample.title, len(photo), segments))
        for sample, photo in zip(samples, tokens, strict=True)
    ]
    written = generate(
        backbone.model,
        encoder,
        questions,
        torch.cat(tokens),
        max_new_tokens=max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed,
    )
    return [continuation.text for continuation in written]
