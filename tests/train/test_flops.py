"""The formula against torch's own count of what a small model did."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lavic.mini import architecture
from lavic.mini.architecture import Architecture
from lavic.mini.tokenizer import make_tokenizer
from lavic.model.config import LoraSettings, ModelSettings
from lavic.model.dims import ModelDims
from lavic.model.inputs.label_mask import IGNORED, Batch
from lavic.model.loading import Backbone
from lavic.model.lora import add_adapter
from lavic.model.visual_tokens import cls_tokens
from lavic.train.distillation.dataset import PhotoBatch
from lavic.train.distillation.task import DistillTask
from lavic.train.measure.flops import FlopCosts, make_flops_counter
from lavic.train.measure.peak_flops import listed_peak
from lavic.train.recommendation.dataset import TuneBatch
from lavic.train.recommendation.task import TuneTask

SAMPLES, LENGTH, TARGETS, PHOTOS = 3, 70, 4, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    """Sizes that differ from each other, so that a formula that takes one for the other comes out wrong."""
    tokenizer = make_tokenizer(["some words to say"])
    small = Architecture(view=36, patch=12, vision_width=24, vision_layers=3, width=48, layers=3, heads=4)
    path = tmp_path_factory.mktemp("base")
    architecture.save(architecture.build(small, tokenizer), tokenizer, path)
    return path


@pytest.fixture
def backbone(folder) -> Backbone:
    # fused attention is not counted by torch on a CPU
    return Backbone.load(ModelSettings(name=str(folder), attention="eager"))


def text(backbone: Backbone, photos: int) -> Batch:
    ids = torch.ones(SAMPLES, LENGTH, dtype=torch.long)
    ids[:, 2 : 2 + 5 * photos] = backbone.encoder.image_token_id
    labels = torch.full_like(ids, IGNORED)
    labels[:, -TARGETS:] = 1
    return Batch(ids, labels, torch.full((SAMPLES,), LENGTH))


def photo_batch(backbone: Backbone) -> PhotoBatch:
    size = backbone.geometry.size
    views = torch.randn(SAMPLES * 5, 3, size, size)
    named = {"keys": ("",) * SAMPLES, "targets": (TARGETS,) * SAMPLES, "lengths": (LENGTH,) * SAMPLES}
    shapes = {"sizes": ((size, size),) * SAMPLES, "grids": ((2, 2),) * SAMPLES, "views_shown": (5,) * SAMPLES}
    return PhotoBatch(**named, text=text(backbone, 1), views=views, **shapes)


def list_batch(backbone: Backbone) -> TuneBatch:
    items = torch.randn(SAMPLES * PHOTOS * 5, backbone.vision_width)
    named = {"keys": ("",) * SAMPLES, "targets": (TARGETS,) * SAMPLES, "lengths": (LENGTH,) * SAMPLES}
    return TuneBatch(**named, text=text(backbone, PHOTOS), items=items)


def counted_flops(task, batch, *, backward: bool = True) -> int:
    with FlopCounterMode(display=False) as counter:
        losses = task(batch)
        if backward:
            losses.sum().backward()
    return counter.get_total_flops()


def dims_of(backbone: Backbone) -> ModelDims:
    return ModelDims.from_config(backbone.model.config.to_dict())


def masked_attention_flops(work: FlopCosts, length: int) -> float:
    """FLOPs of the masked half of attention, which plain kernels compute too."""
    return SAMPLES * (length**2 - length * (length + 1) / 2) * work.pair


def test_make_flops_counter_counts_views_and_teacher(backbone: Backbone) -> None:
    """With fewer views of one photo, and with the teacher's pass over every patch."""
    model = add_adapter(backbone, "vision", LoraSettings(r=3))
    task, batch = DistillTask(model, top_k=4), photo_batch(backbone)
    batch = replace(batch, views_shown=(5, 2, 5), text=text(backbone, 1))
    batch.text.input_ids[1, 4:7] = 1
    flops_of = make_flops_counter(task)
    work = FlopCosts.of(dims_of(backbone), "vision", 3)
    assert flops_of(batch) == work.flops((LENGTH,) * SAMPLES, targets=SAMPLES * TARGETS, views=12, photo_tokens=12)

    image_tokens = 9 + 2 * 3 * (2 * 3 + 1)  # patches of the thumbnail, and of the quarters with a newline for each row
    ids = torch.ones(SAMPLES, LENGTH + image_tokens, dtype=torch.long)
    ids[:, 2 : 2 + image_tokens] = backbone.encoder.image_token_id
    labels = torch.full_like(ids, IGNORED)
    labels[:, -TARGETS:] = 1
    lengths = (LENGTH + image_tokens,) * SAMPLES
    with_teacher = replace(batch, teacher_text=Batch(ids, labels, torch.tensor(lengths)), teacher_lengths=lengths)
    plain = masked_attention_flops(work, LENGTH) + masked_attention_flops(
        FlopCosts.of(dims_of(backbone)), LENGTH + image_tokens
    )
    assert counted_flops(task.train(), with_teacher) == pytest.approx(flops_of(with_teacher) + plain, rel=1e-3)


def test_stage_1_with_patch_distance(backbone: Backbone) -> None:
    model = add_adapter(backbone, "vision", LoraSettings(r=3))
    task, batch = DistillTask(model, patches=0.5), photo_batch(backbone)
    plain = masked_attention_flops(FlopCosts.of(dims_of(backbone), "vision", 3), LENGTH)
    assert make_flops_counter(task)(batch) > 1.05 * make_flops_counter(DistillTask(model))(batch)
    assert counted_flops(task.train(), batch) == pytest.approx(make_flops_counter(task)(batch) + plain, rel=1e-3)


def test_stage_1_flops_equal_those_counted(backbone: Backbone) -> None:
    work = FlopCosts.of(dims_of(backbone), "vision", 3)
    model = add_adapter(backbone, "vision", LoraSettings(r=3))
    expected = work.flops((LENGTH,) * SAMPLES, targets=SAMPLES * TARGETS, views=5 * SAMPLES, photo_tokens=5 * SAMPLES)
    expected += masked_attention_flops(work, LENGTH)
    assert counted_flops(DistillTask(model), photo_batch(backbone)) == pytest.approx(expected, rel=1e-3)


def test_stage_2_flops_equal_those_counted(backbone: Backbone) -> None:
    work = FlopCosts.of(dims_of(backbone), "language", 3)
    del backbone.model.model.vision_tower
    model = add_adapter(backbone, "language", LoraSettings(r=3))
    expected = work.flops((LENGTH,) * SAMPLES, targets=SAMPLES * TARGETS, photo_tokens=5 * SAMPLES * PHOTOS)
    task, batch = TuneTask(model), list_batch(backbone)
    assert make_flops_counter(task)(batch) == expected
    assert counted_flops(task, batch) == pytest.approx(expected + masked_attention_flops(work, LENGTH), rel=1e-3)


def test_stage_2_with_the_vision_tower_in_the_loop(backbone: Backbone) -> None:
    """The tower is frozen and upstream of all trained weights: it has no backward pass."""
    work = FlopCosts.of(dims_of(backbone), "language", 3)
    model = add_adapter(backbone, "language", LoraSettings(r=3))
    views = torch.randn(SAMPLES * PHOTOS * 5, 3, backbone.geometry.size, backbone.geometry.size)
    batch = list_batch(backbone)

    def task(_: object) -> torch.Tensor:
        return TuneTask(model)(TuneBatch(**{**vars(batch), "items": cls_tokens(model, views)}))

    expected = work.flops(
        (LENGTH,) * SAMPLES,
        targets=SAMPLES * TARGETS,
        views=5 * SAMPLES * PHOTOS,
        photo_tokens=5 * SAMPLES * PHOTOS,
    )
    assert counted_flops(task, batch) == pytest.approx(expected + masked_attention_flops(work, LENGTH), rel=1e-3)


def test_forward_flops_without_gradients(backbone: Backbone) -> None:
    model = add_adapter(backbone, "vision", LoraSettings(r=3))
    work = FlopCosts.of(dims_of(backbone), "vision", 3, training=False)
    views = photo_batch(backbone).views
    with torch.no_grad():
        flops = counted_flops(lambda v: cls_tokens(model, v), views, backward=False)
    assert flops == pytest.approx(work.flops((), targets=0, views=5 * SAMPLES), rel=1e-3)


def test_flops_per_token_are_4_per_frozen_weight_in_training(backbone: Backbone) -> None:
    """The rule of thumb for small adapters; 2 per weight in a forward pass."""
    linears = sum(p.numel() for n, p in backbone.model.model.language_model.named_parameters() if p.dim() == 2)
    linears -= backbone.model.get_input_embeddings().weight.numel()
    assert FlopCosts.of(dims_of(backbone), "vision", 3).token == 4 * linears
    assert FlopCosts.of(dims_of(backbone)).token == 2 * linears


def test_causal_attention_counts_earlier_tokens_and_itself(backbone: Backbone) -> None:
    work = FlopCosts.of(dims_of(backbone))
    assert work.flops((9,), targets=0) == 9 * work.token + 45 * work.pair


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("Tesla T4", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
    ],
)
def test_listed_peak_matches_whole_words_of_the_device_name(name: str, flops: float | None) -> None:
    assert listed_peak(name) == flops
