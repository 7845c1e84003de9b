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

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lavic.model.inputs import core
from lavic.model.views import VIEWS

PEAKS = {
    "A10": 125e12,
    "A100": 312e12,
    "A10G": 70e12,
    "A40": 149.7e12,
    "A800": 312e12,
    "B200": 2250e12,
    "GB200": 2500e12,
    "H100": 989.4e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H20": 148e12,
    "H200": 989.4e12,
    "H800": 989.4e12,
    "L4": 121e12,
    "L40": 181e12,
    "L40S": 362e12,
    "RTX 3090": 71e12,
    "RTX 4090": 165e12,
    "RTX A6000": 154.8e12,
}
"""Floating point operations per second of dense bfloat16 matrix multiplication, by the makers' data sheets."""

_PARTS = ("vision_tower", "multi_modal_projector", "language_model", "lm_head")
_STAGES = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "out_proj": 1, "down_proj": 3, "fc2": 3, "linear_2": 1}
"""Which linears of a layer come first; the others (gate, up, fc1) are 2, the projector's first 0."""

Place = tuple[int, int, int]
"""Part, layer, stage: what is smaller is upstream."""


@dataclass(frozen=True)
class Linear:
    """One matrix multiplication of a model, with its adapter."""

    place: Place
    inputs: int
    outputs: int
    rank: int
    """Of its adapter; 0 without."""
    trained: bool
    """Whether the adapter is trained."""
    name: str

    def work(self, first: Place | None) -> int:
        """Operations for one token.

        Args:
            first: The first trained place; None where no gradient is wanted.
        """
        size = self.inputs * self.outputs
        adapter = self.rank * (self.inputs + self.outputs)
        forward = size + adapter
        if first is None or first > self.place:
            return 2 * forward
        wanted = first < self.place  # whether the input's gradient is
        backward = wanted * (size + self.rank * self.inputs)
        if self.rank and (self.trained or wanted):
            backward += self.rank * self.outputs + self.trained * adapter
        return 2 * (forward + backward)


@dataclass(frozen=True)
class Work:
    """Operations of one forward pass, and of its backward pass where something is trained, by what makes them."""

    view: float = 0.0
    """Of one view in the vision tower."""
    photo_token: float = 0.0
    """Of one photo token in the projector."""
    token: float = 0.0
    """Of one token in the language model, without attention."""
    pair: float = 0.0
    """Of one token looking at one token in the language model, over all layers."""
    target: float = 0.0
    """Of one target token in the head."""
    causal: bool = True
    """Whether a token looks at those before it only."""

    @classmethod
    def of(cls, model: nn.Module, *, training: bool = True, adapted: bool = True) -> Work:
        """Reads a model's linears.

        Args:
            model: A LlavaNext model, wrapped by PEFT or not, on any device, `meta` too; without its vision tower too.
            training: False counts forward passes only.
            adapted: False leaves its adapter out.
        """
        llava = core(model)
        linears = [linear if adapted else replace(linear, rank=0, trained=False) for linear in read_linears(model)]
        first = min((linear.place for linear in linears if linear.trained), default=None) if training else None
        token = [0.0] * len(_PARTS)
        for linear in linears:
            token[linear.place[0]] += linear.work(first)
        pair = [0.0, 0.0, 0.0]
        for linear in linears:
            if linear.name == "q_proj":
                part, layer, _ = linear.place
                backward = first is not None and first <= (part, layer, 0)
                pair[part] += 4 * linear.outputs * (3 if backward else 1)
        vision = llava.config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        # the patches' convolution lies below everything that is trained
        cut = 2 * patches * vision.num_channels * vision.patch_size**2 * vision.hidden_size if token[0] else 0
        view = cut + (patches + 1) * token[0] + (patches + 1) ** 2 * pair[0]
        return cls(view=view, photo_token=token[1], token=token[2], pair=pair[2], target=token[3])

    def full_attention(self) -> Work:
        """The same, where every token looks at every token: what plain kernels compute before they mask half of it."""
        return replace(self, causal=False)

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
            pairs = length * (length + 1) / 2 if self.causal else length**2
            total += length * self.token + pairs * self.pair
        return total

    @property
    def photo(self) -> float:
        """Of one photo in vision tower and projector, in tokens of the language model."""
        return VIEWS * (self.view + self.photo_token) / self.token


def read_linears(model: nn.Module) -> Iterable[Linear]:
    """Every linear of a LlavaNext model, each with its adapter as one."""
    for path, module in core(model).named_modules():
        names = path.split(".")
        # an adapter's own linears are below the module that it was put on
        if "base_layer" in names or any(name.startswith("lora_") for name in names):
            continue
        base: Any = getattr(module, "base_layer", module)
        if not isinstance(base, nn.Linear):
            continue
        part = next((number for number, part in enumerate(_PARTS) if part in names), None)
        if part is None:
            continue
        layer = re.search(r"\.layers\.(\d+)\.", path)
        stage = _STAGES.get(names[-1], 0 if part == 1 else 2)
        lora = list(getattr(module, "lora_A", {}).values())
        yield Linear(
            place=(part, int(layer[1]) if layer else 0, stage),
            inputs=base.in_features,
            outputs=base.out_features,
            rank=sum(a.out_features for a in lora),
            trained=any(a.weight.requires_grad for a in lora),
            name=names[-1],
        )


def peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations per second that a device can do at most; None for a CPU.

    From the makers' table for bfloat16; else measured, with one large matrix multiplication.
    """
    if device.type != "cuda":
        return None
    known = listed_peak(torch.cuda.get_device_name(device)) if dtype == torch.bfloat16 else None
    return known or measured_peak(device, dtype)


def listed_peak(name: str) -> float | None:
    """The entry of `PEAKS` that a device's name holds as whole words, the longest; None where there is none."""
    found = [key for key in PEAKS if re.search(rf"\b{key}\b", name)]
    return PEAKS[max(found, key=len)] if found else None


def measured_peak(device: torch.device, dtype: torch.dtype, *, side: int = 8192, times: int = 10) -> float:
    """Operations per second of multiplying square matrices, the best of `times`."""
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    spans: list[Sequence[torch.cuda.Event]] = []
    for _ in range(times + 1):
        span = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        span[0].record()
        left @ right
        span[1].record()
        spans.append(span)
    torch.cuda.synchronize(device)
    return 2 * side**3 / min(start.elapsed_time(end) / 1000 for start, end in spans[1:])


def counter(task: nn.Module) -> Callable[[Any], float] | None:
    """What a `Meter` asks of a stage in training: the operations of one batch, its backward pass included.

    Args:
        task: A `DistillTask` or a `TuneTask`; for others there is no answer.
    """
    model = getattr(task, "model", None)
    if model is None:
        return None
    work, teaching = Work.of(model), Work.of(model, training=False, adapted=False)
    vision = core(model).config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2

    def flops(batch: Any) -> float:
        targets = sum(batch.targets)
        if hasattr(batch, "shown"):
            seen = sum(batch.shown)
            total = work.flops(batch.lengths, targets=targets, views=seen, photo_tokens=seen)
            if batch.whole_lengths:
                every = len(batch.views)
                total += teaching.flops(batch.whole_lengths, targets=targets, views=every, photo_tokens=every * patches)
            return total
        return work.flops(batch.lengths, targets=targets, photo_tokens=0 if batch.items is None else len(batch.items))

    return flops
