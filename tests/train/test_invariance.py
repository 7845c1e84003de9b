"""Losses and gradients do not depend on batch size, padding, batch-mates, workers or ranks."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lavic.data.conversations import read_conversations
from lavic.data.shard_dataset import ShardDataset
from lavic.distributed.context import DistributedContext
from lavic.model.config import LoraSettings, ModelSettings
from lavic.model.generation import generate
from lavic.model.inputs.label_mask import IGNORED, Batch
from lavic.model.inputs.token_loss import splice, unwrap_peft
from lavic.model.item_store import ItemStore
from lavic.model.loading import Backbone
from lavic.model.lora import add_adapter, apply_adapter
from lavic.train.config import LoopSettings
from lavic.train.distillation.dataset import DistillDataset
from lavic.train.distillation.task import DistillTask
from lavic.train.evaluation import evaluate
from lavic.train.input.data_loader import TrainDataLoader
from lavic.train.input.shuffle_order import ShuffleOrder
from lavic.train.recommendation.dataset import TuneDataset
from lavic.train.recommendation.task import TuneTask
from tests.train.assets import KEY, Assets
from tests.train.toy import ToyData

pytestmark = pytest.mark.slow

CLOSE = {"rtol": 1e-5, "atol": 2e-6}
CPU = torch.device("cpu")
few_examples = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@functools.cache
def stage(assets: Assets, name: str, views: str = "five") -> tuple[Any, Any]:
    """A task in evaluation mode, with an adapter that does something, and its data."""
    backbone = Backbone.load(ModelSettings(name=str(assets.base), views=views))
    if name == "tune":
        apply_adapter(backbone, assets.vision, "vision")
    model = add_adapter(backbone, "vision" if name == "distill" else "language", LoraSettings(r=2, dropout=0.0))
    torch.manual_seed(1)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter, std=0.05)
    if name == "distill":
        data = DistillDataset(ShardDataset(assets.photos), backbone.geometry, backbone.encoder, max_length=64)
        data.order = ShuffleOrder(len(data), 3)
        return DistillTask(model).eval(), data
    rows, store = read_conversations(assets.rows), ItemStore.open(assets.store)
    data = TuneDataset(rows, store, backbone.encoder, candidates=KEY, max_length=400, shuffle=True, seed=3)
    return TuneTask(model).eval(), data


STAGES = [("distill", "five"), ("distill", "lavic"), ("tune", "five")]


def losses(task: Any, data: Any, batches: list[list[int]]) -> dict[int, torch.Tensor]:
    """Losses of each position, whatever batch it was in."""
    results: dict[int, torch.Tensor] = {}
    for positions in batches:
        batch = data.collate([data[p] for p in positions])
        with torch.no_grad():
            parts = task(batch).split(list(batch.targets))
        results |= dict(zip(positions, parts, strict=True))
    return results


@pytest.mark.parametrize(("name", "views"), STAGES)
@few_examples
@given(draw=st.data())
def test_losses_do_not_depend_on_batch_size_and_batch_mates(
    assets: Assets, name: str, views: str, draw: st.DataObject
) -> None:
    task, data = stage(assets, name, views)
    positions = draw.draw(st.lists(st.integers(0, 3 * len(data)), min_size=2, max_size=9, unique=True))
    size = draw.draw(st.integers(1, len(positions)))
    alone = losses(task, data, [[p] for p in positions])
    mixed = losses(task, data, [positions[n : n + size] for n in range(0, len(positions), size)])
    for position in positions:
        torch.testing.assert_close(mixed[position], alone[position], **CLOSE)


@pytest.mark.parametrize("name", ["distill", "tune"])
@few_examples
@given(draw=st.data())
def test_losses_do_not_depend_on_padding_on_either_side(assets: Assets, name: str, draw: st.DataObject) -> None:
    """On the right, as batches are padded; on the left with mask and positions, as for generation."""
    task, data = stage(assets, name)
    positions = draw.draw(st.lists(st.integers(0, 40), min_size=1, max_size=5, unique=True))
    pad_right, pad_left = draw.draw(st.integers(0, 20)), draw.draw(st.integers(0, 20))
    batch = data.collate([data[p] for p in positions])
    text, rows = batch.text, len(positions)

    def padding(value: int, count: int) -> torch.Tensor:
        return torch.full((rows, count), value)

    padded = Batch(
        torch.cat([text.input_ids, padding(data.encoder.pad, pad_right)], 1),
        torch.cat([text.labels, padding(IGNORED, pad_right)], 1),
        text.lengths,
    )
    model = unwrap_peft(task.model)
    with torch.no_grad():
        expected = task(batch)
        torch.testing.assert_close(task(replace(batch, text=padded)), expected, **CLOSE)

        vectors: list[torch.Tensor] = []
        hook = model.model.language_model.register_forward_pre_hook(
            lambda _, args, given: vectors.append(given["inputs_embeds"].clone()), with_kwargs=True
        )
        task(batch)
        hook.remove()
        (embeds,) = vectors
        longest = embeds.shape[1] + pad_left
        shifted_embeds = torch.zeros(rows, longest, embeds.shape[2])
        mask, labels = torch.zeros(rows, longest, dtype=torch.long), torch.full((rows, longest), IGNORED)
        for row, length in enumerate(text.lengths.tolist()):
            shifted_embeds[row, longest - length :] = embeds[row, :length]
            mask[row, longest - length :] = 1
            labels[row, longest - length :] = text.labels[row, :length]
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(inputs_embeds=shifted_embeds, attention_mask=mask, position_ids=position_ids).logits[:, :-1]
        labelled = labels[:, 1:] != IGNORED
        shifted = torch.nn.functional.cross_entropy(logits[labelled], labels[:, 1:][labelled], reduction="none")
    torch.testing.assert_close(shifted, expected, rtol=1e-5, atol=1e-5)


@few_examples
@given(counts=st.lists(st.integers(1, 25), min_size=2, max_size=6))
def test_generated_text_does_not_depend_on_batch_mates(assets: Assets, counts: list[int]) -> None:
    task, data = stage(assets, "tune")
    prompts = [data.encoder.prompt(("[INST] ", "word " * n, "[/INST]")) for n in counts]
    together = generate(task.model, data.encoder, prompts, None, max_new_tokens=6)
    for prompt, continuation in zip(prompts, together, strict=True):
        (alone,) = generate(task.model, data.encoder, [prompt], None, max_new_tokens=6)
        assert continuation.text == alone.text
        assert continuation.logprob == pytest.approx(alone.logprob, abs=1e-4)


# --- ranks, micro-batches, workers --------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    ranks=st.integers(1, 8),
    share=st.integers(1, 6),
    micro=st.one_of(st.none(), st.integers(1, 7)),
    first=st.integers(0, 40),
    samples=st.integers(1, 60),
)
def test_a_step_has_the_same_samples_for_any_ranks_and_micro_batches(
    ranks: int, share: int, micro: int | None, first: int, samples: int
) -> None:
    batch = ranks * share
    loop = LoopSettings(global_batch_size=batch, micro_batch=micro)
    step_keys: list[str] = []
    counts = set()
    for rank in range(ranks):
        (micros,) = TrainDataLoader(ToyData(samples, 1), DistributedContext(rank=rank, size=ranks), loop).steps(
            first, first + 1
        )
        step_keys += [key for batch_of_rank in micros for key in batch_of_rank.keys]
        counts.add(len(micros))
    assert sorted(step_keys) == sorted(f"toy-{p}" for p in range(first * batch, (first + 1) * batch))
    assert len(counts) == 1, "a rank with fewer micro-steps makes the others wait"


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_give_the_same_batches(assets: Assets, workers: int) -> None:
    for name in ("distill", "tune"):
        _, data = stage(assets, name)
        steps = []
        for count in (0, workers):
            feed = TrainDataLoader(
                data, DistributedContext(), LoopSettings(global_batch_size=6, micro_batch=4, num_workers=count)
            )
            steps.append([micro for micros in feed.steps(0, 3) for micro in micros])
        for expected, loaded in zip(*steps, strict=True):
            assert (expected.keys, expected.targets, expected.tokens) == (loaded.keys, loaded.targets, loaded.tokens)
            assert torch.equal(expected.text.input_ids, loaded.text.input_ids)
            pair = (expected.views, loaded.views) if name == "distill" else (expected.items, loaded.items)
            assert torch.equal(*pair)


@pytest.mark.parametrize(("name", "views"), STAGES)
def test_gradients_do_not_depend_on_the_split_into_micro_batches(assets: Assets, name: str, views: str) -> None:
    task, data = stage(assets, name, views)
    results = []
    for batches in ([list(range(8))], [[p] for p in range(8)], [[7, 0, 3], [1, 2, 6, 5], [4]]):
        task.zero_grad()
        for positions in batches:
            task(data.collate([data[p] for p in positions])).sum().backward()
        results.append(torch.cat([p.grad.flatten() for p in task.parameters() if p.requires_grad]))
    for other in results[1:]:
        assert (other - results[0]).norm() < 1e-5 * results[0].norm()


class Share(DistributedContext):
    """One of several ranks that run one after the other: records the values that it would reduce."""

    values: ClassVar[list[torch.Tensor]] = []

    def all_reduce(self, value: torch.Tensor) -> torch.Tensor:
        self.values.append(value)
        return value.clone()

    def any_rank(self, flag: bool) -> bool:
        return flag


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_validation_loss_does_not_depend_on_ranks_and_batch_size(assets: Assets, ranks: int) -> None:
    task, data = stage(assets, "tune")
    single = evaluate(task, data, DistributedContext(), batch_size=8, device=CPU)
    Share.values.clear()
    for rank in range(ranks):
        evaluate(task, data, Share(rank=rank, size=ranks), batch_size=3, device=CPU)
    loss, tokens = torch.stack(Share.values).sum(0).tolist()
    assert tokens == single.tokens
    assert loss / tokens == pytest.approx(single.loss, rel=1e-6)


def test_image_tokens_are_filled_in_reading_order(assets: Assets) -> None:
    task, _ = stage(assets, "tune")
    model = unwrap_peft(task.model)
    image = model.config.image_token_id
    ids = torch.tensor([[1, image, image, 2, 0], [1, 2, image, 2, image]])
    vectors = torch.arange(4.0)[:, None].expand(4, model.config.text_config.hidden_size)
    embeds = splice(model, ids, vectors)
    assert embeds[ids == image][:, 0].tolist() == [0.0, 1.0, 2.0, 3.0]
