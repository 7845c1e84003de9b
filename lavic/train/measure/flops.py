"""Floating point operations of a step: for the utilisation in the journal and the estimate of `--dry-run`.

A matrix multiplication of T tokens by a weight of n elements takes 2Tn operations forward, 2Tn backward for the
gradient of its input and 2Tn backward for that of the weight. The weight's gradient is computed for trained weights
(LoRA) alone, the input's where something upstream is trained. So

* a frozen linear above the first trained one costs 4Tn, below it 2Tn (the query, key and value of a language model's
  first layer in stage 2; the whole vision tower, where it runs in stage 2);
* LoRA's A (r x in) and B (out x r) cost 6Tn each, A of the first layer 4Tn: its input needs no gradient;
* without gradients (`embed`, validation) everything costs 2Tn.

T counts the tokens that pass through a part: 5 views of (size / patch)^2 + 1 tokens in the vision tower, 5 per photo in
the projector, the text without its padding in the language model, the target tokens in its head. A layer's attention
costs 4 d for each pair of a token and one that it attends to, and twice that backward; d is the width of all heads
together. In the vision tower S tokens make S^2 pairs, in the causal language model S (S + 1) / 2. Norms, activation
functions and rotations are left out, as is recomputation under activation checkpointing: this is model, not hardware,
FLOPs utilisation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from lavic.model.config import Kind
from lavic.model.dims import ADAPTED, HEAD, LANGUAGE, PROJECTOR, TOWER, LayerPosition, Linear, ModelDims
from lavic.model.tiling import VIEWS


@dataclass(frozen=True, kw_only=True)
class FlopCosts:
    """Operations per view, token and target of a forward pass, and of the backward pass where something is trained."""

    view: float
    """Of one view in the vision tower."""
    photo_token: float
    """Of one photo token in the projector."""
    token: float
    """Of one token in the language model, without attention."""
    pair: float
    """Of one token that attends to one token in the language model, over all layers."""
    target: float
    """Of one target token in the head."""

    @classmethod
    def of(cls, shape: ModelDims, kind: Kind | None = None, r: int = 0, *, training: bool = True) -> FlopCosts:
        """Counts the operations.

        Args:
            kind: Of its adapter; None where it has none.
            training: False counts forward passes only.
        """
        linears = list(shape.linears())
        adapted = ADAPTED[kind] if kind else ()
        positions = (linear.position for linear in linears if linear.position[0] in adapted)
        first = min(positions, default=None) if training else None
        token, pair = dict.fromkeys((TOWER, PROJECTOR, LANGUAGE, HEAD), 0.0), {TOWER: 0.0, LANGUAGE: 0.0}
        for linear in linears:
            part, layer, _ = linear.position
            token[part] += _linear_flops(linear, r if part in adapted else 0, first)
            if linear.name == "q_proj":
                backward = first is not None and first <= (part, layer, 0)
                pair[part] += 4 * linear.outputs * (3 if backward else 1)
        # The patch embedding is below every trained layer: forward only.
        patch_embedding = 2 * shape.patches * shape.patch_numbers * shape.vision_hidden
        tokens = shape.patches + 1
        return cls(
            view=patch_embedding + tokens * token[TOWER] + tokens**2 * pair[TOWER],
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
        """Cost of one photo in vision tower and projector, as a number of language-model tokens."""
        return VIEWS * (self.view + self.photo_token) / self.token


def _linear_flops(linear: Linear, rank: int, first: LayerPosition | None) -> int:
    """Operations of one linear for one token.

    Args:
        linear: The linear.
        rank: Of its adapter; 0 without one.
        first: Position of the first trained linear; None for a forward pass alone.
    """
    size = linear.inputs * linear.outputs
    adapter = rank * (linear.inputs + linear.outputs)
    forward = size + adapter
    if first is None or first > linear.position:
        return 2 * forward
    input_gradient = first < linear.position
    backward = input_gradient * (size + rank * linear.inputs)
    if rank:
        backward += rank * linear.outputs + adapter
    return 2 * (forward + backward)


def make_flops_counter(task: Any) -> Callable[[Any], float] | None:
    """A function that counts the operations of one batch in training, forward and backward.

    Args:
        task: A `DistillTask` or a `TuneTask`; None for others.
    """
    from lavic.model.inputs.token_loss import unwrap_peft

    kind: Kind | None = getattr(task, "trains", None)
    if kind is None:
        return None
    shape = ModelDims.from_config(unwrap_peft(task.model).config.to_dict())
    (lora,) = task.model.peft_config.values()
    training, forward_only = FlopCosts.of(shape, kind, lora.r), FlopCosts.of(shape)

    def flops(batch: Any) -> float:
        targets = sum(batch.targets)
        if hasattr(batch, "views_shown"):
            views = sum(batch.views_shown)
            total = training.flops(batch.lengths, targets=targets, views=views, photo_tokens=views)
            if batch.teacher_lengths:
                teacher_views = len(batch.views)
                total += forward_only.flops(
                    batch.teacher_lengths,
                    targets=targets,
                    views=teacher_views,
                    photo_tokens=teacher_views * shape.patches,
                )
            if task.patches:
                total += forward_only.flops((), targets=0, views=views, photo_tokens=views * shape.patches)
            return total
        items = 0 if batch.items is None else len(batch.items)
        return training.flops(batch.lengths, targets=targets, photo_tokens=items)

    return flops
