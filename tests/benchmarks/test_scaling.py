"""docs/scaling.md holds what benchmarks/scaling.py computes, and the simulation obeys what must hold of any crawl."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytest.importorskip("simpy", reason="simpy is not installed: pip install '.[dev]'")


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


simulation = load("crawl_simulation")
Crawl, simulate = simulation.Crawl, simulation.simulate
CALM = Crawl(photos=400, shard=100, workers=2, concurrency=4, latency=0.5)


def test_no_figure_of_the_document_is_made_by_hand():
    done = subprocess.run([sys.executable, str(BENCHMARKS / "scaling.py"), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_requests_in_flight_over_seconds_of_an_answer():
    outcome = simulate(CALM)
    assert outcome.requests == 400 and outcome.lost == 0
    assert outcome.seconds == pytest.approx(400 * 0.5 / (2 * 4))


def test_a_hosts_budget_is_kept_whatever_the_workers():
    for workers in (2, 20):
        outcome = simulate(replace(CALM, rate=5.0, workers=workers, shard=20))
        assert outcome.seconds == pytest.approx(399 / 5 + 0.5)
    assert simulate(replace(CALM, rate=5.0, hosts=2)).seconds == pytest.approx(199 / 5 + 0.5)
    narrow = simulate(replace(CALM, connections=1))
    assert narrow.seconds == pytest.approx(400 * 0.5)


def test_the_slowest_of_latency_host_and_checking_decides():
    assert simulate(replace(CALM, serves=4.0)).seconds == pytest.approx(399 / 4 + 0.5)
    assert simulate(replace(CALM, check_s=0.2)).seconds == pytest.approx(200 * 0.2 + 0.5, rel=0.02)


def test_hanging_answers_hold_up_others_only_where_few_are_begun():
    hanging = replace(CALM, stragglers=0.05, straggler_s=30.0)
    few, many = simulate(replace(hanging, window=2)), simulate(hanging)
    assert simulate(CALM).seconds < many.seconds < few.seconds


def test_a_lost_node_costs_its_unfinished_shards():
    lost = replace(CALM, nodes=2, losses=((10.0, 1),), back_s=5.0)
    outcome = simulate(lost)
    assert outcome.lost == 1
    # eight requests a second, half of them the lost node's, since its last whole shard
    assert 400 + 70 < outcome.requests <= 400 + 84
    assert outcome.seconds > simulate(CALM).seconds + 5
    assert simulate(replace(lost, shard=20)).requests < outcome.requests


def test_the_same_seed_gives_the_same_crawl():
    wild = replace(CALM, spread=0.5, stragglers=0.1, straggler_s=3.0, nodes=2, mtbf_h=0.01, back_s=1.0, shard=20)
    assert simulate(wild) == simulate(wild) != simulate(replace(wild, seed=1))
