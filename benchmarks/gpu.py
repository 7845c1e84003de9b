"""Training speed of the 7B model on a GPU: both stages and `embed`, against the plain loop, in one run.

    python benchmarks/gpu.py --json figures.json              # one GPU of 80 GB; two minutes and 100 GB of nothing else
    python benchmarks/gpu.py --small                          # a small model on whatever is there: does it run?
    torchrun --nproc-per-node 8 benchmarks/gpu.py --only stage1 stage2 --no-plain

LLaVA-v1.6-Mistral-7B's sizes with random weights in bfloat16; token ids, photos and item tokens are drawn. Nothing is
downloaded, and torch, transformers, peft and deepspeed with what they bring are enough; without Pillow photos are
prepared by torch instead, in both loops. Prompts have LaViC's lengths: 400 to 2,048 tokens, half of them under 900, ten
candidates of five tokens, ten target tokens; descriptions have 120 tokens on average.

Utilisation (`mfu`) is the model's own arithmetic without padding and recomputation over the GPU's peak, see
lavic/train/flops.py. The bars, on one H100: stage 2 at 45 %, stage 1 at 40 %, stage 2 at five times the plain loop.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# the repository need not be installed where this runs
# ruff: noqa: E402
sys.path[:0] = [str(Path(__file__).parents[1])]

import numpy as np
import torch
from plain import Plain, stock_cut
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

from lavic.model.adapters import trainable, wrap
from lavic.model.compress import cls_tokens
from lavic.model.inputs import IGNORED, Example, collate
from lavic.model.settings import Kind, LoraSettings
from lavic.model.shape import Shape
from lavic.model.source import SEVEN_B_CONFIG
from lavic.model.views import VIEWS, Geometry
from lavic.train.distillation import DistillTask, PhotoBatch, PhotoSample
from lavic.train.engine import Engine
from lavic.train.feed import Feed, prepare
from lavic.train.flops import Work, counter
from lavic.train.layers import arrange
from lavic.train.loop import take_step
from lavic.train.meter import Meter
from lavic.train.peak import peak
from lavic.train.settings import LoopSettings
from lavic.train.tuning import ListBatch, ListSample, TuneTask
from lavic.world import World

SIDE = 500
BARS = {"stage2_mfu": 0.45, "stage1_mfu": 0.40, "stage2_ratio": 5.0}
LORA = LoraSettings()
LR = 1e-5
ITEMS, PHOTOS = 20_000, 64
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


class Drawn:
    """Training samples without data: what a position holds is a function of the position."""

    overhead = 0

    def __init__(self, config: Any, *, shortest: int, middle: int, longest: int, candidates: int, targets: int) -> None:
        self.config = config
        self.bounds = (shortest, middle, longest)
        self.candidates, self.targets = candidates, targets

    def __len__(self) -> int:
        return 1_000_000

    def length(self, position: int) -> int:
        shortest, middle, longest = self.bounds
        tail = random.Random(position).expovariate(math.log(2) / (middle - shortest))
        return min(longest, shortest + round(tail))

    def example(self, position: int) -> Example:
        """Words, the photos' places early in the prompt, the target at its end."""
        rng, length = np.random.default_rng(position), self.length(position)
        ids = rng.integers(10, min(30_000, self.config.text_config.vocab_size), length)
        places = np.arange(VIEWS * self.candidates)
        ids[1 + places + places // VIEWS * 4] = self.config.image_token_id
        labels = np.full(length, IGNORED)
        labels[-self.targets :] = ids[-self.targets :]
        return Example(ids.tolist(), labels.tolist())

    def named(self, samples: Sequence[Any]) -> dict[str, Any]:
        return {
            "keys": tuple(sample.key for sample in samples),
            "targets": (self.targets,) * len(samples),
            "lengths": tuple(sample.length for sample in samples),
            "text": collate([sample.example for sample in samples], 0),
        }


class Lists(Drawn):
    """Stage 2: item tokens come out of a store as large as a catalogue."""

    def __init__(self, config: Any, jpgs: Sequence[object], **how: int) -> None:
        super().__init__(config, candidates=10, targets=10, **how)
        self.jpgs = jpgs
        self.store = torch.randn(ITEMS, VIEWS, config.vision_config.hidden_size, dtype=torch.float32).half()

    def listed(self, position: int) -> list[int]:
        return random.Random(~position).sample(range(ITEMS), self.candidates)

    def __getitem__(self, position: int) -> ListSample:
        items = torch.cat([self.store[item] for item in self.listed(position)])
        return ListSample(str(position), self.example(position), items)

    def collate(self, samples: Sequence[ListSample]) -> ListBatch:
        return ListBatch(**self.named(samples), items=torch.cat([s.items for s in samples if s.items is not None]))

    def photos(self, position: int) -> list[object]:
        return [self.jpgs[item % len(self.jpgs)] for item in self.listed(position)]


class Photos(Drawn):
    """Stage 1: photos are decoded and cut."""

    def __init__(self, config: Any, jpgs: Sequence[object], cut: Callable[[object], torch.Tensor], **how: int) -> None:
        super().__init__(config, candidates=1, **how)
        self.jpgs, self.cut = jpgs, cut

    def __getitem__(self, position: int) -> PhotoSample:
        (jpg,) = self.photos(position)
        return PhotoSample(str(position), self.example(position), self.cut(jpg), (SIDE, SIDE), (2, 2), VIEWS)

    def collate(self, samples: Sequence[PhotoSample]) -> PhotoBatch:
        count = len(samples)
        shapes = {"sizes": ((SIDE, SIDE),) * count, "grids": ((2, 2),) * count, "shown": (VIEWS,) * count}
        return PhotoBatch(**self.named(samples), views=torch.cat([sample.views for sample in samples]), **shapes)

    def photos(self, position: int) -> list[object]:
        return [self.jpgs[position % len(self.jpgs)]]


def draw_photos() -> list[object]:
    """Soft noise: as JPEG files where Pillow is there, else as pixels."""
    rng = np.random.default_rng(0)
    coarse = [rng.integers(0, 256, (25, 25, 3), dtype=np.uint8) for _ in range(PHOTOS)]
    if not pillow():
        return [torch.from_numpy(c.repeat(20, 0).repeat(20, 1)).permute(2, 0, 1) for c in coarse]
    from PIL import Image

    jpgs: list[object] = []
    for pixels in coarse:
        file = io.BytesIO()
        Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        jpgs.append(file.getvalue())
    return jpgs


def pillow() -> bool:
    try:
        import PIL  # noqa: F401
    except ImportError:
        return False
    return True


class OurCut:
    """Our preparation of a photo, in loader workers."""

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry

    def __call__(self, photo: object) -> torch.Tensor:
        from PIL import Image

        return torch.from_numpy(self.geometry.cut(Image.open(io.BytesIO(photo)).convert("RGB")))  # type: ignore[arg-type]


class TorchCut:
    """The same preparation without Pillow, for both loops."""

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry

    def __call__(self, photo: object) -> torch.Tensor:
        g, resize = self.geometry, torch.nn.functional.interpolate
        pixels = photo[None].float()  # type: ignore[index]
        whole = resize(pixels, (g.size, g.size), mode="bicubic", antialias=True)
        large = resize(pixels, (2 * g.size, 2 * g.size), mode="bicubic", antialias=True)
        quarters = large.unflatten(2, (2, g.size)).unflatten(4, (2, g.size)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
        mean, std = (torch.tensor(values)[:, None, None] for values in (g.mean, g.std))
        return (torch.cat([whole, quarters]).clamp(0, 255) / 255 - mean) / std


class Bench:
    """Everything that the parts share."""

    def __init__(self, chosen: argparse.Namespace, world: World) -> None:
        self.chosen, self.world = chosen, world
        self.device = world.device()
        self.dtype = torch.float32 if chosen.small else torch.bfloat16
        self.config = LlavaNextConfig.from_dict(dict(SMALL_CONFIG if chosen.small else SEVEN_B_CONFIG))
        self.shape = Shape.of(self.config.to_dict())
        vision = self.config.vision_config
        mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
        self.geometry = Geometry(size=vision.image_size, patch=vision.patch_size, mean=mean, std=std)
        self.jpgs = draw_photos()
        self.cut: Any = OurCut(self.geometry) if pillow() else TorchCut(self.geometry)
        self.peak = peak(self.device, self.dtype)

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
        chosen, size = self.chosen, self.chosen.size
        model = self.model("vision" if number == 1 else "language")
        llava = model.get_base_model()
        loop = LoopSettings(
            batch=chosen.batch * self.world.size,
            micro_batch=chosen.micro_batch if number == 1 else None,
            micro_tokens=chosen.micro_tokens[number - 1],
            activations=chosen.activations,
            compile=chosen.compile,
            lr=LR,
            workers=chosen.workers,
        )
        data: Any
        tower = None
        if number == 1:
            how = {"shortest": size(140), "middle": size(190), "longest": size(400), "targets": size(120)}
            data = Photos(self.config, self.jpgs, self.cut, **how)
            data.overhead = round(Work.of(self.shape, "vision", LORA.r).photo)
        else:
            data = Lists(self.config, self.jpgs, shortest=size(400), middle=size(900), longest=size(2048))
            # stage 2 has no vision tower; the plain loop gets it back
            tower = llava.model.vision_tower.cpu()
            del llava.model.vision_tower
        arrange(model, loop)
        found: dict[str, Any] = {"ours": self.ours(DistillTask(model) if number == 1 else TuneTask(model), data, loop)}
        if not chosen.no_plain and self.world.size == 1:
            if tower is not None:
                llava.model.vision_tower = tower.to(self.device)
            if chosen.activations == "recompute":
                llava.gradient_checkpointing_disable()
            found["plain"] = self.plain(model, data)
            found["ratio"] = found["ours"]["samples_per_s"] / found["plain"]["samples_per_s"]
        return found

    def ours(self, task: Any, data: Any, loop: LoopSettings) -> dict[str, float]:
        warm, steps = self.chosen.warm, self.chosen.steps
        engine = Engine(task, self.world, loop)
        feed = Feed(data, self.world, loop)
        with Meter(engine.task, self.world, flops=counter(task), peak=self.peak) as meter:
            batches = feed.steps(0, warm + steps)
            for step in range(warm + steps):
                if step == warm:
                    self.settle()
                    meter.restart()
                done = take_step(engine, meter.wait(batches), LR, self.world, stream=(step,))
            self.settle()
            figures = {**meter.read(), "loss": done.loss}
        engine.close()
        return figures

    def plain(self, model: Any, data: Any) -> dict[str, float]:
        stock: Any = self.cut
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
        view = Work.of(self.shape, "vision", LORA.r, training=False).view

        def make(number: int) -> torch.Tensor:
            return torch.stack([self.cut(self.jpgs[(number * batch + i) % PHOTOS]) for i in range(batch)])

        found: dict[str, Any] = {}
        for name, workers in (("ours", self.chosen.workers), ("plain", 0)):
            if name == "plain" and self.chosen.no_plain:
                continue
            with torch.no_grad():
                for number, views in enumerate(prepare(make, range(1 + count), workers)):
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
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def main() -> int:
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("--json", type=Path, help="write the figures here")
    reader.add_argument("--small", action="store_true", help="a small model and short texts, on a CPU too")
    parts = ["stage2", "stage1", "embed"]
    reader.add_argument("--only", choices=parts, nargs="+", default=parts)
    reader.add_argument("--batch", type=int, help="samples of a step, per rank")
    reader.add_argument("--micro-batch", type=int, default=8, help="most photos of a forward pass, stage 1")
    reader.add_argument("--micro-tokens", type=int, nargs=2, help="budget of stage 1 and of stage 2")
    reader.add_argument("--plain-micro-batch", type=int, default=2, help="samples of the plain loop's forward pass")
    reader.add_argument("--activations", choices=["keep", "recompute"], default="keep")
    reader.add_argument("--compile", action="store_true")
    reader.add_argument("--no-plain", action="store_true", help="leave the plain loop out")
    reader.add_argument("--warm", type=int, default=2, help="steps that do not count")
    reader.add_argument("--steps", type=int)
    reader.add_argument("--plain-steps", type=int)
    reader.add_argument("--workers", type=int, default=max(1, min(12, len(os.sched_getaffinity(0)) - 2)))
    reader.add_argument("--embed-batch", type=int)
    reader.add_argument("--embed-batches", type=int)
    chosen = reader.parse_args()
    tiny = chosen.small
    for name, small, real in (
        ("batch", 4, 32),
        ("micro_tokens", [512, 1024], [2800, 6144]),
        ("steps", 2, 20),
        ("plain_steps", 1, 3),
        ("embed_batch", 4, 64),
        ("embed_batches", 2, 20),
    ):
        if getattr(chosen, name) is None:
            setattr(chosen, name, small if tiny else real)
    chosen.size = (lambda tokens: tokens // 4) if tiny else (lambda tokens: tokens)
    if not tiny and not torch.cuda.is_available():
        reader.error("no GPU here: --small runs a small model on the CPU")

    world = World.from_env()
    world.start()
    bench = Bench(chosen, world)
    figures: dict[str, Any] = {"device": device_name(bench.device), "ranks": world.size, "torch": torch.__version__}
    figures |= {"small": tiny, "peak_flop_per_s": bench.peak, "photos_by": "Pillow" if pillow() else "torch"}
    figures["settings"] = {key: str(value) for key, value in vars(chosen).items() if key != "size"}
    for part in chosen.only:
        figures[part] = bench.embed() if part == "embed" else bench.stage(int(part[-1]))
        gc.collect()  # engine and model hold each other
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
        if world.is_main:
            print(part, json.dumps(figures[part]), file=sys.stderr, flush=True)
    for number in (1, 2):
        found = figures.get(f"stage{number}", {})
        figures[f"stage{number}_mfu"] = found.get("ours", {}).get("mfu")
        figures[f"stage{number}_ratio"] = found.get("ratio")
    if not tiny:
        got = {name: figures[name] for name in BARS}
        figures["bars"] = {name: {"wanted": bar, "met": (got[name] or 0) >= bar} for name, bar in BARS.items()}
    if world.is_main:
        text = json.dumps(figures, indent=2)
        print(text)
        if chosen.json:
            chosen.json.write_text(text + "\n")
    world.close()
    return 0


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


if __name__ == "__main__":
    # loader workers and DeepSpeed's threads are not waited for
    code = main()
    sys.stdout.flush()
    os._exit(code)
