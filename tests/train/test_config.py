"""The schedule, and how a batch is cut."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from lavic.train.config import LoopSettings


def test_learning_rate_warms_up_then_follows_a_cosine() -> None:
    loop = LoopSettings(lr=1.0, warmup=4.0)
    rates = [loop.learning_rate(step, 24) for step in range(1, 25)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[14] == pytest.approx(0.5)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0 < rates[-1] < 0.01


def test_warmup_below_1_is_a_share_of_the_steps() -> None:
    assert LoopSettings(lr=1.0, warmup=0.25, schedule="constant").learning_rate(1, 8) == 0.5
    assert LoopSettings(lr=1.0, warmup=0.25, schedule="constant").learning_rate(8, 8) == 1.0
    assert LoopSettings(lr=1.0, warmup=0.0).learning_rate(1, 8) == 1.0


@settings(deadline=None)
@given(total=st.integers(1, 400), warmup=st.floats(0, 50), schedule=st.sampled_from(["cosine", "constant"]))
def test_learning_rates_are_positive_and_at_most_lr(total: int, warmup: float, schedule: str) -> None:
    loop = LoopSettings(lr=0.1, warmup=warmup, schedule=schedule)
    assert all(0 < loop.learning_rate(step, total) <= 0.1 for step in range(1, total + 1))


def test_total_steps_from_epochs_or_steps() -> None:
    assert LoopSettings(epochs=2.0, global_batch_size=32).total_steps(100) == 7
    assert LoopSettings(epochs=0.5, global_batch_size=32).total_steps(100) == 2
    assert LoopSettings(epochs=2.0, steps=3).total_steps(100) == 3


def test_split_batch_gives_micro_batch_and_accumulation() -> None:
    assert LoopSettings(global_batch_size=32).split_batch(2) == (16, 1)
    assert LoopSettings(global_batch_size=32, micro_batch=5).split_batch(2) == (5, 4)
    assert LoopSettings(global_batch_size=32, micro_batch=64).split_batch(4) == (8, 1)


@pytest.mark.parametrize(
    "values", [{"global_batch_size": 0}, {"micro_batch": 0}, {"lr": 0}, {"steps": 0}, {"max_grad_norm": -1}]
)
def test_invalid_values_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        LoopSettings(**values)
