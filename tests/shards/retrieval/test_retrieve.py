"""`lavic retrieve`, from a catalogue and conversations to lists, runs and recall."""

from __future__ import annotations

from pathlib import Path

import pytest

from lavic.cli import main
from lavic.data.conversations import read_conversations
from lavic.distributed.ray_session import RaySettings, ray_session
from tests.endpoint.openai_server import openai_server
from tests.shards.retrieval.retrieval_files import (
    read_results,
    read_rows,
    write_conversations,
    write_rows,
)


def test_lists_are_added_to_the_rows(tmp_path, argv, capsys):
    assert main([*argv, "--out", f"{tmp_path / 'lists.jsonl'}", "--k", "20", "--draws", "200"]) == 0
    before, after = read_rows(tmp_path / "test.jsonl"), read_rows(tmp_path / "lists.jsonl")
    for old, new in zip(before, after, strict=True):
        ids, scores = new.pop("candidates_fused"), new.pop("scores_fused")
        assert new == old
        assert len(ids) == len(set(ids)) == len(scores) <= 20
        assert scores == sorted(scores, reverse=True)
        assert old["context_items"][0] not in ids
    test_results = read_results(tmp_path / "lists.retrieve")["sets"]["test"]
    assert test_results["counts"] == {"conversations": 40, "mentioned_items": 40, "targets": 40, "empty_lists": 0}
    hits = [
        old["gt_items"][0] in new["candidates_fused"][:10]
        for old, new in zip(before, read_rows(tmp_path / "lists.jsonl"), strict=True)
    ]
    recall = test_results["methods"]["bm25"]["recall_at_10"]
    assert recall["value"] == pytest.approx(sum(hits) / 40)
    assert recall["low"] <= recall["value"] <= recall["high"]
    assert recall["value"] > 0.8
    assert "recall@10" in capsys.readouterr().out


def test_a_trec_run_has_falling_scores_and_the_items_and_ids_of_the_written_rows(tmp_path, argv):
    assert main([*argv, "--out", f"{tmp_path / 'lists.jsonl'}", "--k", "20", "--draws", "200"]) == 0
    written = read_conversations(tmp_path / "lists.jsonl")
    lists = {conversation.id: list(conversation.candidates["candidates_fused"]) for conversation in written}
    run: dict[str, list[str]] = {}
    last = {}
    for line in (tmp_path / "lists.retrieve" / "test.bm25.run").read_text().splitlines():
        query, _, item, rank, score, _ = line.split()
        run.setdefault(query, []).append(item)
        assert int(rank) == len(run[query])
        assert float(score) < last.get(query, float("inf"))
        last[query] = float(score)
    assert run == lists


def test_runs_of_an_earlier_command_are_removed(tmp_path, argv):
    out = ["--out", f"{tmp_path / 'lists'}", "--draws", "50"]
    with openai_server() as server:
        options = ["--methods", "bm25", "endpoint", "--endpoint.url", server.url, "--endpoint.model", "m"]
        assert main([*argv, *out, *options]) == 0
    assert {path.name for path in (tmp_path / "lists").glob("*.run")} == {
        *(f"test.{name}.run" for name in ("bm25", "endpoint", "fused"))
    }
    assert main([*argv, *out]) == 0
    assert [path.name for path in (tmp_path / "lists").glob("*.run")] == ["test.bm25.run"]


def test_several_files_go_into_a_folder_without_adding_targets(tmp_path, argv):
    valid = write_conversations(tmp_path / "valid.jsonl", seed=1)
    rows = read_rows(valid)
    write_rows(
        valid, [{**row, "gt_items": ["B0000", "absent"], "context": "<submission>zzz</submission>"} for row in rows]
    )
    position = argv.index("--conversations")
    argv.insert(position + 1, f"{valid}")
    assert main([*argv, "--out", f"{tmp_path / 'out'}", "--draws", "200"]) == 0
    assert {path.name for path in (tmp_path / "out").glob("*.jsonl")} == {"valid.jsonl", "test.jsonl", "metrics.jsonl"}
    assert all(row["candidates_fused"] == [] for row in read_rows(tmp_path / "out" / "valid.jsonl"))
    counts = read_results(tmp_path / "out")["sets"]["valid"]["counts"]
    assert counts["targets_unknown"] == 40
    assert counts["empty_lists"] == 40


def test_files_of_the_same_name_get_the_folder_as_prefix(tmp_path, argv, capsys):
    files = []
    for seed, domain in enumerate(("home", "beauty")):
        (tmp_path / domain).mkdir()
        files.append(write_conversations(tmp_path / domain / "test.jsonl", count=20, seed=seed))
    position = argv.index("--conversations")
    argv[position + 1 : position + 2] = map(str, files)
    assert main([*argv, "--out", f"{tmp_path / 'out'}", "--draws", "200"]) == 0
    assert list(read_results(tmp_path / "out")["sets"]) == ["home-test", "beauty-test"]
    for file in files:
        rows = read_rows(tmp_path / "out" / f"{file.parent.name}-test.jsonl")
        assert [row["gt_items"] for row in rows] == [row["gt_items"] for row in read_rows(file)]
    argv[position + 1] = argv[position + 2]
    assert main([*argv, "--out", f"{tmp_path / 'out'}"]) == 2
    assert "two files have the same name" in capsys.readouterr().err


def test_lists_do_not_depend_on_the_order_of_conversations_or_items(tmp_path, argv):
    assert main([*argv, "--out", f"{tmp_path / 'lists.jsonl'}", "--draws", "200"]) == 0
    expected = read_rows(tmp_path / "lists.jsonl")
    for name in ("test.jsonl", "meta.jsonl"):
        write_rows(tmp_path / name, read_rows(tmp_path / name)[::-1])
    argv[argv.index("--index") + 1] = f"{tmp_path / 'other'}"
    assert main([*argv, "--out", f"{tmp_path / 'lists.jsonl'}", "--draws", "200"]) == 0
    assert read_rows(tmp_path / "lists.jsonl") == expected[::-1]


def test_mentioned_items_stay_with_no_exclude_mentioned(tmp_path, argv):
    assert main([*argv, "--out", f"{tmp_path / 'lists.jsonl'}", "--no-exclude-mentioned", "--draws", "200"]) == 0
    rows = read_rows(tmp_path / "lists.jsonl")
    assert all(row["context_items"][0] in row["candidates_fused"] for row in rows)


def test_skipped_catalogue_rows_are_counted_by_reason(tmp_path, argv):
    with (tmp_path / "meta.jsonl").open("a") as file:
        file.write(
            '{"parent_asin": "B0001", "title": "again"}\n{"title": "no id"}\n{broken\n'
            '{"parent_asin": "B9", "title": ""}\n'
        )
    assert main([*argv, "--out", f"{tmp_path / 'lists.jsonl'}", "--draws", "200"]) == 0
    counts = read_results(tmp_path / "lists.retrieve")["index"]["counts"]
    assert counts == {"rows": 130, "repeated": 1, "unreadable": 2, "no_text": 1}


def test_a_catalogue_without_items_is_refused_with_counts(tmp_path, argv, capsys):
    argv[argv.index("--items") + 1] = f"{write_rows(tmp_path / 'empty.jsonl', [{'title': 'no id'}])}"
    assert main([*argv, "--out", f"{tmp_path / 'lists.jsonl'}"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"lavic retrieve: error: {tmp_path / 'empty.jsonl'}: no item to index; unreadable 1"


def test_lists_are_not_written_into_the_index(tmp_path, argv, capsys):
    index = argv[argv.index("--index") + 1]
    for _ in range(2):  # before and after it is there
        assert main([*argv, "--out", index]) == 2
        assert f"--index {index}: the lists are written there too" in capsys.readouterr().err
        assert main([*argv, "--out", f"{tmp_path / 'lists'}", "--draws", "50"]) == 0
        capsys.readouterr()


def test_an_input_is_not_overwritten(tmp_path, argv, capsys):
    test = tmp_path / "test.jsonl"
    before = test.read_bytes()
    for path in (f"{test}", f"file://{test}"):
        argv[argv.index("--conversations") + 1] = path
        assert main([*argv, "--out", f"{test}"]) == 2
        assert "is an input too" in capsys.readouterr().err
    assert test.read_bytes() == before


def test_a_second_run_sends_no_request_to_the_endpoint(tmp_path, argv):
    with openai_server() as server:
        ask = ["--methods", "bm25", "endpoint", "--endpoint.url", server.url, "--endpoint.model", "m"]
        ask += ["--endpoint.cache", f"{tmp_path / 'cache'}", "--draws", "200"]
        assert main([*argv, *ask, "--out", f"{tmp_path / 'lists.jsonl'}"]) == 0
        requests = server.requests
        assert requests
        assert main([*argv, *ask, "--out", f"{tmp_path / 'again.jsonl'}"]) == 0
        assert server.requests == requests
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "lists.jsonl").read_bytes()
    methods = read_results(tmp_path / "lists.retrieve")["sets"]["test"]["methods"]
    assert list(methods) == ["bm25", "endpoint", "fused"]
    row = read_rows(tmp_path / "lists.jsonl")[0]
    assert row["scores_fused"][0] <= 2 / 61


def test_conversations_are_read_from_a_uri(tmp_path, argv, capsys):
    out = ["--draws", "200", "--out"]
    assert main([*argv, *out, f"{tmp_path / 'lists.jsonl'}"]) == 0
    position = argv.index("--conversations") + 1
    argv[position] = Path(argv[position]).as_uri()
    assert main([*argv, *out, f"{tmp_path / 'again.jsonl'}"]) == 0
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "lists.jsonl").read_bytes()
    assert read_results(tmp_path / "again.retrieve")["sets"]["test"]["file"] == argv[position]
    capsys.readouterr()
    argv[position] += ".absent"
    assert main([*argv, *out, f"{tmp_path / 'absent.jsonl'}"]) == 2
    assert "test.jsonl.absent: no such file" in capsys.readouterr().err


def test_weights_scale_the_methods(tmp_path, argv, capsys):
    with openai_server() as server:
        argv += ["--methods", "bm25", "endpoint", "--endpoint.url", server.url, "--endpoint.model", "m"]
        argv += ["--out", f"{tmp_path / 'lists.jsonl'}", "--draws", "200"]
        assert main([*argv, "--weights", "1", "1e-9"]) == 0
        assert main([*argv, "--weights", "1"]) == 2
    assert "--weights: 1 for 2 methods" in capsys.readouterr().err
    runs = {name: {} for name in ("bm25", "fused")}
    for name, lists in runs.items():
        for line in (tmp_path / "lists.retrieve" / f"test.{name}.run").read_text().splitlines():
            lists.setdefault(line.split()[0], []).append(line.split()[2])
    for query, ids in runs["bm25"].items():
        assert runs["fused"][query][: len(ids)] == ids


@pytest.mark.parametrize("name", ["meta.jsonl", "test.jsonl"])
def test_an_input_is_never_overwritten(tmp_path, argv, capsys, name):
    before = (tmp_path / name).read_bytes()
    assert main([*argv, "--out", f"{tmp_path / name}"]) == 2
    assert "is an input too" in capsys.readouterr().err
    assert (tmp_path / name).read_bytes() == before


def test_lists_do_not_take_the_name_of_the_journal(tmp_path, argv, capsys):
    (tmp_path / "test.jsonl").rename(tmp_path / "metrics.jsonl")
    argv[argv.index(f"{tmp_path / 'test.jsonl'}")] = f"{tmp_path / 'metrics.jsonl'}"
    assert main([*argv, "--out", f"{tmp_path / 'lists'}"]) == 2
    assert "rename the conversation file" in capsys.readouterr().err


def test_recall_is_measured_at_cutoffs_that_the_lists_reach(tmp_path, argv, capsys):
    for k, cutoffs in (("5", ["recall_at_1"]), ("20", ["recall_at_1", "recall_at_10"])):
        assert main([*argv, "--out", f"{tmp_path / 'lists.jsonl'}", "--k", k, "--draws", "50"]) == 0
        methods = read_results(tmp_path / "lists.retrieve")["sets"]["test"]["methods"]
        assert list(methods["bm25"]) == cutoffs


@pytest.mark.parametrize("name", ["lists.json", "lists.jsonl.gz"])
def test_an_output_file_must_end_in_jsonl(tmp_path, argv, capsys, name):
    assert main([*argv, "--out", f"{tmp_path / name}"]) == 2
    assert "a file of lists ends in .jsonl" in capsys.readouterr().err
    assert not (tmp_path / name).exists()


@pytest.mark.ray
@pytest.mark.slow
def test_ray_writes_the_lists_of_one_process(tmp_path, argv, sentence_model):
    argv += ["--methods", "bm25", "dense", "--dense.model", f"{sentence_model}", "--draws", "200"]
    assert main([*argv, "--out", f"{tmp_path / 'local.jsonl'}", "--executor", "local"]) == 0
    index = sorted(path.name for path in (tmp_path / "index").iterdir())
    argv[argv.index("--index") + 1] = f"{tmp_path / 'index2'}"
    with ray_session(RaySettings(cpus=2)):
        for parts in ("1", "2"):
            ray = ["--ray.workers", "1", "--index-parts", parts]
            assert main([*argv, "--out", f"{tmp_path / 'ray.jsonl'}", *ray]) == 0
            assert (tmp_path / "ray.jsonl").read_bytes() == (tmp_path / "local.jsonl").read_bytes()
    assert sorted(path.name for path in (tmp_path / "index2").iterdir()) == index
