"""The retriever: its loss, its training, and the command `lavic tune-retriever`."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from lavic.cli import main
from lavic.data.conversations import read_conversations
from lavic.distributed.context import DistributedContext
from lavic.distributed.signals import StopRequest
from lavic.errors import DataError
from lavic.model.item_store import ItemStore
from lavic.model.two_tower.folds import FINAL
from lavic.model.two_tower.head import TwoTowerHead
from lavic.model.two_tower.retriever import FILE, FOLDER, Retriever, RetrieverInfo
from lavic.tracking.journal import read_journal
from lavic.train.retrieval.feature_cache import FeatureCache
from lavic.train.retrieval.head_trainer import Features, HeadTrainer, recall_at
from lavic.train.retrieval.losses import contrastive_loss
from lavic.train.retrieval.pairs import Pairs
from lavic.train.retrieval.settings import HeadSettings
from tests.fork_server import ForkServer
from tests.train.assets import KEY, Assets

pytestmark = pytest.mark.slow


def make_pairs(targets: list[list[int]]) -> Pairs:
    return Pairs(
        query=torch.tensor([row for row, items in enumerate(targets) for _ in items]),
        item=torch.tensor([item for items in targets for item in items]),
        targets=tuple(frozenset(items) for items in targets),
    )


def test_other_targets_in_the_batch_are_not_negatives() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, items = (functional.normalize(torch.randn(4, 8, generator=generator), dim=-1) for _ in range(2))
    scale = torch.tensor(7.0)
    # conversations 0 and 1 have target 5; conversation 2 has targets 6 and 7, of which 7 is in the batch too
    pairs = make_pairs([[5], [5], [6, 7], [7]])
    batch = torch.tensor([0, 1, 2, 4])
    positives = pairs.right_answers(batch)
    assert positives.tolist() == [
        [True, True, False, False],
        [True, True, False, False],
        [False, False, True, True],
        [False, False, False, True],
    ]
    scores = (queries @ items.T * scale).tolist()
    expected = 0.0
    for row, negatives in enumerate([[2, 3], [2, 3], [0, 1], [0, 1, 2]]):
        total = sum(math.exp(scores[row][column]) for column in [row, *negatives])
        expected += -math.log(math.exp(scores[row][row]) / total) / 4
    loss = contrastive_loss(queries, items, scale, positives, symmetric=False)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    both = contrastive_loss(queries, items, scale, positives, symmetric=True)
    backward = contrastive_loss(items, queries, scale, positives.T, symmetric=False)
    assert float(both) == pytest.approx((float(loss) + float(backward)) / 2, rel=1e-5)


def features_with_shared_code(count: int, seed: int) -> tuple[Features, Pairs]:
    """Features of items and conversations that share a hidden code, in different bases and with noise."""
    generator = torch.Generator().manual_seed(seed)
    code = torch.randn(count, 8, generator=generator)
    bases = [torch.randn(8, 24, generator=torch.Generator().manual_seed(side)) for side in (1, 2)]
    noise = [0.1 * torch.randn(count, 24, generator=generator) for _ in range(2)]
    queries, items = (code @ basis + part for basis, part in zip(bases, noise, strict=True))
    scales = torch.logspace(-2, 3, 24)  # the scales of a language model's features differ as much
    return Features(queries=queries * scales, items=items * scales), make_pairs([[row] for row in range(count)])


SMALL = HeadSettings(dim=16, hidden=0, dropout=0.0, epochs=40, batch_size=64, lr=1e-2)


def test_a_trained_head_generalizes_to_new_items() -> None:
    features, pairs = features_with_shared_code(256, 3)
    trained = HeadTrainer(SMALL, features).train(pairs)
    assert trained is not None
    other, new = features_with_shared_code(200, 4)
    assert recall_at(trained.head, other.queries, other.items, new)[10] > 0.9
    unrelated = Features(queries=other.queries[torch.randperm(200)], items=other.items)
    assert recall_at(trained.head, unrelated.queries, other.items, new)[10] < 0.2


def test_head_training_is_deterministic_by_seed() -> None:
    features, pairs = features_with_shared_code(100, 3)
    settings = HeadSettings(dim=8, hidden=12, dropout=0.2, epochs=2, batch_size=32)
    states = []
    for seed in ("", "", "fold-0/"):
        torch.rand(3)  # the state of torch's own generator does not matter
        trained = HeadTrainer(settings, features).train(pairs, seed=seed)
        assert trained is not None
        states.append(torch.cat([value.flatten() for value in trained.head.state_dict().values()]))
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_the_head_with_the_best_recall_is_kept() -> None:
    features, pairs = features_with_shared_code(64, 3)
    recalls: list[float] = []

    def validate(head: TwoTowerHead) -> dict[int, float]:
        recalls.append([0.2, 0.9, 0.9, 0.1][len(recalls)])
        return {10: recalls[-1]}

    settings = HeadSettings(dim=8, hidden=0, epochs=4, batch_size=32)
    trained = HeadTrainer(settings, features).train(pairs, validate=validate)
    assert trained is not None and (trained.step, trained.recall) == (4, {10: 0.9})
    retrained = HeadTrainer(settings, features).train(pairs, last_step=4)  # as the heads of folds are trained
    assert retrained is not None and retrained.step == 4
    assert torch.equal(retrained.head.item.layers[0].weight, trained.head.item.layers[0].weight)


def test_a_diverged_head_is_refused() -> None:
    features, pairs = features_with_shared_code(64, 3)
    settings = HeadSettings(dim=8, hidden=0, epochs=4, batch_size=32, lr=1e30)
    with pytest.raises(DataError, match=r"the loss is not finite after \d+ steps: lower --head\.lr"):
        HeadTrainer(settings, features).train(pairs, validate=lambda head: {10: 1.0})


def test_scores_that_are_no_numbers_find_nothing() -> None:
    features, pairs = features_with_shared_code(64, 3)
    head = TwoTowerHead(24, 24, dim=8)
    head.item.layers[0].weight.data.fill_(math.nan)
    assert recall_at(head.eval(), features.queries, features.items, pairs, (1, 63)) == {1: 0.0, 63: 0.0}


def test_features_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    def make(rows: range) -> torch.Tensor:
        return torch.tensor([[float(row), math.inf if row == 1025 else 0.0] for row in rows])

    cache = FeatureCache(tmp_path, "identity")
    with pytest.raises(DataError, match=r"queries: features that are not finite \(first: row 1025\)"):
        cache.compute("queries", 1030, make, DistributedContext(), StopRequest())


def test_recall_counts_ties_by_half_and_skips_other_targets() -> None:
    head = TwoTowerHead(2, 2, dim=2)
    for side in (head.query, head.item):
        side.layers[0].weight.data = torch.eye(2)
        side.layers[0].bias.data.zero_()
    head.eval()
    angles = torch.tensor([0.0, 0.3, 0.6, 0.9])
    items = torch.stack([angles.cos(), angles.sin()], dim=1)
    queries = items[[0, 0]]
    assert recall_at(head, queries, items, make_pairs([[0]]), (1, 2)) == {1: 1.0, 2: 1.0}
    assert recall_at(head, queries, items, make_pairs([[2]]), (1, 2, 3)) == {1: 0.0, 2: 0.0, 3: 1.0}
    # items 0 and 1 are both targets: both count as first
    assert recall_at(head, queries, items, make_pairs([[0, 1]]), (1,)) == {1: 1.0}
    head.item.layers[0].weight.data.zero_()
    head.item.layers[0].bias.data = torch.ones(2)
    same = recall_at(head, queries, items, make_pairs([[0], [3]]), (1, 2, 4))
    assert same == {1: 0.0, 2: 1.0, 4: 1.0}  # on average 1.5 tied items come before either


# -- The command ------------------------------------------------------------------------------------------------------


def command_argv(assets: Assets, out: Path, *options: str) -> list[str]:
    inputs = ["--store", assets.store, "--train", assets.rows, "--valid", assets.rows, "--out", out]
    head = ["--head.dim", "16", "--head.hidden", "32", "--head.dropout", "0", "--head.lr", "0.01"]
    head += ["--head.batch-size", "16", "--head.epochs", "60", "--head.folds", "3"]
    return ["tune-retriever", *map(str, inputs), "--model.name", str(assets.base), *head, *options]


def run_command(server: ForkServer, argv: list[str], log: Path, ranks: int = 1) -> str:
    """Runs a command; returns its output."""
    codes = server.wait(server.start(argv, log, ranks=ranks))
    output = "".join(log.with_name(f"{log.name}.{rank}").read_text() for rank in range(ranks))
    assert codes == [0] * ranks, output
    return output


@dataclass(frozen=True)
class Run:
    """A finished run."""

    folder: Path
    output: str
    server: ForkServer


@pytest.fixture(scope="module")
def run(assets: Assets, fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("retriever")
    output = run_command(fork_server, command_argv(assets, folder / "run"), folder / "log")
    return Run(folder / "run", output, fork_server)


def test_tune_retriever_completes_once(assets: Assets, run: Run) -> None:
    assert "recall@10" in run.output and "lavic retrieve --methods tokens" in run.output
    result = json.loads((run.folder / "result.json").read_text())
    assert result["items"] == 24 and 0 < result["recall_10"] <= 1
    curve = [row for row in read_journal(run.folder / "metrics.jsonl") if "loss" in row]
    assert curve[-1]["loss"] < curve[0]["loss"] and "recall_10" in curve[0]
    rows = read_journal(run.folder / "metrics.jsonl")
    assert any("fold-2/loss" in row for row in rows)
    rates = {row["step"]: row["lr"] for row in curve}
    assert [row["fold-2/lr"] for row in rows if row["step"] == result["best_step"] and "fold-2/lr" in row] == [
        rates[result["best_step"]]
    ], "the heads of folds follow the schedule of the final head"
    second_output = run_command(run.server, command_argv(assets, run.folder), run.folder.parent / "again")
    assert "already complete" in second_output


def test_a_complete_run_of_other_conversations_is_refused(
    assets: Assets, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = command_argv(assets, run.folder)
    position = argv.index("--train") + 1
    (tmp_path / "copied.jsonl").write_bytes(assets.rows.read_bytes())
    argv[position] = str(tmp_path / "copied.jsonl")
    assert main(argv) == 0, "the same content"
    (tmp_path / "fewer.jsonl").write_text("".join(assets.rows.read_text().splitlines(keepends=True)[1:]))
    argv[position] = str(tmp_path / "fewer.jsonl")
    assert main(argv) == 2
    assert "its training set was another one: use another folder" in capsys.readouterr().err


def recall_at_1(retriever: Retriever, store: ItemStore, rows: list, folds: list[int]) -> float:
    """The share of conversations whose nearest item of all is a target."""
    ids = list(store.ids)
    items = dict(zip(set(folds), retriever.embed_items(store, ids, sorted(set(folds))), strict=True))
    queries = retriever.embed_queries(rows, folds)
    nearest = [ids[int((items[fold] @ query).argmax())] for fold, query in zip(folds, queries, strict=True)]
    return sum(item in row.targets for item, row in zip(nearest, rows, strict=True)) / len(rows)


def test_training_rows_use_the_head_that_was_not_trained_on_them(assets: Assets, run: Run) -> None:
    """Requests are random words: only a head trained on a row can know its targets."""
    retriever, store = Retriever.load(run.folder), ItemStore.open(assets.store)
    retriever.bundle.info.check_store(store)
    rows = read_conversations(assets.rows, candidates=KEY)
    folds = retriever.folds(rows)
    assert set(folds) == {0, 1, 2}
    others = [(fold + 1) % 3 for fold in folds]  # heads that were trained on the row
    unseen = recall_at_1(retriever, store, rows, folds)
    seen = [recall_at_1(retriever, store, rows, used_folds) for used_folds in ([FINAL] * len(rows), others)]
    print(seen, unseen)
    assert min(seen) > unseen + 0.25


def test_a_stopped_and_killed_run_resumes_with_the_same_heads(assets: Assets, run: Run, tmp_path: Path) -> None:
    """Also on another number of ranks. A process may finish before the signal: then it exits with 0."""
    argv = command_argv(assets, tmp_path / "run")
    for exit_codes, number, file in (
        ({75}, signal.SIGTERM, "features/*/queries-00000.npy"),
        ({-signal.SIGKILL}, signal.SIGKILL, "heads/head.safetensors"),
    ):
        ranks = run.server.start(argv, tmp_path / "log", ranks=2)
        while not list((tmp_path / "run").glob(file)) and not any(rank.gone for rank in ranks):
            time.sleep(0.005)
        for rank in ranks:
            os.kill(rank.pid, number)
        codes = set(run.server.wait(ranks))
        assert codes <= exit_codes | {0}, (tmp_path / "log.0").read_text()
    run_command(run.server, argv, tmp_path / "again")
    expected, resumed = (RetrieverInfo.read(folder / "bundle") for folder in (run.folder, tmp_path / "run"))
    assert resumed == expected


def test_invalid_input_and_damaged_heads_are_refused(
    assets: Assets, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command_argv(assets, tmp_path / "new", "--head.folds", "1")) == 2
    assert "--head.folds 1" in capsys.readouterr().err
    rows = [json.loads(line) for line in assets.rows.read_text().splitlines()]
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0] | {"gt_items": ["B0MISSING1"]}) + "\n")
    argv = command_argv(assets, tmp_path / "new")
    argv[argv.index("--train") + 1] = str(tmp_path / "rows.jsonl")
    assert main(argv) == 2
    assert "rows.jsonl:1: B0MISSING1 is not in the item store" in capsys.readouterr().err
    assert main([*argv, "--missing", "drop"]) == 2
    assert "no conversation has a target" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0]) + "\n")
    assert main(argv) == 2
    assert "rows.jsonl: its conversations are in one fold" in capsys.readouterr().err

    bundle = tmp_path / "bundle"
    with pytest.raises(DataError, match="lavic tune-retriever"):
        Retriever.load(bundle)
    (bundle / FOLDER).mkdir(parents=True)
    source = run.folder / "bundle" / FOLDER
    for file in source.iterdir():
        (bundle / FOLDER / file.name).write_bytes(file.read_bytes())
    head = bundle / FOLDER / "fold-1.safetensors"
    head.write_bytes(head.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(DataError, match=r"fold-1\.safetensors: missing or changed"):
        RetrieverInfo.read(bundle)
    (bundle / FOLDER / FILE).write_text("{")
    with pytest.raises(DataError, match="not the description of a retriever"):
        RetrieverInfo.read(bundle)
