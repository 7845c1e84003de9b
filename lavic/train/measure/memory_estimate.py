"""Estimates what a run will take: GPU memory, checkpoint size, steps and FLOPs.

Computed from the model's shape: needs no weights, GPU or torch. The activations that a layer saves for its backward
pass are counted tensor by tensor, as autograd saves them for the modules of transformers 5 and PEFT:

* an adapted linear: its input after dropout, the dropout's mask (one byte), the output of A;
* a norm of the language model: its input in float32; one of the vision tower: its input;
* attention (fused): query, key, value, output, and one float32 per head;
* the feed-forward part: three tensors of its inner width in the language model, two in the vision tower.

A test compares this with what autograd saves. With `loop.activation_checkpointing` each layer saves its input, and one
layer at a time the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lavic.model.config import Kind, LoraSettings
from lavic.model.dims import ADAPTED, LANGUAGE, TOWER, ModelDims
from lavic.train.config import LoopSettings
from lavic.train.deepspeed.config import Zero2Footprint
from lavic.train.measure.flops import FlopCosts
from lavic.train.measure.peak_flops import PEAK_FLOPS

GPU_MEMORY_GIB = {
    "16 GB": 15.0,
    "24 GB": 22.0,
    "40 GB": 39.0,
    "48 GB": 44.0,
    "80 GB": 79.0,
    "141 GB": 139.0,
    "192 GB": 178.0,
}
"""GiB that a process can use on a GPU of that size."""
RESERVED_GIB = 2.0
"""GiB for the CUDA context, library workspaces and fragmentation."""
ASSUMED_MFU = 0.4
"""Share of a GPU's peak that the time of a step assumes."""


@dataclass(frozen=True, kw_only=True)
class TypicalSample:
    """A typical training example: the time of a step is estimated from it."""

    tokens: int
    targets: int
    views: int
    """Views that pass through the vision tower."""
    photo_tokens: int


@dataclass(frozen=True, kw_only=True)
class ResourceEstimate:
    """What a run will take."""

    zero: Zero2Footprint
    """What a rank holds, sends and saves."""
    activations: float
    """Bytes of the largest micro-step, on one GPU."""
    trained: int
    """Parameters of the adapter."""
    frozen: int
    ranks: int
    batch: int
    micro_tokens: int
    """Maximum number of tokens of a micro-step, on one rank."""
    photos: int
    """Maximum number of photos of a micro-step in the vision tower, on one rank."""
    micro_steps: int
    """Micro-steps of a step with typical samples."""
    flops: float
    """FLOPs of a step, over all ranks."""
    sample: TypicalSample
    steps: int | None
    """Steps of the run; None where the training set does not exist yet."""
    samples: int | None
    """Samples in the training set."""

    @property
    def memory(self) -> float:
        """GiB on one GPU."""
        return (self.zero.memory + self.activations) / 2**30 + RESERVED_GIB

    def __str__(self) -> str:
        card = next((name for name, usable in GPU_MEMORY_GIB.items() if self.memory <= usable), None)
        fits = f"fits a GPU of {card}" if card else "fits no GPU"
        if self.ranks > 1:
            fits += f", {self.ranks} of them"
        network = [("network", f"{self.zero.traffic / 1e6:9.1f} MB   sent by each rank in a step")]
        seconds = {name: self.flops / (self.ranks * ASSUMED_MFU * PEAK_FLOPS[name]) for name in ("A100", "H100")}
        typical = f"{self.sample.tokens} tokens" + (f" and {self.sample.views} views" if self.sample.views else "")
        rows = [
            ("weights", f"{_gib(self.zero.weights)}  {self.frozen / 1e9:.2f} billion frozen, {self.trained:,} trained"),
            ("activations", f"{_gib(self.activations)}  of {self._micro_step()}"),
            ("optimizer", f"{_gib(self.zero.optimizer + self.zero.gradients)}  with gradients and buffers"),
            ("reserve", f"{_gib(RESERVED_GIB * 2**30)}  CUDA and its libraries"),
            ("per GPU", f"{_gib(self.memory * 2**30)}  {fits}"),
            ("checkpoint", f"{self.zero.checkpoint / 1e6:9.1f} MB   on disk, each"),
            *(network if self.ranks > 1 else ()),
            (
                "batch",
                f"{self.batch} samples a step, {self.batch // self.ranks} on each of {self.ranks} ranks; "
                f"micro-steps: about {self.micro_steps}",
            ),
            (
                "steps",
                f"{self.steps}, of {self.samples} samples"
                if self.steps
                else "unknown: the training set does not exist yet",
            ),
            (
                "compute",
                f"{self.flops / 1e12:.0f} TFLOP a step of samples with {typical}: at {ASSUMED_MFU:.0%} of the peak "
                + ", ".join(f"{value:.1f} s on {self.ranks} {name}" for name, value in seconds.items()),
            ),
        ]
        if self.steps:
            hours = {name: value * self.steps / 3600 for name, value in seconds.items()}
            rows.append(
                ("total time", ", ".join(f"{value:.1f} h on {self.ranks} {name}" for name, value in hours.items()))
            )
        return "\n".join(f"{name:<12}{text}" for name, text in rows)

    def _micro_step(self) -> str:
        photos = f", {self.photos} photo{'s' * (self.photos != 1)}" if self.photos else ""
        return f"a micro-step of at most {self.micro_tokens} tokens{photos}"


def estimate_resources(
    shape: ModelDims,
    kind: Kind,
    lora: LoraSettings,
    loop: LoopSettings,
    *,
    ranks: int,
    max_length: int,
    sample: TypicalSample,
    samples: int | None,
    element: int = 2,
) -> ResourceEstimate:
    """What training an adapter will take; stage 2 does not load the vision tower.

    Args:
        ranks: Processes, one GPU each.
        max_length: Longest text, tokens.
        samples: Size of the training set; None where it does not exist yet.
        element: Bytes of an element of weights and activations.

    Raises:
        ConfigError: The ranks cannot share the batch.
    """
    micro_batch, _ = loop.split_batch(ranks)
    work = FlopCosts.of(shape, kind, lora.r)
    overhead = round(work.photo) if sample.views else 0
    budget = loop.micro_tokens or micro_batch * (max_length + overhead)
    samples_per_micro_step = min(micro_batch, max(1, budget // (sample.tokens + overhead)))
    photos = samples_per_micro_step if sample.views else 0
    tokens = min(micro_batch * max_length, max(max_length, budget - photos * overhead))
    trained, frozen = shape.adapter(kind, lora.r), shape.loaded(kind)
    per_token = activation_bytes(shape, kind, lora, loop, element=element)
    micro_steps = -(-loop.global_batch_size // (ranks * samples_per_micro_step))
    return ResourceEstimate(
        zero=Zero2Footprint.of(frozen=frozen, trained=trained, ranks=ranks, element=element, micro_steps=micro_steps),
        activations=tokens * per_token["language"] + photos * shape.tower_tokens * per_token["vision"],
        trained=trained,
        frozen=frozen,
        ranks=ranks,
        batch=loop.global_batch_size,
        micro_tokens=tokens,
        photos=photos,
        micro_steps=micro_steps,
        flops=loop.global_batch_size
        * work.flops((sample.tokens,), targets=sample.targets, views=sample.views, photo_tokens=sample.photo_tokens),
        sample=sample,
        steps=loop.total_steps(samples) if samples else None,
        samples=samples,
    )


def activation_bytes(
    shape: ModelDims, kind: Kind, lora: LoraSettings, loop: LoopSettings, *, element: int = 2, mask: int = 1
) -> dict[Kind, float]:
    """Bytes that autograd saves for each token of language model and vision tower, over all layers.

    Args:
        shape: Of the model.
        kind: Of its adapter; with `language` the vision tower saves nothing.
        lora: The adapter's settings.
        loop: For `activation_checkpointing`.
        element: Bytes of an element.
        mask: Bytes of an entry of a dropout mask: 1 on a GPU, `element` on a CPU.
    """
    parts: Mapping[Kind, tuple[int, int, int]] = {
        "vision": (TOWER, shape.vision_layers if kind == "vision" else 0, shape.vision_hidden),
        "language": (LANGUAGE, shape.layers, shape.hidden),
    }
    saved: dict[Kind, float] = {}
    for name, (part, layers, hidden) in parts.items():
        layer = _layer_bytes(shape, part, lora if part in ADAPTED[kind] else None, element, mask) if layers else 0.0
        saved[name] = layers * element * hidden + layer if loop.activation_checkpointing else layers * layer
    return saved


def _layer_bytes(shape: ModelDims, part: int, lora: LoraSettings | None, element: int, mask: int) -> float:
    """Bytes that one layer saves for one token; `lora` where the part is adapted."""
    linears = {linear.name: linear for linear in shape.linears() if linear.position[:2] == (part, 0)}
    if part == TOWER:
        hidden, heads, inner = shape.vision_hidden, shape.vision_heads, 2 * shape.vision_mlp
        norms = 2 * element * (hidden + 2)
    else:
        hidden, heads, inner = shape.hidden, shape.heads, 3 * shape.mlp
        norms = 2 * (4 * hidden + 4)
    adapters = 0
    if lora:
        dropped = element + mask if lora.dropout else element
        adapters = sum(linear.inputs * dropped + lora.r * element for linear in linears.values())
        if not lora.dropout:
            # Linears with the same input save it once, and attention's output is saved anyway.
            shared = ("k_proj", "v_proj", "up_proj", "o_proj", "out_proj")
            adapters -= sum(linears[name].inputs * element for name in shared if name in linears)
    attention = 2 * element * (linears["q_proj"].outputs + linears["k_proj"].outputs) + 4 * heads
    return adapters + norms + attention + element * inner


def _gib(size: float) -> str:
    return f"{size / 2**30:9.2f} GiB"
