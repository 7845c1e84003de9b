"""The memory estimate of a dry run against the bytes that autograd saves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, LlavaNextConfig, LlavaNextForConditionalGeneration, MistralConfig

from lavic.cli import main
from lavic.model.config import Kind, LoraSettings, ModelSettings
from lavic.model.dims import ModelDims
from lavic.model.hub import read_config
from lavic.model.inputs.label_mask import IGNORED, Batch
from lavic.model.lora import trainable, wrap
from lavic.train.activation_checkpointing import configure_layers
from lavic.train.config import LoopSettings
from lavic.train.distillation.dataset import PhotoBatch
from lavic.train.distillation.task import DistillTask
from lavic.train.measure.memory_estimate import TypicalSample, activation_bytes, estimate_resources
from lavic.train.recommendation.dataset import TuneBatch
from lavic.train.recommendation.task import TuneTask
from tests.train.assets import KEY, Assets

SAMPLES, LENGTH, PATCHES = 2, 64, 17


def small_config(*, layers: int, vision_layers: int) -> LlavaNextConfig:
    """A small config in which no size is twice another."""
    return LlavaNextConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=48,
            intermediate_size=208,
            num_hidden_layers=vision_layers,
            num_attention_heads=4,
            image_size=56,
            patch_size=14,
        ).to_dict(),
        text_config=MistralConfig(
            vocab_size=100,
            hidden_size=128,
            intermediate_size=448,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=2,
            sliding_window=None,
            tie_word_embeddings=False,
        ).to_dict(),
        image_token_index=5,
        tie_word_embeddings=False,
    )


def model(kind: Kind, lora: LoraSettings, config: LlavaNextConfig) -> nn.Module:
    """In bfloat16, as on a GPU."""
    wrapped = LlavaNextForConditionalGeneration._from_config(
        config, dtype=torch.bfloat16, attn_implementation="sdpa"
    ).requires_grad_(False)
    wrapped = wrap(wrapped, kind, lora)
    for parameter in trainable(wrapped):
        parameter.data = parameter.data.bfloat16()
    return wrapped


def bytes_saved_by_autograd(task: nn.Module, batch: object) -> int:
    saved_bytes: dict[int, int] = {}
    references = []  # keeps tensors alive: reused memory would be counted once
    parameters = {p.untyped_storage().data_ptr() for p in task.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved_bytes[storage.data_ptr()] = storage.nbytes()
            references.append(tensor)
        return tensor

    task.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        task(batch)
    return sum(saved_bytes.values())


def run(kind: Kind, lora: LoraSettings, loop: LoopSettings, layers: int, vision_layers: int) -> int:
    wrapped = model(kind, lora, small_config(layers=layers, vision_layers=vision_layers))
    configure_layers(wrapped, loop)
    photos = 1 if kind == "vision" else 2
    ids = torch.ones(SAMPLES, LENGTH, dtype=torch.long)
    ids[:, 2 : 2 + 5 * photos] = 5
    labels = torch.full_like(ids, IGNORED)
    labels[:, -3:] = 1
    named = {"keys": ("",) * SAMPLES, "targets": (3,) * SAMPLES, "lengths": (LENGTH,) * SAMPLES}
    text = Batch(ids, labels, torch.full((SAMPLES,), LENGTH))
    if kind == "vision":
        views = torch.randn(SAMPLES * 5, 3, 56, 56)
        shapes = {"sizes": ((56, 56),) * SAMPLES, "grids": ((2, 2),) * SAMPLES, "views_shown": (5,) * SAMPLES}
        batch = PhotoBatch(**named, text=text, views=views, **shapes)
        return bytes_saved_by_autograd(DistillTask(wrapped), batch)
    items = torch.randn(SAMPLES * 2 * 5, 48, dtype=torch.bfloat16)
    return bytes_saved_by_autograd(TuneTask(wrapped), TuneBatch(**named, text=text, items=items))


@pytest.mark.parametrize("kind", ["vision", "language"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_activation_bytes_equal_those_saved_by_autograd(kind: Kind, dropout: float) -> None:
    """Per layer, from the difference of one layer; on a CPU the dropout mask has the dtype of the input."""
    lora, loop = LoraSettings(r=4, dropout=dropout), LoopSettings()
    base = run(kind, lora, loop, 3, 3)
    kept = activation_bytes(
        ModelDims.from_config(small_config(layers=1, vision_layers=1).to_dict()), kind, lora, loop, mask=2
    )
    text = (base - run(kind, lora, loop, 2, 3)) / (SAMPLES * LENGTH)
    assert text == pytest.approx(kept["language"], rel=0.01)
    if kind == "vision":
        views = (base - run(kind, lora, loop, 3, 2)) / (SAMPLES * 5 * PATCHES)
        assert views == pytest.approx(kept["vision"], rel=0.01)


def test_a_checkpointed_layer_saves_its_input_only() -> None:
    lora, loop = LoraSettings(r=4), LoopSettings(activation_checkpointing=True)
    difference = run("language", lora, loop, 4, 1) - run("language", lora, loop, 2, 1)
    shapes = [ModelDims.from_config(small_config(layers=layers, vision_layers=1).to_dict()) for layers in (4, 2)]
    four, two = (activation_bytes(shape, "language", lora, loop)["language"] for shape in shapes)
    assert difference / (SAMPLES * LENGTH) == pytest.approx(four - two, rel=0.02)


def test_estimate_for_stage_2_of_the_7b_model() -> None:
    estimate = estimate_resources(
        ModelDims.from_config(read_config(ModelSettings())),
        "language",
        LoraSettings(),
        LoopSettings(global_batch_size=64, micro_tokens=8192),
        ranks=8,
        max_length=2048,
        sample=TypicalSample(tokens=900, targets=10, views=0, photo_tokens=50),
        samples=640,
    )
    query, value, mlp = 4096 + 4096, 4096 + 1024, 4096 + 14336
    assert estimate.trained == 32 * 8 * (2 * query + 2 * value + 3 * mlp)
    assert estimate.frozen == pytest.approx(7.263e9, rel=0.0001), "all but the vision tower"
    assert estimate.steps == 10
    assert estimate.zero.checkpoint == 12 * estimate.trained
    # four FLOPs per frozen weight and token
    assert estimate.flops == pytest.approx(64 * 900 * 4 * 7.0e9, rel=0.05)


@pytest.mark.parametrize("command", ["distill", "tune"])
def test_a_dry_run_reads_no_weights_and_starts_nothing(
    command: str, assets: Assets, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_bytes((assets.base / "config.json").read_bytes())
    inputs = {
        "distill": ["--shards", assets.photos, "--valid", assets.valid],
        "tune": ["--store", "nowhere", "--train", assets.rows, "--valid", "nowhere", "--candidates", KEY],
    }[command]
    argv = [
        command,
        *map(str, inputs),
        "--out",
        str(tmp_path / "run"),
        "--model.name",
        str(base),
        "--loop.global-batch-size",
        "8",
    ]
    assert main([*argv, "--nproc", "4", "--dry-run"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["batch"].startswith("8 samples a step, 2 on each of 4 ranks")
    assert lines["steps"].startswith("15, of 24 samples" if command == "distill" else "5, of 35 samples")
    assert not (tmp_path / "run").exists()


def test_a_dry_run_without_model_or_data_says_unknown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["tune", "--store", "a", "--train", "b", "--valid", "c", "--out", str(tmp_path / "run"), "--dry-run"]
    assert main(argv) == 0
    assert "unknown: the training set does not exist yet" in capsys.readouterr().out
    assert main([*argv, "--model.name", "some/other"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "some/other: no such folder, and not in Hugging Face's cache" in line


@pytest.mark.parametrize(
    ("gpu", "gib"), [("24gb", 24e9 / 2**30), ("80gb", 80e9 / 2**30), ("8gpu", 80e9 / 2**30), ("4x8", 80e9 / 2**30)]
)
@pytest.mark.parametrize("command", ["distill", "tune"])
def test_7b_configurations_fit_their_gpus(
    command: str, gpu: str, gib: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = {"distill": ["--shards", "a"], "tune": ["--store", "a", "--train", "b"]}[command]
    argv = [command, "--config", f"{command}-7b-{gpu}", *inputs, "--valid", "c", "--out", str(tmp_path / "run")]
    ranks = {"8gpu": "8", "4x8": "32"}.get(gpu, "1")
    assert main([*argv, "--nproc", ranks, "--dry-run"]) == 0
    lines = dict(
        line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if not line.startswith("per GPU")
    )
    assert {"weights", "activations", "optimizer", "checkpoint", "batch", "steps"} <= lines.keys()
    parts = [float(lines[name].split()[0]) for name in ("weights", "activations", "optimizer", "reserve")]
    assert 14 < sum(parts) < gib
