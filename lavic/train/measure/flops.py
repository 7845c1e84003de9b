"""How much arithmetic a step needs: behind the utilisation that the journal shows and the estimate of `--dry-run`.

A matrix multiplication of T tokens by a weight of n elements takes 2Tn floating point operations forward, 2Tn backward
for its input and 2Tn backward for the weight. The last is done for weights that are trained (LoRA), never for frozen
ones; the one before only where something upstream is trained. So

* a frozen linear above the first trained one costs 4Tn, below it 2Tn (the query, key and value of a language model's
  first layer in stage 2; the whole vision tower, where it runs in stage 2);
* LoRA's A (r x in) and B (out x r) cost 6Tn each, A of the very first layer 4Tn: nobody wants its input's gradient;
* without gradients (`embed`, validation) everything costs 2Tn.

T is what really passes through a part: 5 views of (size / patch)^2 + 1 tokens in the vision tower, 5 per photo in the
projector, the text without its padding in the language model, the target tokens in its head. A layer's attention costs
4 d for each pair of a token and one that it looks at, and twice that backward; d is the width of all heads together. In
the vision tower S tokens make S^2 pairs, in the causal language model S (S + 1) / 2. Norms, activations and rotations
are left out, as is whatever is computed a second time to save memory: utilisation measures progress, not heat.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from lavic.model.config import Kind
from lavic.model.dims import ADAPTED, HEAD, LANGUAGE, PROJECTOR, TOWER, Linear, Place, Shape
from lavic.model.tiling import VIEWS


@dataclass(frozen=True, kw_only=True)
class Work:
    """Operations of one forward pass, and of its backward pass where something is trained, by what makes them."""

    view: float
    """Of one view in the vision tower."""
    photo_token: float
    """Of one photo token in the projector."""
    token: float
    """Of one token in the language model, without attention."""
    pair: float
    """Of one token looking at one token in the language model, over all layers."""
    target: float
    """Of one target token in the head."""

    @classmethod
    def of(cls, shape: Shape, kind: Kind | None = None, r: int = 0, *, training: bool = True) -> Work:
        """Counts.

        Args:
            shape: Of the model.
            kind: Of its adapter; None where it has none.
            r: The adapter's rank.
            training: False counts forward passes only.
        """
        linears = list(shape.linears())
        adapted = ADAPTED[kind] if kind else ()
        first = min((one.place for one in linears if one.place[0] in adapted), default=None) if training else None
        token, pair = dict.fromkeys((TOWER, PROJECTOR, LANGUAGE, HEAD), 0.0), {TOWER: 0.0, LANGUAGE: 0.0}
        for one in linears:
            part, layer, _ = one.place
            token[part] += _work(one, r if part in adapted else 0, first)
            if one.name == "q_proj":
                backward = first is not None and first <= (part, layer, 0)
                pair[part] += 4 * one.outputs * (3 if backward else 1)
        # the patches' convolution lies below everything that is trained
        cut = 2 * shape.patches * shape.patch_numbers * shape.vision_hidden
        tokens = shape.patches + 1
        return cls(
            view=cut + tokens * token[TOWER] + tokens**2 * pair[TOWER],
            photo_token=token[PROJECTOR],
            token=token[LANGUAGE],
            pair=pair[LANGUAGE],
            target=token[HEAD],
        )

    def flops(self, lengths: Iterable[int], *, targets: int, views: int = 0, photo_tokens: int = 0) -> float:
        """Operations for one batch.

        Args:
            lengths: Tokens of each text, without padding.
            targets: Target tokens of all of them.
            views: Views that pass through the vision tower.
            photo_tokens: Tokens that pass through the projector.
        """
        total = views * self.view + photo_tokens * self.photo_token + targets * self.target
        for length in lengths:
            total += length * self.token + length * (length + 1) / 2 * self.pair
        return total

    @property
    def photo(self) -> float:
        """Of one photo in vision tower and projector, in tokens of the language model."""
        return VIEWS * (self.view + self.photo_token) / self.token


def _work(linear: Linear, rank: int, first: Place | None) -> int:
    """Operations of one linear for one token.

    Args:
        linear: Which.
        rank: Of its adapter; 0 without.
        first: The first trained place; None where no gradient is wanted.
    """
    size = linear.inputs * linear.outputs
    adapter = rank * (linear.inputs + linear.outputs)
    forward = size + adapter
    if first is None or first > linear.place:
        return 2 * forward
    wanted = first < linear.place  # whether the input's gradient is
    backward = wanted * (size + rank * linear.inputs)
    if rank:
        backward += rank * linear.outputs + adapter
    return 2 * (forward + backward)


def counter(task: Any) -> Callable[[Any], float] | None:
    """What a `Meter` asks of a stage in training: the operations of one batch, its backward pass included.

    Args:
        task: A `DistillTask` or a `TuneTask`; for others there is no answer.
    """
    from lavic.model.prompt_encoder import core

    kind: Kind | None = getattr(task, "trains", None)
    if kind is None:
        return None
    shape = Shape.of(core(task.model).config.to_dict())
    (lora,) = task.model.peft_config.values()
    work, teaching = Work.of(shape, kind, lora.r), Work.of(shape)

    def flops(batch: Any) -> float:
        targets = sum(batch.targets)
        if hasattr(batch, "shown"):
            seen = sum(batch.shown)
            total = work.flops(batch.lengths, targets=targets, views=seen, photo_tokens=seen)
            if batch.whole_lengths:
                every = len(batch.views)
                places = every * shape.patches
                total += teaching.flops(batch.whole_lengths, targets=targets, views=every, photo_tokens=places)
            if task.patches:
                total += teaching.flops((), targets=0, views=seen, photo_tokens=seen * shape.patches)
            return total
        return work.flops(batch.lengths, targets=targets, photo_tokens=0 if batch.items is None else len(batch.items))

    return flops
