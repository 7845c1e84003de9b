"""Both stages against the plain implementation: same weights, same samples, the same losses and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lavic.data.conversations import read_conversations
from lavic.data.shard_dataset import ShardDataset
from lavic.distributed.context import DistributedContext
from lavic.model.config import LoraSettings, ModelSettings
from lavic.model.item_store import ItemStore
from lavic.model.loading import Backbone
from lavic.model.lora import add_adapter, apply_adapter, save_adapter
from lavic.shards import embed
from lavic.shards.embed import EmbedSettings
from lavic.train.distillation.dataset import DistillDataset
from lavic.train.distillation.task import DistillTask, TeacherTask
from lavic.train.recommendation.dataset import TuneDataset
from lavic.train.recommendation.task import TuneTask
from tests.fork_server import ForkServer
from tests.train.assets import KEY, PINPOINTS, Assets
from tests.train.conftest import curve
from tests.train.plain_torch import PlainLavic, adamw_step, read_choices, read_photos
from tests.train.stage_program import LOOP

pytestmark = pytest.mark.slow

STAGE_PROGRAM = Path(__file__).with_name("stage_program.py")
EXACT = 1e-5
LORA = LoraSettings(r=2, dropout=0.0)


def randomize_adapter(model: nn.Module) -> None:
    """Random values for a new adapter, so that both LoRA matrices have gradients."""
    generator = torch.Generator().manual_seed(9)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.05, generator=generator)


def relative_distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Relative distance of two tensors."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).norm() / theirs.norm())


def assert_same(model: nn.Module, ours: torch.Tensor, plain: PlainLavic, theirs: torch.Tensor) -> None:
    """Losses, and the gradient of each LoRA matrix."""
    assert relative_distance(ours, theirs) < EXACT
    (ours.sum() / ours.numel()).backward()
    (theirs.sum() / theirs.numel()).backward()
    gradients = {name.replace(".default", ""): p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert gradients.keys() == plain.trained.keys()
    for name, gradient in gradients.items():
        assert gradient.norm() > 0, name
        assert relative_distance(gradient, plain.trained[name].grad) < EXACT, name


def released_views_assets(assets: Assets, folder: Path) -> tuple[Path, Path]:
    """A vision adapter for the released views, and the store that `lavic embed` makes with it."""
    settings = ModelSettings(name=str(assets.base), views="lavic")
    backbone = Backbone.load(settings)
    model = add_adapter(backbone, "vision", LORA)
    randomize_adapter(model)
    save_adapter(model, folder / "vision", backbone, "vision")
    embed_settings = EmbedSettings(model=settings, shards=[assets.photos], precision="float32", out=folder / "store")
    assert (
        embed.run(
            embed_settings, DistributedContext(), [ShardDataset(assets.photos, descriptions=None)], folder / "vision"
        )
        == 0
    )
    store = ItemStore.open(folder / "store")
    assert min(store.count(item) for item in store.ids) < max(store.count(item) for item in store.ids)
    return folder / "vision", folder / "store"


def described_photos(folder: Path) -> list:
    return [sample for sample in read_photos(folder) if sample[2]]


@pytest.mark.parametrize("views", ["five", "lavic"])
def test_stage_1_equals_the_plain_implementation(assets: Assets, tmp_path: Path, views: str) -> None:
    backbone = Backbone.load(ModelSettings(name=str(assets.base), views=views))
    model = add_adapter(backbone, "vision", LORA)
    randomize_adapter(model)
    save_adapter(model, tmp_path / "adapter", backbone, "vision")
    data = DistillDataset(ShardDataset(assets.photos), backbone.geometry, backbone.encoder, max_length=64)
    ours = DistillTask(model)(data.collate([data[p] for p in range(len(data))]))

    plain = PlainLavic(assets.base, pinpoints=PINPOINTS if views == "lavic" else None)
    plain.adapt(tmp_path / "adapter", train=True)
    theirs = torch.cat([plain.student(photo, title, text) for _, title, text, photo in described_photos(assets.photos)])
    assert_same(model, ours, plain, theirs)


@pytest.mark.parametrize("views", ["five", "lavic"])
def test_teacher_loss_equals_the_stock_model(assets: Assets, views: str) -> None:
    backbone = Backbone.load(ModelSettings(name=str(assets.base), views=views))
    data = DistillDataset(ShardDataset(assets.valid), backbone.geometry, backbone.encoder, max_length=64, tokens="all")
    plain = PlainLavic(assets.base, pinpoints=PINPOINTS if views == "lavic" else None)
    with torch.no_grad():
        ours = TeacherTask(backbone.model)(data.collate([data[p] for p in range(len(data))]))
        theirs = torch.cat(
            [plain.teacher(photo, title, text) for _, title, text, photo in described_photos(assets.valid)]
        )
    assert relative_distance(ours, theirs) < EXACT


@pytest.mark.parametrize(("views", "seed"), [("five", 0), ("five", 3), ("lavic", 0)])
def test_stage_2_from_the_store_equals_the_plain_implementation(
    assets: Assets, tmp_path: Path, seed: int, views: str
) -> None:
    vision, stored = assets.vision, assets.store
    if views == "lavic":
        vision, stored = released_views_assets(assets, tmp_path)
    backbone = Backbone.load(ModelSettings(name=str(assets.base), views=views), vision=False)
    apply_adapter(backbone, vision, "vision")
    model = add_adapter(backbone, "language", LORA)
    randomize_adapter(model)
    save_adapter(model, tmp_path / "adapter", backbone, "language")
    rows, store = read_conversations(assets.rows), ItemStore.open(stored)
    data = TuneDataset(rows, store, backbone.encoder, candidates=KEY, max_length=400, seed=seed)
    ours = TuneTask(model)(data.collate([data[p] for p in range(len(data))]))

    plain = PlainLavic(assets.base, pinpoints=PINPOINTS if views == "lavic" else None)
    plain.adapt(vision, train=False)
    plain.adapt(tmp_path / "adapter", train=True)
    photos = {item: (title, photo) for item, title, _, photo in read_photos(assets.photos)}
    titles, images = ({item: pair[n] for item, pair in photos.items()} for n in (0, 1))
    samples = read_choices(assets.rows, KEY, seed)
    assert len(samples) == len(data)
    theirs = torch.cat([plain.choice(*sample, titles, images) for sample in samples])
    assert_same(model, ours, plain, theirs)


# --- updates: ZeRO-2 over two ranks with accumulation, and one process without either ---------------------------------


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread as in each rank: another summation order changes last digits, which AdamW amplifies."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.dist
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("stage", ["distill", "tune"])
def test_two_ranks_with_accumulation_update_as_one_plain_process(
    assets: Assets, tmp_path: Path, fork_server: ForkServer, stage: str
) -> None:
    backbone = Backbone.load(ModelSettings(name=str(assets.base)))
    kind = "vision" if stage == "distill" else "language"
    model = add_adapter(backbone, kind, LORA)
    randomize_adapter(model)
    save_adapter(model, tmp_path / "adapter", backbone, kind)
    argv = [STAGE_PROGRAM, stage, assets.base.parent, tmp_path / "adapter", tmp_path / "run"]
    ranks = fork_server.popen_ranks([*argv, "--loop", '{"micro_batch": 2}'], ranks=2)
    assert fork_server.wait(ranks) == [0, 0], ranks[0].stderr.read_text()

    plain = PlainLavic(assets.base)
    if stage == "distill":
        samples = list(read_photos(assets.photos))

        def losses(item: str, title: str, text: str, photo) -> torch.Tensor:
            return plain.student(photo, title, text) if text else torch.zeros(0)

    else:
        plain.adapt(assets.vision, train=False)
        samples = read_choices(assets.rows, KEY, 0)
        photos = {item: (title, photo) for item, title, _, photo in read_photos(assets.photos)}
        titles, images = ({item: pair[n] for item, pair in photos.items()} for n in (0, 1))

        def losses(context: str, listed: list[str], target: str) -> torch.Tensor:
            return plain.choice(context, listed, target, titles, images)

    plain.adapt(tmp_path / "adapter", train=True)
    adam = torch.optim.AdamW(plain.trained.values(), lr=LOOP.lr, weight_decay=LOOP.weight_decay)
    expected = []
    for step in range(LOOP.steps):
        loss = torch.cat([losses(*sample) for sample in samples[8 * step : 8 * step + 8]]).mean()
        expected.append({"loss": loss.item(), "grad_norm": adamw_step(plain.trained, loss, adam, LOOP.max_grad_norm)})

    steps = [row for row in curve(tmp_path / "run") if "loss" in row]
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in steps] == pytest.approx([row[key] for row in expected], rel=1e-6), key
    weights = load_file(tmp_path / "run" / "end.safetensors")
    assert weights.keys() == plain.trained.keys()
    initial = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, parameter in plain.trained.items():
        # AdamW divides a gradient by its size: of a tiny one it amplifies the last digits, which differ by CPU.
        torch.testing.assert_close(weights[name], parameter.detach(), rtol=0, atol=1e-5, msg=name)
        assert (weights[name] - initial[name]).abs().max() > LOOP.lr, name
    assert max(row["grad_norm"] for row in expected) > LOOP.max_grad_norm, "nothing was clipped"
