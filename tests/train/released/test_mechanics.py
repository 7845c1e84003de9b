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


def load(assets: Assets, **options) -> Backbone:
    return Backbone.load(ModelSettings(name=str(assets.base)), **options)


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


def test_b24_stage_2_trains_only_the_language_side(assets: Assets, world: DistributedContext) -> None:
    _, task, data = stage_2(assets)
    assert all("language_model" in name for name, p in task.named_parameters() if p.requires_grad)
    engine = Engine(task, world, LoopSettings(global_batch_size=4, lr=0.01))
    before = {name: p.clone() for name, p in task.named_parameters() if "multi_modal_projector" in name}
    assert before
    train_step(engine, [data.collate([data[n] for n in range(4)])], 0.01, world)
    engine.close()
    assert all(torch.equal(p, before[name]) for name, p in task.named_parameters() if name in before)


def test_b24_a_second_peft_wrapper_on_both_sides_is_refused(assets: Assets, world: DistributedContext) -> None:
    """As the released script does: a second adapter around a model that already has one."""
    backbone = load(assets)
    both = f"({TARGETS['vision']})|({TARGETS['language']})"
    backbone.model = get_peft_model(backbone.model, LoraConfig(r=2, target_modules=both))
    with pytest.raises(LavicError, match="this stage trains LoRA on language_model alone"):
        Engine(TuneTask(backbone.model), world, LoopSettings(global_batch_size=4))


def test_b25_a_bundle_restores_both_adapters(assets: Assets, tmp_path: Path) -> None:
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


def test_b26_adapter_keys_of_older_versions_are_mapped_or_refused(assets: Assets, tmp_path: Path) -> None:
    """Keys that PEFT knows from older versions are mapped; others are refused, not ignored."""
    file = tmp_path / "a" / WEIGHTS
    copy_adapter(assets.vision, tmp_path / "a")
    state = load_file(file)
    plain, expected, mapped = load(assets), load(assets), load(assets)
    apply_adapter(expected, assets.vision, "vision")
    save_file({key.replace("vision_tower.", "vision_tower.vision_model."): value for key, value in state.items()}, file)
    apply_adapter(mapped, tmp_path / "a", "vision")
    changed = 0
    for name, weight in expected.model.named_parameters():
        torch.testing.assert_close(mapped.model.get_parameter(name), weight)
        changed += not torch.equal(plain.model.get_parameter(name), weight)
    assert changed == len(state) // 2
    save_file({key.replace("multi_modal_projector", "projector"): value for key, value in state.items()}, file)
    with pytest.raises(DataError, match="does not fit the base model: 4 weights missing, 4 unknown"):
        apply_adapter(load(assets), tmp_path / "a", "vision")


def test_b27_bfloat16_training_keeps_and_saves_float32_weights(
    assets: Assets, tmp_path: Path, world: DistributedContext
) -> None:
    """Under DeepSpeed the model computes in bfloat16; trained weights are kept and saved in float32."""
    backbone = Backbone.load(ModelSettings(name=str(assets.base), dtype="bfloat16"), vision=False)
    apply_adapter(backbone, assets.vision, "vision")
    rows, store = read_conversations(assets.rows), ItemStore.open(assets.store)
    data = TuneDataset(rows, store, backbone.encoder, candidates=KEY, max_length=400)
    task = TuneTask(add_adapter(backbone, "language", LORA))
    assert {p.dtype for p in trainable(task)} == {torch.float32}
    engine = Engine(task, world, LoopSettings(global_batch_size=4, max_grad_norm=0.0, weight_decay=0.0))
    assert {p.dtype for p in task.parameters()} == {torch.bfloat16}
    name = next(name for name in engine.parameters if "lora_A" in name)
    for _ in range(2):  # the first step changes B only: while B is zero, A has no gradient
        train_step(engine, [data.collate([data[n] for n in range(4)])], 1e-6, world)
    weights = engine.full_precision_weights()
    save_bundle(tmp_path / "bundle", backbone, vision=assets.vision, language=task.model, weights=weights)
    saved = load_file(tmp_path / "bundle" / "language_adapter" / WEIGHTS)
    assert {weight.dtype for weight in saved.values()} == {torch.float32}
    master = saved[name.removeprefix("model.").replace(".default", "")]
    assert torch.equal(master, weights[name])
    parameter = engine.parameters[name].detach()
    assert torch.equal(master.bfloat16(), parameter)
    assert not torch.equal(master, parameter.float()), "float32 has digits that bfloat16 lacks"
    engine.close()


def test_b28_train_and_eval_mode_apply_to_every_module(assets: Assets, world: DistributedContext) -> None:
    _, task, data = stage_2(assets)
    engine = Engine(task, world, LoopSettings(global_batch_size=4))
    task.eval()
    train_step(engine, [data.collate([data[n] for n in range(4)])], 0.01, world)
    assert {module.training for module in task.modules()} == {True}
    first, second = (evaluate(task, data, world, batch_size=4, device=CPU).loss for _ in range(2))
    assert first == second, "dropout is on"
    assert {module.training for module in task.modules()} == {True}
    engine.close()


def test_b29_the_vocabulary_is_not_extended(assets: Assets) -> None:
    backbone = load(assets)
    stored = next(value for key, value in load_file(assets.base / "model.safetensors").items() if "embed_tokens" in key)
    torch.testing.assert_close(backbone.model.get_input_embeddings().weight.detach(), stored.float())
    assert len(backbone.tokenizer) == len(stored)
    ids = backbone.encoder.prompt(prompts.describe("Acme mug", 5))
    assert ids.count(backbone.model.config.image_token_id) == 5, "a token of the model, no new row"


def test_b30_a_checkpoint_holds_only_trained_weights(assets: Assets, world: DistributedContext) -> None:
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


def test_b32_prompts_use_the_bases_chat_format(assets: Assets) -> None:
    encoder = load(assets).encoder
    for pieces in (
        prompts.describe("Acme mug", 5),
        prompts.recommend([("seeker", "word")], [prompts.Candidate("B0MN010001", "Acme mug")], photo_tokens=5),
    ):
        text = encoder.render(pieces)
        assert text.startswith("[INST] ") and text.endswith(" [/INST]")


def test_b32_the_released_prompt_order_is_available(assets: Assets) -> None:
    encoder = Backbone.load(ModelSettings(name=str(assets.base), prompt="lavic")).encoder
    photo = encoder.image_token
    text = encoder.render(prompts.describe("Acme mug", 3, encoder.style))
    assert text.index("Acme mug") < text.index(photo * 3) < text.index("Assistant:")
    assert text.endswith("Assistant:") and "[INST]" not in text
    turns = [("seeker", "word"), ("comment", "nice")]
    listed = [prompts.Candidate("B0MN010001", "Acme mug"), prompts.Candidate("B0MN010002", "Nova mug")]
    text = encoder.render(prompts.recommend(turns, listed, photo_tokens=[5, 3], style=encoder.style))
    assert text.index("<submission>word</submission>") < text.index("<comment>nice</comment>")
    assert f"B0MN010001: Acme mug {photo * 5}\nB0MN010002: Nova mug {photo * 3}\n" in text
    assert text.endswith("Assistant:") and "[INST]" not in text


def test_b33_stage_2_has_no_vision_tower(assets: Assets) -> None:
    backbone, task, _ = stage_2(assets)
    assert not hasattr(backbone.model.model, "vision_tower")
    assert not any("vision_tower" in name for name, _ in task.named_parameters())


def test_b33_lavic_tune_loads_no_vision_tower(assets: Assets, tmp_path: Path) -> None:
    settings = TuneSettings(
        store=assets.store,
        train=assets.rows,
        valid=assets.rows,
        out=tmp_path / "run",
        model=ModelSettings(name=str(assets.base)),
    )
    components = TuneStage(settings, DistributedContext()).load(SimpleNamespace(world=DistributedContext()))
    assert not hasattr(components.backbone.model.model, "vision_tower")


class ProcessIdData(ToyData):
    """Samples whose key is the id of the process that made them."""

    def __getitem__(self, position: int) -> ToySample:
        return ToySample(str(os.getpid()), torch.zeros(1, 16), torch.zeros(1, dtype=torch.long))


@pytest.mark.parametrize("workers", [0, 2])
def test_b34_samples_are_prepared_in_other_processes(workers: int) -> None:
    feed = TrainDataLoader(
        ProcessIdData(8, 1), DistributedContext(), LoopSettings(global_batch_size=4, num_workers=workers)
    )
    steps: list[list[ToyBatch]] = list(feed.steps(0, 4))
    process_ids = {key for micros in steps for micro in micros for key in micro.keys}
    assert (str(os.getpid()) in process_ids) == (workers == 0)
    assert len(process_ids) == max(1, workers)


class OperationCounter(TorchDispatchMode):
    """Counts torch operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.__name__.partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def test_b35_photo_tokens_are_inserted_by_one_operation(assets: Assets) -> None:
    model = load(assets).model
    ids = torch.tensor([[1, *[model.config.image_token_id] * 50, 2]])
    with OperationCounter() as counter:
        splice(model, ids, torch.zeros(50, model.config.text_config.hidden_size))
    assert counter.counts["masked_scatter"] == 1
    assert counter.counts["_local_scalar_dense"] <= 1, "one synchronization with the device, not one per token"


def test_b36_item_tokens_are_memory_mapped(assets: Assets) -> None:
    store = ItemStore.open(assets.store)
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc on this system")
    assert str(next(store.folder.glob("tokens-*.safetensors")).resolve()) in maps.read_text()
    assert torch.equal(store.lookup(assets.ids[:2]), store.lookup(assets.ids[:2]))
