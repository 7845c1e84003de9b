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


def counted(task, batch, *, backward: bool = True) -> int:
    with FlopCounterMode(display=False) as counter:
        losses = task(batch)
        if backward:
            losses.sum().backward()
    return counter.get_total_flops()


def shape(backbone: Backbone) -> ModelDims:
    return ModelDims.from_config(backbone.model.config.to_dict())


def unmasked(work: FlopCosts, length: int) -> float:
    """What plain kernels compute beyond causal attention: every token looks at every token, half of it is masked."""
    return SAMPLES * (length**2 - length * (length + 1) / 2) * work.pair


def test_a_batch_tells_its_own_work(backbone: Backbone) -> None:
    """As the loop asks, with fewer views of one photo, and with the teacher's pass over every patch."""
    model = add_adapter(backbone, "vision", LoraSettings(r=3))
    task, batch = DistillTask(model, top_k=4), photo_batch(backbone)
    batch = replace(batch, views_shown=(5, 2, 5), text=text(backbone, 1))
    batch.text.input_ids[1, 4:7] = 1
    asked = make_flops_counter(task)
    work = FlopCosts.of(shape(backbone), "vision", 3)
    assert asked(batch) == work.flops((LENGTH,) * SAMPLES, targets=SAMPLES * TARGETS, views=12, photo_tokens=12)

    places = 9 + 2 * 3 * (2 * 3 + 1)  # patches of the whole, and of the quarters with a newline for each row
    ids = torch.ones(SAMPLES, LENGTH + places, dtype=torch.long)
    ids[:, 2 : 2 + places] = backbone.encoder.image_token_id
    labels = torch.full_like(ids, IGNORED)
    labels[:, -TARGETS:] = 1
    lengths = (LENGTH + places,) * SAMPLES
    taught = replace(batch, teacher_text=Batch(ids, labels, torch.tensor(lengths)), teacher_lengths=lengths)
    plain = unmasked(work, LENGTH) + unmasked(FlopCosts.of(shape(backbone)), LENGTH + places)
    assert counted(task.train(), taught) == pytest.approx(asked(taught) + plain, rel=1e-3)


def test_stage_1_beside_the_patches_of_its_views(backbone: Backbone) -> None:
    model = add_adapter(backbone, "vision", LoraSettings(r=3))
    task, batch = DistillTask(model, patches=0.5), photo_batch(backbone)
    plain = unmasked(FlopCosts.of(shape(backbone), "vision", 3), LENGTH)
    assert make_flops_counter(task)(batch) > 1.05 * make_flops_counter(DistillTask(model))(batch)
    assert counted(task.train(), batch) == pytest.approx(make_flops_counter(task)(batch) + plain, rel=1e-3)


def test_stage_1(backbone: Backbone) -> None:
    work = FlopCosts.of(shape(backbone), "vision", 3)
    model = add_adapter(backbone, "vision", LoraSettings(r=3))
    expected = work.flops((LENGTH,) * SAMPLES, targets=SAMPLES * TARGETS, views=5 * SAMPLES, photo_tokens=5 * SAMPLES)
    expected += unmasked(work, LENGTH)
    assert counted(DistillTask(model), photo_batch(backbone)) == pytest.approx(expected, rel=1e-3)


def test_stage_2(backbone: Backbone) -> None:
    work = FlopCosts.of(shape(backbone), "language", 3)
    del backbone.model.model.vision_tower
    model = add_adapter(backbone, "language", LoraSettings(r=3))
    expected = work.flops((LENGTH,) * SAMPLES, targets=SAMPLES * TARGETS, photo_tokens=5 * SAMPLES * PHOTOS)
    task, batch = TuneTask(model), list_batch(backbone)
    assert make_flops_counter(task)(batch) == expected
    assert counted(task, batch) == pytest.approx(expected + unmasked(work, LENGTH), rel=1e-3)


def test_stage_2_with_the_vision_tower_in_the_loop(backbone: Backbone) -> None:
    """Frozen and upstream of all that is trained, it is only ever run forward."""
    work = FlopCosts.of(shape(backbone), "language", 3)
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
    assert counted(task, batch) == pytest.approx(expected + unmasked(work, LENGTH), rel=1e-3)


def test_without_gradients(backbone: Backbone) -> None:
    model = add_adapter(backbone, "vision", LoraSettings(r=3))
    work = FlopCosts.of(shape(backbone), "vision", 3, training=False)
    views = photo_batch(backbone).views
    with torch.no_grad():
        seen = counted(lambda v: cls_tokens(model, v), views, backward=False)
    assert seen == pytest.approx(work.flops((), targets=0, views=5 * SAMPLES), rel=1e-3)


def test_a_trained_language_model_costs_six_per_weight_and_a_frozen_one_four(backbone: Backbone) -> None:
    """The rule of thumb, where adapters are small and the first layer is one of many."""
    linears = sum(p.numel() for n, p in backbone.model.model.language_model.named_parameters() if p.dim() == 2)
    linears -= backbone.model.get_input_embeddings().weight.numel()
    assert FlopCosts.of(shape(backbone), "vision", 3).token == 4 * linears
    assert FlopCosts.of(shape(backbone)).token == 2 * linears


def test_a_token_looks_at_those_before_it_and_at_itself(backbone: Backbone) -> None:
    work = FlopCosts.of(shape(backbone))
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
    ],
)
def test_devices_are_known_by_whole_words(name: str, flops: float | None) -> None:
    assert listed_peak(name) == flops
