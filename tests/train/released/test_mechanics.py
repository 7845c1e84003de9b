"""Numbers are those of `docs/differences.md`, last section: what went wrong in training, and what was wasted."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from lavic.data.conversations import read_conversations
from lavic.distributed.context import DistributedContext
from lavic.errors import DataError, LavicError
from lavic.launch.training.tune_stage import TuneStage
from lavic.launch.tune import TuneSettings
from lavic.model import prompts
from lavic.model.bundle import Bundle, save_bundle
from lavic.model.config import LoraSettings, ModelSettings
from lavic.model.inputs.token_loss import splice
from lavic.model.item_store import ItemStore
from lavic.model.loading import Backbone
from lavic.model.lora import TARGETS, WEIGHTS, add_adapter, apply_adapter, copy_adapter, trainable
from lavic.train.config import LoopSettings
from lavic.train.deepspeed.engine import Engine
from lavic.train.evaluation import evaluate
from lavic.train.input.data_loader import TrainDataLoader
from lavic.train.recommendation.dataset import TuneDataset
from lavic.train.recommendation.task import TuneTask
from lavic.train.train_step import train_step
from tests.train.assets import KEY, Assets
from tests.train.toy import ToyBatch, ToyData, ToySample

LORA = LoraSettings(r=2, dropout=0.1)
CPU = torch.device("cpu")


def load(assets: Assets, **how) -> Backbone:
    return Backbone.load(ModelSettings(name=str(assets.base)), **how)


def stage_2(assets: Assets, lora: LoraSettings = LORA) -> tuple[Backbone, TuneTask, TuneDataset]:
    backbone = load(assets, vision=False)
    apply_adapter(backbone, assets.vision, "vision")
    data = TuneDataset(
        read_conversations(assets.rows),
        ItemStore.open(assets.store),
        backbone.encoder,
        candidates=KEY,
        max_length=400,
    )
    return backbone, TuneTask(add_adapter(backbone, "language", lora)), data


def test_b24_stage_2_trains_the_language_side_alone(assets: Assets, world: DistributedContext) -> None:
    _, task, data = stage_2(assets)
    assert all("language_model" in name for name, p in task.named_parameters() if p.requires_grad)
    engine = Engine(task, world, LoopSettings(global_batch_size=4, lr=0.01))
    before = {name: p.clone() for name, p in task.named_parameters() if "multi_modal_projector" in name}
    assert before
    train_step(engine, [data.collate([data[n] for n in range(4)])], 0.01, world)
    engine.close()
    assert all(torch.equal(p, before[name]) for name, p in task.named_parameters() if name in before)


def test_b24_a_second_wrapping_that_sets_the_vision_side_free_is_refused(
    assets: Assets, world: DistributedContext
) -> None:
    """What the released script does: one more adapter around a model that already wears one."""
    backbone = load(assets)
    both = f"({TARGETS['vision']})|({TARGETS['language']})"
    backbone.model = get_peft_model(backbone.model, LoraConfig(r=2, target_modules=both))
    with pytest.raises(LavicError, match="this stage trains LoRA on language_model alone"):
        Engine(TuneTask(backbone.model), world, LoopSettings(global_batch_size=4))


def test_b25_a_bundle_brings_both_sides_back(assets: Assets, tmp_path: Path) -> None:
    backbone, task, data = stage_2(assets)
    for p in trainable(task):
        torch.nn.init.normal_(p, std=0.05)
    batch = data.collate([data[n] for n in range(4)])
    task.eval()
    save_bundle(tmp_path / "bundle", backbone, vision=assets.vision, language=task.model)
    with torch.no_grad():
        loaded = TuneTask(Bundle.load(tmp_path / "bundle").backbone.model)(batch)
        torch.testing.assert_close(loaded, task(batch), rtol=1e-4, atol=1e-5)
    assert (
        load_file(tmp_path / "bundle" / "vision_adapter" / WEIGHTS).keys() == load_file(assets.vision / WEIGHTS).keys()
    )


def test_b26_no_weight_is_lost_when_modules_had_other_names(assets: Assets, tmp_path: Path) -> None:
    """Names that PEFT knows from older versions are found again; others are refused, never dropped."""
    file = tmp_path / "a" / WEIGHTS
    copy_adapter(assets.vision, tmp_path / "a")
    own = load_file(file)
    plain, expected, old = load(assets), load(assets), load(assets)
    apply_adapter(expected, assets.vision, "vision")
    save_file({key.replace("vision_tower.", "vision_tower.vision_model."): value for key, value in own.items()}, file)
    apply_adapter(old, tmp_path / "a", "vision")
    changed = 0
    for name, weight in expected.model.named_parameters():
        torch.testing.assert_close(old.model.get_parameter(name), weight)
        changed += not torch.equal(plain.model.get_parameter(name), weight)
    assert changed == len(own) // 2
    save_file({key.replace("multi_modal_projector", "projector"): value for key, value in own.items()}, file)
    with pytest.raises(DataError, match="does not fit the base model: 4 weights missing, 4 unknown"):
        apply_adapter(load(assets), tmp_path / "a", "vision")


def test_b27_small_steps_are_kept_of_a_bfloat16_model(
    assets: Assets, tmp_path: Path, world: DistributedContext
) -> None:
    """Under DeepSpeed: the model computes in bfloat16, what is learnt is kept, and saved, in float32."""
    backbone = Backbone.load(ModelSettings(name=str(assets.base), dtype="bfloat16"), vision=False)
    apply_adapter(backbone, assets.vision, "vision")
    rows, store = read_conversations(assets.rows), ItemStore.open(assets.store)
    data = TuneDataset(rows, store, backbone.encoder, candidates=KEY, max_length=400)
    task = TuneTask(add_adapter(backbone, "language", LORA))
    assert {p.dtype for p in trainable(task)} == {torch.float32}
    engine = Engine(task, world, LoopSettings(global_batch_size=4, max_grad_norm=0.0, weight_decay=0.0))
    assert {p.dtype for p in task.parameters()} == {torch.bfloat16}
    a = next(name for name in engine.parameters if "lora_A" in name)
    for _ in range(2):  # the first step moves B alone: while it is zero A has no gradient
        train_step(engine, [data.collate([data[n] for n in range(4)])], 1e-6, world)
    weights = engine.full_precision_weights()
    save_bundle(tmp_path / "bundle", backbone, vision=assets.vision, language=task.model, weights=weights)
    saved = load_file(tmp_path / "bundle" / "language_adapter" / WEIGHTS)
    assert {weight.dtype for weight in saved.values()} == {torch.float32}
    master = saved[a.removeprefix("model.").replace(".default", "")]
    assert torch.equal(master, weights[a])
    held = engine.parameters[a].detach()
    assert torch.equal(master.bfloat16(), held)
    assert not torch.equal(master, held.float()), "the digits that bfloat16 has no room for"
    engine.close()


def test_b28_the_whole_task_trains_or_validates_at_once(assets: Assets, world: DistributedContext) -> None:
    _, task, data = stage_2(assets)
    engine = Engine(task, world, LoopSettings(global_batch_size=4))
    task.eval()
    train_step(engine, [data.collate([data[n] for n in range(4)])], 0.01, world)
    assert {module.training for module in task.modules()} == {True}
    first, second = (evaluate(task, data, world, batch_size=4, device=CPU).loss for _ in range(2))
    assert first == second, "dropout is on"
    assert {module.training for module in task.modules()} == {True}
    engine.close()


def test_b29_the_vocabulary_is_the_model_s_own(assets: Assets) -> None:
    backbone = load(assets)
    stored = next(value for key, value in load_file(assets.base / "model.safetensors").items() if "embed_tokens" in key)
    torch.testing.assert_close(backbone.model.get_input_embeddings().weight.detach(), stored.float())
    assert len(backbone.tokenizer) == len(stored)
    ids = backbone.encoder.prompt(prompts.describe("Acme mug", 5))
    assert ids.count(backbone.model.config.image_token_id) == 5, "a token that the model knows, no new row"


def test_b30_a_checkpoint_holds_what_is_trained(assets: Assets, world: DistributedContext) -> None:
    _, task, data = stage_2(assets)
    loop = LoopSettings(global_batch_size=4, micro_batch=2, warmup=3, steps=10)
    engine = Engine(task, world, loop)
    assert loop.split_batch(1) == (2, 2), "micro-batches are accumulated"
    assert loop.learning_rate(1, 10) < loop.learning_rate(3, 10) > loop.learning_rate(9, 10), "warm-up and schedule"
    train_step(engine, [data.collate([data[n] for n in (m, m + 1)]) for m in (0, 2)], 0.01, world)
    state = engine.state_dict()
    assert {key.rpartition("/")[0] for key in state} == {n for n, p in task.named_parameters() if p.requires_grad}
    assert sum(t.numel() for t in state.values()) == 3 * sum(p.numel() for p in trainable(task))
    engine.close()


def test_b31_ranks_share_a_step_without_gap_or_overlap() -> None:
    loop = LoopSettings(global_batch_size=12)
    feeds = [TrainDataLoader(ToyData(40, 1), DistributedContext(rank=rank, size=3), loop) for rank in range(3)]
    shares = [set(feed.positions(5)) for feed in feeds]
    assert sorted(p for share in shares for p in share) == list(range(60, 72))


def test_b31_each_process_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LAVIC_DEVICE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    worlds = [DistributedContext(rank=4 + n, local_rank=n, size=8, local_world_size=4) for n in range(4)]
    assert [world.device() for world in worlds] == [torch.device("cuda", n) for n in range(4)]


def test_b32_prompts_have_the_form_that_the_base_model_was_trained_with(assets: Assets) -> None:
    encoder = load(assets).encoder
    for pieces in (
        prompts.describe("Acme mug", 5),
        prompts.recommend([("seeker", "word")], [prompts.Candidate("B0MN010001", "Acme mug")], photo_tokens=5),
    ):
        text = encoder.render(pieces)
        assert text.startswith("[INST] ") and text.endswith(" [/INST]")


def test_b32_the_released_order_is_to_be_had(assets: Assets) -> None:
    encoder = Backbone.load(ModelSettings(name=str(assets.base), prompt="lavic")).encoder
    photo = encoder.image_token
    asked = encoder.render(prompts.describe("Acme mug", 3, encoder.style))
    assert asked.index("Acme mug") < asked.index(photo * 3) < asked.index("Assistant:")
    assert asked.endswith("Assistant:") and "[INST]" not in asked
    turns = [("seeker", "word"), ("comment", "nice")]
    listed = [prompts.Candidate("B0MN010001", "Acme mug"), prompts.Candidate("B0MN010002", "Nova mug")]
    asked = encoder.render(prompts.recommend(turns, listed, photo_tokens=[5, 3], style=encoder.style))
    assert asked.index("<submission>word</submission>") < asked.index("<comment>nice</comment>")
    assert f"B0MN010001: Acme mug {photo * 5}\nB0MN010002: Nova mug {photo * 3}\n" in asked
    assert asked.endswith("Assistant:") and "[INST]" not in asked


def test_b33_stage_2_has_no_vision_tower(assets: Assets) -> None:
    backbone, task, _ = stage_2(assets)
    assert not hasattr(backbone.model.model, "vision_tower")
    assert not any("vision_tower" in name for name, _ in task.named_parameters())


def test_b33_nor_has_the_command(assets: Assets, tmp_path: Path) -> None:
    chosen = TuneSettings(
        store=assets.store,
        train=assets.rows,
        valid=assets.rows,
        out=tmp_path / "run",
        model=ModelSettings(name=str(assets.base)),
    )
    components = TuneStage(chosen, DistributedContext()).load(SimpleNamespace(world=DistributedContext()))
    assert not hasattr(components.backbone.model.model, "vision_tower")


class Whereabouts(ToyData):
    """Samples that are called by the process that made them."""

    def __getitem__(self, position: int) -> ToySample:
        return ToySample(str(os.getpid()), torch.zeros(1, 16), torch.zeros(1, dtype=torch.long))


@pytest.mark.parametrize("workers", [0, 2])
def test_b34_samples_are_prepared_in_other_processes(workers: int) -> None:
    feed = TrainDataLoader(
        Whereabouts(8, 1), DistributedContext(), LoopSettings(global_batch_size=4, num_workers=workers)
    )
    steps: list[list[ToyBatch]] = list(feed.steps(0, 4))
    makers = {key for micros in steps for micro in micros for key in micro.keys}
    assert (str(os.getpid()) in makers) == (workers == 0)
    assert len(makers) == max(1, workers)


class Operations(TorchDispatchMode):
    """Counts what is asked of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.__name__.partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def test_b35_photo_tokens_are_put_in_by_one_operation(assets: Assets) -> None:
    model = load(assets).model
    ids = torch.tensor([[1, *[model.config.image_token_id] * 50, 2]])
    with Operations() as asked:
        splice(model, ids, torch.zeros(50, model.config.text_config.hidden_size))
    assert asked.counts["masked_scatter"] == 1
    assert asked.counts["_local_scalar_dense"] <= 1, "the device is asked once, not for every token"


def test_b36_item_tokens_stay_on_the_disk(assets: Assets) -> None:
    store = ItemStore.open(assets.store)
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc on this system")
    assert str(next(store.folder.glob("tokens-*.safetensors")).resolve()) in maps.read_text()
    assert torch.equal(store.lookup(assets.ids[:2]), store.lookup(assets.ids[:2]))
