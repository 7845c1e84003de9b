"""What the GPU benchmark measures: each stage and `embed`, ours and the plain way, on the same weights and samples."""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from gpu_photos import PHOTOS, draw_photos, photo_cut, pillow
from gpu_samples import Lists, Photos
from plain import Plain, stock_cut
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

from lavic.distributed.context import DistributedContext
from lavic.model.config import Kind, LoraSettings
from lavic.model.dims import ModelDims
from lavic.model.hub import SEVEN_B_CONFIG
from lavic.model.lora import trainable, wrap
from lavic.model.tiling import VIEWS, Geometry
from lavic.model.visual_tokens import cls_tokens
from lavic.train.activation_checkpointing import configure_layers
from lavic.train.config import LoopSettings
from lavic.train.deepspeed.engine import Engine
from lavic.train.distillation.task import DistillTask
from lavic.train.input.data_loader import TrainDataLoader, prefetch
from lavic.train.measure.flops import FlopCosts, make_flops_counter
from lavic.train.measure.peak_flops import peak_flops
from lavic.train.measure.throughput import ThroughputMeter
from lavic.train.recommendation.task import TuneTask
from lavic.train.train_step import train_step

LORA = LoraSettings()
LR = 1e-5
SMALL_CONFIG = {
    "model_type": "llava_next",
    "image_token_index": 5,
    "text_config": {
        "model_type": "mistral",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "sliding_window": None,
    },
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
    },
}
"""The 7B model's family at a size for any machine."""


class Bench:
    """The model and the photos, and what is done with them."""

    def __init__(self, chosen: argparse.Namespace, world: DistributedContext) -> None:
        self.chosen, self.world = chosen, world
        self.device = world.device()
        self.dtype = torch.float32 if chosen.small else torch.bfloat16
        self.config = LlavaNextConfig.from_dict(dict(SMALL_CONFIG if chosen.small else SEVEN_B_CONFIG))
        self.shape = ModelDims.from_config(self.config.to_dict())
        vision = self.config.vision_config
        mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
        self.geometry = Geometry(size=vision.image_size, patch=vision.patch_size, mean=mean, std=std)
        self.jpgs = draw_photos()
        self.cut = photo_cut(self.geometry)
        self.peak = peak_flops(self.device, self.dtype)

    def model(self, kind: Kind) -> Any:
        """Random weights, made where they are to be, and an adapter."""
        torch.manual_seed(0)
        with torch.device(self.device):
            made = LlavaNextForConditionalGeneration._from_config(
                self.config, dtype=self.dtype, attn_implementation="sdpa"
            )
        return wrap(made.requires_grad_(False).eval(), kind, LORA)

    def stage(self, number: int) -> dict[str, Any]:
        """Ours, then the plain loop on the same weights and samples."""
        chosen = self.chosen
        model = self.model("vision" if number == 1 else "language")
        llava = model.get_base_model()
        loop = LoopSettings(
            global_batch_size=chosen.batch * self.world.size,
            micro_batch=chosen.micro_batch if number == 1 else None,
            micro_tokens=chosen.micro_tokens[number - 1],
            activation_checkpointing=chosen.activation_checkpointing,
            compile=chosen.compile,
            lr=LR,
            num_workers=chosen.workers,
        )
        data: Any
        tower = None
        if number == 1:
            how = self.tokens(shortest=140, middle=190, longest=400, targets=120)
            data = Photos(self.config, self.jpgs, self.cut, **how)
            data.overhead = round(FlopCosts.of(self.shape, "vision", LORA.r).photo)
        else:
            data = Lists(self.config, self.jpgs, **self.tokens(shortest=400, middle=900, longest=2048))
            # stage 2 has no vision tower; the plain loop gets it back
            tower = llava.model.vision_tower.cpu()
            del llava.model.vision_tower
        configure_layers(model, loop)
        found: dict[str, Any] = {"ours": self.ours(DistillTask(model) if number == 1 else TuneTask(model), data, loop)}
        if not chosen.no_plain and self.world.size == 1:
            if tower is not None:
                llava.model.vision_tower = tower.to(self.device)
            if chosen.activation_checkpointing:
                llava.gradient_checkpointing_disable()
            found["plain"] = self.plain(model, data)
            found["ratio"] = found["ours"]["samples_per_s"] / found["plain"]["samples_per_s"]
        return found

    def tokens(self, **counts: int) -> dict[str, int]:
        """Lengths of the texts, shorter for the small model."""
        return {name: count // 4 if self.chosen.small else count for name, count in counts.items()}

    def ours(self, task: Any, data: Any, loop: LoopSettings) -> dict[str, float]:
        """Our loop."""
        warm, steps = self.chosen.warm, self.chosen.steps
        engine = Engine(task, self.world, loop)
        engine.task.train()  # only then are activations recomputed
        feed = TrainDataLoader(data, self.world, loop)
        with ThroughputMeter(engine.task, self.world, flops=make_flops_counter(task), peak=self.peak) as meter:
            batches = feed.steps(0, warm + steps)
            for step in range(warm + steps):
                if step == warm:
                    self.settle()
                    meter.restart()
                done = train_step(engine, meter.wait(batches), LR, self.world, seed=(step,))
            self.settle()
            figures = {**meter.read(), "loss": done.loss}
        engine.close()
        return figures

    def plain(self, model: Any, data: Any) -> dict[str, float]:
        """The plain loop."""
        stock = self.cut
        if pillow():
            g = self.geometry
            stock = stock_cut(g.size, g.mean, g.std, [[2 * g.size, 2 * g.size]])
        for parameter in trainable(model):
            parameter.grad = None
        loop = Plain(model, stock, lr=LR, pad=0)
        steps, batch = self.chosen.plain_steps, self.chosen.batch
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        for step in range(1 + steps):
            if step == 1:
                self.settle()
                start = time.perf_counter()
            samples = []
            for position in range(step * batch, (step + 1) * batch):
                example = data.example(position)
                samples.append((example.input_ids, example.labels, data.photos(position)))
            loss = loop.step(samples, self.chosen.plain_micro_batch).item()
        self.settle()
        figures = {"samples_per_s": steps * batch / (time.perf_counter() - start), "loss": loss}
        if self.device.type == "cuda":
            figures["peak_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        return figures

    def embed(self) -> dict[str, Any]:
        """Item tokens: photos prepared by workers, against the main process."""
        model = self.model("vision")
        del model.get_base_model().model.language_model
        model.eval()
        batch, count = self.chosen.embed_batch, self.chosen.embed_batches
        view = FlopCosts.of(self.shape, "vision", LORA.r, training=False).view

        def make(number: int) -> torch.Tensor:
            return torch.stack([self.cut(self.jpgs[(number * batch + i) % PHOTOS]) for i in range(batch)])

        found: dict[str, Any] = {}
        for name, workers in (("ours", self.chosen.workers), ("plain", 0)):
            if name == "plain" and self.chosen.no_plain:
                continue
            with torch.no_grad():
                for number, views in enumerate(prefetch(make, range(1 + count), workers)):
                    if number == 1:
                        self.settle()
                        start = time.perf_counter()
                    cls_tokens(model, views.to(self.device)).float().cpu()
            seconds = time.perf_counter() - start
            found[name] = {"items_per_s": count * batch / seconds}
            if self.peak:
                found[name]["mfu"] = VIEWS * view * count * batch / seconds / self.peak
        if "plain" in found:
            found["ratio"] = found["ours"]["items_per_s"] / found["plain"]["items_per_s"]
        return found

    def settle(self) -> None:
        """Waits until the GPU has done what it was told."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
