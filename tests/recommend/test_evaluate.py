"""`lavic evaluate` from files to report: results, journal, refusals, and two ranks."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from pathlib import Path

import pytest

from lavic.cli import main
from lavic.data.conversations import read_conversations
from lavic.errors import ConfigError, DataError
from lavic.evaluation.report import sections
from lavic.launch import evaluate
from lavic.model.item_store import ItemStore
from lavic.tracking.journal import Journal, read_events, read_journal
from tests.fork_server import ForkServer

from .conftest import KEY, Assets, make_rows, write_rows


@pytest.fixture(scope="module")
def evaluated(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One evaluation of two sets with all options."""
    out = tmp_path_factory.mktemp("evaluated")
    ids = ItemStore.open(assets.store).ids
    write_rows(out / "more.jsonl", make_rows(ids, 7, seed=3))
    write_rows(out / "looks.jsonl", [{"id": item, "look": "red dotted"} for item in ids])
    journal = Journal(out / "distill" / "metrics.jsonl")
    for step, perplexity in ((0, 9.0), (10, 3.0), (20, 2.5)):
        journal.log(step, valid_loss=math.log(perplexity), valid_perplexity=perplexity)
    scores = {"full": {"perplexity": 2.25}, "cls_before": {"perplexity": 9.0}, "cls_after": {"perplexity": 2.5}}
    (out / "distill" / "captions.json").write_text(json.dumps(scores))
    argv = [
        *("evaluate", "--bundle", assets.bundle, "--store", assets.store, "--out", out / "out"),
        *("--test", f"items={assets.test}", f"other={out / 'more.jsonl'}"),
        *("--compare", f"text_only={assets.titles_only}", f"twin={assets.bundle}@{assets.store}"),
        *("--train", assets.test, "--words", out / "looks.jsonl", "--draws", "500"),
        *("--runs", out / "distill"),
        *("--arms", "lavic", "shuffled", "before_tuning", "words", "popularity", "list_order", "random"),
    ]
    assert main([str(arg) for arg in argv]) == 0
    return out / "out"


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


@pytest.mark.slow
def test_results_hold_every_arm_of_every_set(evaluated: Path):
    scores = results(evaluated)
    arms = {"lavic", "shuffled", "before_tuning", "words", "text_only", "twin", "popularity", "list_order", "random"}
    assert set(scores["hit_rate"]) == arms
    for interval in scores["hit_rate"].values():
        assert set(interval) == {"value", "low", "high", "n"}
        assert 0 <= interval["low"] <= interval["value"] <= interval["high"] <= 1
        assert interval["n"] == 24
    assert list(scores["sets"]) == ["items", "other"]
    assert scores["sets"]["other"]["arms"]["lavic"]["hit_rate"]["n"] == 7
    assert scores["hit_rate"]["random"]["value"] == pytest.approx(0.1)
    assert scores["sets"]["items"]["ceiling"]["row"]["value"] == 1.0
    assert scores["ceiling"] == {"row": 1.0, "micro": 1.0}
    assert set(scores["arms"]) == set(scores["labels"]) == arms
    for metrics in scores["arms"].values():
        assert all(set(interval) == {"value", "low", "high", "n"} for interval in metrics.values())
    assert set(scores["sets"]["items"]["against"]) == arms - {"lavic"}


def test_the_same_bundle_under_another_name_has_equal_results(evaluated: Path):
    scores = results(evaluated)["sets"]["items"]
    assert scores["arms"]["twin"] == scores["arms"]["lavic"]
    twin = scores["against"]["twin"]
    assert (twin["difference"]["value"], twin["p"]) == (0.0, 1.0)
    # The interval that this number of conversations allows.
    bound = 1 - 0.025 ** (1 / twin["difference"]["clusters"])
    assert (twin["difference"]["low"], twin["difference"]["high"]) == pytest.approx((-bound, bound))


def test_results_can_be_computed_from_predictions(evaluated: Path, assets: Assets):
    lines = [json.loads(line) for line in (evaluated / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == (24 + 7) * 8
    shuffled = [line for line in lines if line["set"] == "items" and line["arm"] == "shuffled"]
    hit_rate = sum(line["ranking"][0] in line["targets"] for line in shuffled) / len(shuffled)
    assert hit_rate == pytest.approx(results(evaluated)["hit_rate"]["shuffled"]["value"])
    for line, conversation in zip(shuffled, assets.conversations, strict=True):
        assert line["id"] == conversation.id
        assert sorted(line["ranking"]) == sorted(conversation.candidates[KEY])
        assert line["logprobs"] == sorted(line["logprobs"], reverse=True)
        assert math.fsum(line["probabilities"]) == pytest.approx(1, abs=1e-6)


def test_arms_get_different_inputs(evaluated: Path):
    lines = [json.loads(line) for line in (evaluated / "predictions.jsonl").read_text().splitlines()]
    scores = {
        arm: [dict(zip(r["ranking"], r["logprobs"], strict=True)) for r in lines if r["arm"] == arm]
        for arm in ("lavic", "shuffled", "before_tuning", "words", "text_only", "twin")
    }
    assert scores["lavic"] == scores["twin"]
    different = [scores[arm] for arm in ("lavic", "shuffled", "before_tuning", "words", "text_only")]
    assert all(a != b for n, a in enumerate(different) for b in different[:n])


def test_report_has_no_external_resources(evaluated: Path):
    page = (evaluated / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "<script" not in page
    for text in (
        "Hit rate: items",
        "Hit rate: other",
        "Tokens shuffled",
        "Titles only",
        "without photo tokens",
        "Method",
    ):
        assert text in page


def test_journal_has_metrics_of_every_arm(evaluated: Path):
    records = read_journal(evaluated / "metrics.jsonl")
    assert any("items/lavic/hit_rate" in record for record in records)


def test_journal_records_the_datasets(evaluated: Path, assets: Assets):
    datasets = {event["name"]: event for event in read_events(evaluated / "metrics.jsonl", "dataset")}
    assert set(datasets) == {"items", "other", "item store", "training set"}
    digest = hashlib.sha256(assets.test.read_bytes()).hexdigest()
    assert (datasets["items"]["digest"], datasets["items"]["context"]) == (digest, "evaluation")
    assert datasets["items"]["path"] == str(assets.test)


def test_results_and_journal_record_the_lineage(evaluated: Path, assets: Assets):
    """The digests equal those in the bundle."""
    info = json.loads((assets.bundle / "bundle.json").read_text())
    lineage = results(evaluated)["lineage"]
    assert lineage["bundles"]["lavic"]["language_adapter"] == info["language_adapter"]
    assert lineage["bundles"]["before_tuning"]["language_adapter"] is None
    assert lineage["bundles"]["text_only"]["folder"] == str(assets.titles_only)
    (store,) = lineage["stores"].values()
    assert store["vision_adapter"] == info["vision_adapter"]
    assert lineage["conversations"]["items"]["sha256"] == hashlib.sha256(assets.test.read_bytes()).hexdigest()
    (tags,) = [event["tags"] for event in read_events(evaluated / "metrics.jsonl", "tags")]
    assert tags["adapter.language"] == info["language_adapter"] and tags["adapter.vision"] == info["vision_adapter"]
    assert tags["digest.item store"] == store["digest"]


def test_titles_only_bundle_has_no_tokens_to_shuffle(assets: Assets, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:pw-1234@127.0.0.1:9")
    argv = ["--bundle", assets.titles_only, "--store", assets.store, "--test", assets.test, "--out", tmp_path]
    assert evaluate.main([*map(str, argv), "--draws", "50", "--limit", "4"]) == 0
    assert "shuffled" not in results(tmp_path)["hit_rate"]
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(files) >= 4 and not [path for path, content in files.items() if b"pw-1234" in content]
    assert b"env:MLFLOW_TRACKING_URI" in files[tmp_path / "metrics.jsonl"]


def test_a_dry_run_checks_the_inputs_and_writes_nothing(assets: Assets, tmp_path: Path, capsys):
    rows = [json.loads(line) for line in assets.test.read_text().splitlines()]
    rows[0][KEY] = [*rows[0][KEY], "B0NOWHERE0"]
    rows[1]["gt_items"] = []
    (tmp_path / "odd.jsonl").write_text("\n".join(map(json.dumps, rows)))
    argv = ["--bundle", assets.bundle, "--store", assets.store, "--out", tmp_path / "out", "--dry-run"]
    assert evaluate.main([*map(str, argv), "--test", str(tmp_path / "odd.jsonl"), "--missing", "drop"]) == 0
    text = capsys.readouterr().out
    assert f"odd         {len(rows) - 1} conversations, " in text
    assert "left out: 1 conversations without target; left out: 1 candidates not in store" in text
    assert f"rankings    {5 * (len(rows) - 1)} by a model" in text  # lavic, three controls, before_tuning
    with pytest.raises(DataError, match=r"odd\.jsonl:1: candidate B0NOWHERE0 of 11 is not in the item store"):
        evaluate.main([*map(str, argv), "--test", str(tmp_path / "odd.jsonl")])
    assert not (tmp_path / "out").exists()


def test_decode_generate_gives_one_item(assets: Assets, tmp_path: Path, capsys):
    argv = ["--bundle", assets.bundle, "--store", assets.store, "--test", assets.test, "--out", tmp_path]
    options = ["--decode", "generate", "--limit", "3", "--draws", "50", "--arms", "lavic", "random"]
    assert evaluate.main([*map(str, argv), *options]) == 0
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    assert all(isinstance(line["text"], str) and len(line["ranking"]) <= 1 for line in lines)
    assert "--decode generate gives one item and no ranking of the others" in capsys.readouterr().out


def approximately(value):
    """JSON that compares equal to four digits: batch shapes change the last digits of probabilities."""
    if isinstance(value, dict):
        return {key: approximately(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [approximately(inner) for inner in value]
    return pytest.approx(value, abs=1e-4) if isinstance(value, float) else value


@pytest.mark.dist
def test_two_ranks_give_the_results_of_one(assets: Assets, tmp_path: Path, fork_server: ForkServer):
    argv = ["--bundle", assets.bundle, "--store", assets.store, "--test", assets.test, "--limit", "9"]
    argv += ["--draws", "50", "--arms", "lavic", "shuffled", "random"]
    assert evaluate.main([*map(str, argv), "--out", str(tmp_path / "1")]) == 0
    done = fork_server.lavic("evaluate", *argv, "--out", tmp_path / "2", ranks=2)
    assert done.returncode == 0, done.stderr
    single, double = results(tmp_path / "1"), results(tmp_path / "2")
    assert approximately(single["sets"]) == approximately(double["sets"])
    rows = [[json.loads(row) for row in (tmp_path / n / "predictions.jsonl").open()] for n in ("1", "2")]
    for a, b in zip(*rows, strict=True):
        assert (a["arm"], a["id"], a["ranking"]) == (b["arm"], b["id"], b["ranking"])
        assert a["logprobs"] == pytest.approx(b["logprobs"], abs=1e-5)


class TestRefusals:
    """Each error is one line with place and advice, before a model is loaded."""

    def start(self, assets: Assets, tmp_path: Path, **changes) -> None:
        options = {
            "bundle": assets.bundle,
            "store": assets.store,
            "test": assets.test,
            "out": tmp_path / "out",
            **changes,
        }
        argv = [str(arg) for key, value in options.items() for arg in (f"--{key}", value) if value is not None]
        evaluate.main(argv)

    def test_store_of_another_adapter(self, assets: Assets, tmp_path: Path):
        other = shutil.copytree(assets.store, tmp_path / "store")
        manifest = json.loads((other / "manifest.json").read_text())
        (other / "manifest.json").write_text(json.dumps({**manifest, "vision_adapter": "0" * 16}))
        with pytest.raises(DataError, match="item store of another vision adapter"):
            self.start(assets, tmp_path, store=other)

    def test_bundle_of_another_base(self, assets: Assets, tmp_path: Path):
        other = shutil.copytree(assets.bundle, tmp_path / "bundle")
        info = json.loads((other / "bundle.json").read_text())
        (other / "bundle.json").write_text(json.dumps({**info, "fingerprint": "0" * 16}))
        with pytest.raises(DataError, match="another base model"):
            self.start(assets, tmp_path, bundle=other)

    def test_bundle_of_stage_1(self, assets: Assets, tmp_path: Path):
        other = shutil.copytree(assets.bundle, tmp_path / "bundle")
        info = json.loads((other / "bundle.json").read_text())
        (other / "bundle.json").write_text(json.dumps({**info, "language_adapter": None}))
        shutil.rmtree(other / "language_adapter")
        with pytest.raises(ConfigError, match="holds no language adapter: run `lavic tune`"):
            self.start(assets, tmp_path, bundle=other)

    def test_a_run_folder_instead_of_its_bundle(self, assets: Assets, tmp_path: Path):
        shutil.copytree(assets.bundle, tmp_path / "run" / "bundle")
        with pytest.raises(DataError, match=r"did you mean .*run/bundle"):
            self.start(assets, tmp_path, bundle=tmp_path / "run")

    def test_candidates_missing_from_the_store(self, assets: Assets, tmp_path: Path):
        rows = make_rows(["B0NOWHERE0", *ItemStore.open(assets.store).ids[:9]], 2, seed=0)
        write_rows(tmp_path / "t.jsonl", rows)
        with pytest.raises(DataError, match=r"t\.jsonl:1: candidate B0NOWHERE0 of 10 is not in the item store"):
            self.start(assets, tmp_path, test=tmp_path / "t.jsonl")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"candidates": "candidates_xx"}, "no candidate list `candidates_xx`; it has: candidates_st"),
            ({"test": "nowhere.jsonl"}, "no such conversation file"),
            ({"arms": "popularity"}, "--arms popularity needs --train FILE"),
            ({"arms": "bm25"}, "--arms bm25 needs --items FILE"),
            ({"bundle": None, "arms": "lavic"}, "--arms lavic needs --bundle and --store"),
            ({"bundle": None, "compare": "other=nowhere"}, "--compare other=nowhere needs --bundle and --store"),
            ({"store": None}, "--bundle needs --store STORE"),
            ({"compare": "nothing"}, "expected NAME=BUNDLE"),
            ({"compare": "lavic=somewhere"}, "the name lavic is in use"),
            ({"compare": "other=nowhere"}, "not a bundle"),
            ({"store": "nowhere"}, "no such item store"),
            ({"runs": "nowhere"}, "not a run folder"),
            ({"shards": "nowhere"}, "nowhere"),
        ],
    )
    def test_missing_inputs_and_invalid_arms(self, assets: Assets, tmp_path: Path, changes: dict, message: str):
        with pytest.raises((ConfigError, DataError), match=re.escape(message)):
            self.start(assets, tmp_path, **changes)


@pytest.mark.parametrize("option", ["--level 95", "--draws 0", "--limit -5", "--tokens-per-batch 0", "--gallery -1"])
def test_invalid_numbers_are_refused(assets: Assets, tmp_path: Path, option: str):
    argv = ["--bundle", assets.bundle, "--store", assets.store, "--test", assets.test, "--out", tmp_path / "out"]
    with pytest.raises(ConfigError, match=option.split()[0]):
        evaluate.main([*map(str, argv), *option.split()])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": "A", "look": "red"}], "no look of .*, the target of .*:1"),
        ([{"id": "A", "look": None}], "looks.jsonl:1: expected"),
        ([{"id": "A"}], "looks.jsonl:1: expected"),
    ],
)
def test_words_without_a_look_of_the_target_are_refused(assets: Assets, tmp_path: Path, rows: list[dict], message: str):
    write_rows(tmp_path / "looks.jsonl", rows)
    argv = ["--bundle", assets.bundle, "--store", assets.store, "--test", assets.test, "--out", tmp_path / "out"]
    with pytest.raises(DataError, match=message):
        evaluate.main([*map(str, argv), "--words", str(tmp_path / "looks.jsonl"), "--arms", "words"])


def test_the_words_arm_is_not_a_control(evaluated: Path):
    scores = results(evaluated)
    hit_rate = scores["sets"]["items"]["arms"]["words"]["hit_rate"]
    scores["sets"]["items"]["arms"]["words"]["hit_rate"] = {**hit_rate, "value": 1.0, "low": 1.0, "high": 1.0}
    labels = [number.label for number in sections.summary(scores).blocks[0].items]
    assert "Photos as text" in labels
    assert "best of the others: Photos as text" not in labels


def test_two_test_files_of_one_name_are_refused(assets: Assets, tmp_path: Path):
    argv = ["--bundle", assets.bundle, "--store", assets.store, "--out", tmp_path, "--test", assets.test, assets.test]
    with pytest.raises(ConfigError, match="give them names, NAME=FILE"):
        evaluate.main([str(arg) for arg in argv])
    assert read_conversations(assets.test)  # the file is unchanged
