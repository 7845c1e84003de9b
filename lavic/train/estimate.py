"""What a run will take, before it is started: memory of a GPU, bytes of a checkpoint, steps, arithmetic.

Made from the model's shapes alone (device `meta`), so it needs neither weights nor a GPU. The bytes that a layer keeps
for its way back are counted tensor by tensor as the modules of transformers 5 and PEFT keep them under autograd:

* an adapted linear: its input after dropout, the dropout's mask (one byte), the output of A;
* a norm of the language model: its input in float32; one of the vision tower: its input;
* attention (fused): query, key, value, output, and one float32 per head;
* the feed-forward part: three tensors of its inner width in the language model, two in the vision tower.

A test compares this with what autograd really keeps. With `loop.activations recompute` each layer keeps its input, and
one layer at a time the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from lavic.errors import ConfigError
from lavic.model.inputs import core
from lavic.model.settings import LoraSettings
from lavic.model.views import VIEWS
from lavic.train.flops import PEAKS, Linear, Work, read_linears
from lavic.train.settings import LoopSettings

CARDS = {"16 GB": 15.0, "24 GB": 22.0, "40 GB": 39.0, "48 GB": 44.0, "80 GB": 79.0, "141 GB": 139.0, "192 GB": 178.0}
"""GiB that a card of a size has for a process."""
RESERVE = 2.0
"""GiB for CUDA itself, its libraries' workspaces, and holes between tensors."""
BUCKET = 5e7
"""Elements of ZeRO's buffers, see `engine.zero2_config`."""
SHARE = 0.4
"""Of a GPU's peak, for the time of a step."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A typical training example: what the time of a step is estimated from."""

    tokens: int
    targets: int
    views: int
    """That pass through the vision tower."""
    photo_tokens: int


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes on one GPU, unless said otherwise."""

    weights: float
    """Frozen ones and the adapter's."""
    activations: float
    """Of the largest micro step."""
    optimizer: float
    """This rank's share of masters, moments and gradients, and ZeRO's buffers."""
    checkpoint: float
    """On disk, each."""
    trained: int
    """Parameters of the adapter."""
    frozen: int
    ranks: int
    batch: int
    micro_tokens: int
    """Most tokens of a micro step, on one rank."""
    photos: int
    """Most photos of a micro step in the vision tower, on one rank."""
    micro_steps: int
    """Of a step with typical samples."""
    flops: float
    """Of a step, over all ranks."""
    sample: Sample
    steps: int | None
    """Of the run; None where the training set is not there."""
    samples: int | None
    """In the training set."""

    @property
    def memory(self) -> float:
        """GiB on one GPU."""
        return (self.weights + self.activations + self.optimizer) / 2**30 + RESERVE

    def __str__(self) -> str:
        card = next((name for name, room in CARDS.items() if self.memory <= room), None)
        fits = f"fits a GPU of {card}" if card else "fits no GPU"
        if self.ranks > 1:
            fits += f", {self.ranks} of them"
        seconds = {name: self.flops / (self.ranks * SHARE * PEAKS[name]) for name in ("A100", "H100")}
        typical = f"{self.sample.tokens} tokens" + (f" and {self.sample.views} views" if self.sample.views else "")
        rows = [
            ("weights", f"{_gib(self.weights)}  {self.frozen / 1e9:.2f} billion frozen, {self.trained:,} trained"),
            ("activations", f"{_gib(self.activations)}  of {self._micro_step()}"),
            ("optimizer", f"{_gib(self.optimizer)}  with gradients and buffers"),
            ("reserve", f"{_gib(RESERVE * 2**30)}  CUDA and its libraries"),
            ("per GPU", f"{_gib(self.memory * 2**30)}  {fits}"),
            ("checkpoint", f"{self.checkpoint / 1e6:9.1f} MB   on disk, each"),
            (
                "batch",
                f"{self.batch} samples a step, {self.batch // self.ranks} on each of {self.ranks} ranks; "
                f"micro steps: about {self.micro_steps}",
            ),
            (
                "steps",
                f"{self.steps}, of {self.samples} samples" if self.steps else "unknown: the training set is not there",
            ),
            (
                "arithmetic",
                f"{self.flops / 1e12:.0f} TFLOP a step of samples with {typical}: at {SHARE:.0%} of the peak "
                + ", ".join(f"{value:.1f} s on {self.ranks} {name}" for name, value in seconds.items()),
            ),
        ]
        if self.steps:
            hours = {name: value * self.steps / 3600 for name, value in seconds.items()}
            rows.append(("in all", ", ".join(f"{value:.1f} h on {self.ranks} {name}" for name, value in hours.items())))
        return "\n".join(f"{name:<12}{text}" for name, text in rows)

    def _micro_step(self) -> str:
        photos = f", {self.photos} photo{'s' * (self.photos != 1)}" if self.photos else ""
        return f"a micro step of at most {self.micro_tokens} tokens{photos}"


def estimate(
    model: nn.Module,
    lora: LoraSettings,
    loop: LoopSettings,
    *,
    ranks: int,
    max_length: int,
    sample: Sample,
    samples: int | None,
    element: int = 2,
) -> Estimate:
    """Reads the shapes of a model with its adapter.

    Args:
        model: A LlavaNext model wrapped by PEFT, on `meta`; without vision tower in stage 2.
        lora: Its adapter's settings.
        loop: Batch, budget, activations.
        ranks: Processes, one GPU each.
        max_length: Longest text, tokens.
        sample: A typical one.
        samples: In the training set; None where it is not there.
        element: Bytes of a number in weights and activations.

    Raises:
        ConfigError: The ranks cannot share the batch.
    """
    micro_batch, _ = loop.split(ranks)
    work = Work.of(model)
    overhead = round(work.photo) if sample.views else 0
    budget = loop.micro_tokens or micro_batch * (max_length + overhead)
    most = min(micro_batch, max(1, budget // (sample.tokens + overhead)))
    photos = most if sample.views else 0
    tokens = min(micro_batch * max_length, max(max_length, budget - photos * overhead))
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    frozen = sum(p.numel() for p in parameters) - trained
    if not trained:
        raise ConfigError("the model has no trainable parameter: do the LoRA targets match it?")
    kept = kept_bytes(model, lora, loop, element=element)
    vision = core(model).config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2 + 1
    return Estimate(
        weights=element * (frozen + trained),
        activations=tokens * kept["language"] + photos * VIEWS * patches * kept["vision"],
        # master, two moments and the summed gradient in float32, over the ranks; buffers to reduce and to gather
        optimizer=16 * trained / ranks + 2 * element * min(BUCKET, trained) + element * trained,
        checkpoint=12 * trained,
        trained=trained,
        frozen=frozen,
        ranks=ranks,
        batch=loop.batch,
        micro_tokens=tokens,
        photos=photos,
        micro_steps=-(-loop.batch // (ranks * most)),
        flops=loop.batch
        * work.flops((sample.tokens,), targets=sample.targets, views=sample.views, photo_tokens=sample.photo_tokens),
        sample=sample,
        steps=loop.total(samples) if samples else None,
        samples=samples,
    )


def kept_bytes(
    model: nn.Module, lora: LoraSettings, loop: LoopSettings, *, element: int = 2, mask: int = 1
) -> dict[str, float]:
    """Bytes that each token of language model and vision tower keeps for the way back, over all layers.

    Args:
        model: A LlavaNext model wrapped by PEFT.
        lora: For its dropout.
        loop: For `activations`.
        element: Bytes of a number.
        mask: Bytes of a dropout mask's entry: 1 on a GPU, `element` on a CPU.
    """
    config = core(model).config
    linears = list(read_linears(model))
    kept = {}
    for part, name, sizes in ((0, "vision", config.vision_config), (2, "language", config.text_config)):
        own = [linear for linear in linears if linear.place[0] == part]
        depth = len({linear.place[1] for linear in own})
        if not depth:
            kept[name] = 0.0
            continue
        layer = _layer_bytes([linear for linear in own if linear.place[1] == 0], sizes, lora, element, mask)
        if loop.activations == "recompute":
            kept[name] = depth * element * sizes.hidden_size + layer
        else:
            kept[name] = depth * layer
    return kept


def _layer_bytes(linears: list[Linear], sizes: Any, lora: LoraSettings, element: int, mask: int) -> float:
    by_name = {linear.name: linear for linear in linears}
    dropped = element + mask if lora.dropout else element
    adapters = sum(linear.inputs * dropped + linear.rank * element for linear in linears if linear.trained)
    if not lora.dropout:
        # without dropout the linears that read the same tensor keep it once, and attention's output is kept anyway
        shared = [
            name
            for name in ("k_proj", "v_proj", "up_proj", "o_proj", "out_proj")
            if name in by_name and by_name[name].trained
        ]
        adapters -= sum(by_name[name].inputs * element for name in shared)
    query, key = by_name["q_proj"].outputs, by_name["k_proj"].outputs
    attention = 2 * element * (query + key) + 4 * sizes.num_attention_heads
    gated = "gate_proj" in by_name
    norms = 2 * (4 * sizes.hidden_size + 4) if gated else 2 * element * (sizes.hidden_size + 2)
    return adapters + norms + attention + (3 if gated else 2) * element * sizes.intermediate_size


def _gib(size: float) -> str:
    return f"{size / 2**30:9.2f} GiB"
