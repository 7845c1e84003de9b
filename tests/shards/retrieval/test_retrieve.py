"""`lavic retrieve`, from a catalogue and conversations to lists, runs and recall."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from lavic.cli import main
from lavic.distributed.ray_session import RaySettings, ray_session
from lavic.recommend.retrieval import RetrievalIndex
from lavic.storage.output_folder import lock_output_folder
from tests.endpoint.openai_server import openai_server

KINDS = ["lamp", "shirt", "mug", "chair", "bag", "shoe", "clock", "hat"]
LOOKS = ["red", "green", "black", "striped", "dotted", "wooden", "glass", "woollen"]


def write_lines(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def title(number: int) -> str:
    return f"{LOOKS[number % 8]} {KINDS[number // 8 % 8]} of maker {number // 64}"


def catalogue(folder: Path, count: int = 128) -> Path:
    rows = [{"parent_asin": f"B{number:04d}", "title": title(number)} for number in range(count)]
    return write_lines(folder / "meta.jsonl", rows)


def conversations(path: Path, count: int = 40, seed: int = 0) -> Path:
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        number = rng.randrange(128)
        mentioned = (number + 1) % 128
        context = f"<submission>I want a {title(number)}</submission><comment>Like the {title(mentioned)}?</comment>"
        row = {"context": context, "context_items": [f"B{mentioned:04d}"], "gt_items": [f"B{number:04d}"]}
        rows.append({**row, "gt": "kept as it is", "candidates_st": ["B0001", "B0002"]})
    return write_lines(path, rows)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text("utf-8"))


@pytest.fixture
def words(tmp_path) -> list[str]:
    items, test = catalogue(tmp_path), conversations(tmp_path / "test.jsonl")
    return ["retrieve", "--items", f"{items}", "--conversations", f"{test}", "--index", f"{tmp_path / 'index'}"]


def test_lists_stand_beside_what_the_rows_had(tmp_path, words, capsys):
    assert main([*words, "--out", f"{tmp_path / 'lists.jsonl'}", "--k", "20", "--draws", "200"]) == 0
    before, after = read(tmp_path / "test.jsonl"), read(tmp_path / "lists.jsonl")
    for old, new in zip(before, after, strict=True):
        ids, scores = new.pop("candidates_fused"), new.pop("scores_fused")
        assert new == old
        assert len(ids) == len(set(ids)) == len(scores) <= 20
        assert scores == sorted(scores, reverse=True)
        assert old["context_items"][0] not in ids
    found = results(tmp_path / "lists.retrieve")["sets"]["test"]
    assert found["counts"] == {"conversations": 40, "mentioned_items": 40, "targets": 40, "empty_lists": 0}
    hits = [
        old["gt_items"][0] in new["candidates_fused"][:10]
        for old, new in zip(before, read(tmp_path / "lists.jsonl"), strict=True)
    ]
    recall = found["methods"]["bm25"]["recall_at_10"]
    assert recall["value"] == pytest.approx(sum(hits) / 40)
    assert recall["low"] <= recall["value"] <= recall["high"]
    assert recall["value"] > 0.8
    assert "recall@10" in capsys.readouterr().out


def test_a_run_has_falling_scores_and_the_same_items(tmp_path, words):
    assert main([*words, "--out", f"{tmp_path / 'lists.jsonl'}", "--k", "20", "--draws", "200"]) == 0
    lists = {f"test-{n}": row["candidates_fused"] for n, row in enumerate(read(tmp_path / "lists.jsonl"))}
    run: dict[str, list[str]] = {}
    last = {}
    for line in (tmp_path / "lists.retrieve" / "test.bm25.run").read_text().splitlines():
        query, _, item, rank, score, _ = line.split()
        run.setdefault(query, []).append(item)
        assert int(rank) == len(run[query])
        assert float(score) < last.get(query, float("inf"))
        last[query] = float(score)
    assert run == lists


def test_runs_of_an_earlier_command_do_not_stay(tmp_path, words):
    out = ["--out", f"{tmp_path / 'lists'}", "--draws", "50"]
    with openai_server() as server:
        more = ["--methods", "bm25", "endpoint", "--endpoint.url", server.url, "--endpoint.model", "m"]
        assert main([*words, *out, *more]) == 0
    assert {path.name for path in (tmp_path / "lists").glob("*.run")} == {
        *(f"test.{name}.run" for name in ("bm25", "endpoint", "fused"))
    }
    assert main([*words, *out]) == 0
    assert [path.name for path in (tmp_path / "lists").glob("*.run")] == ["test.bm25.run"]


def test_a_folder_takes_several_files_and_never_gets_a_target_added(tmp_path, words):
    valid = conversations(tmp_path / "valid.jsonl", seed=1)
    rows = read(valid)
    write_lines(
        valid, [{**row, "gt_items": ["B0000", "absent"], "context": "<submission>zzz</submission>"} for row in rows]
    )
    where = words.index("--conversations")
    words.insert(where + 1, f"{valid}")
    assert main([*words, "--out", f"{tmp_path / 'out'}", "--draws", "200"]) == 0
    assert {path.name for path in (tmp_path / "out").glob("*.jsonl")} == {"valid.jsonl", "test.jsonl", "metrics.jsonl"}
    assert all(row["candidates_fused"] == [] for row in read(tmp_path / "out" / "valid.jsonl"))
    counts = results(tmp_path / "out")["sets"]["valid"]["counts"]
    assert counts["targets_unknown"] == 40
    assert counts["empty_lists"] == 40


def test_files_of_the_same_name_in_two_folders_are_told_apart(tmp_path, words, capsys):
    files = []
    for seed, domain in enumerate(("home", "beauty")):
        (tmp_path / domain).mkdir()
        files.append(conversations(tmp_path / domain / "test.jsonl", count=20, seed=seed))
    where = words.index("--conversations")
    words[where + 1 : where + 2] = map(str, files)
    assert main([*words, "--out", f"{tmp_path / 'out'}", "--draws", "200"]) == 0
    assert list(results(tmp_path / "out")["sets"]) == ["home-test", "beauty-test"]
    for file in files:
        rows = read(tmp_path / "out" / f"{file.parent.name}-test.jsonl")
        assert [row["gt_items"] for row in rows] == [row["gt_items"] for row in read(file)]
    words[where + 1] = words[where + 2]
    assert main([*words, "--out", f"{tmp_path / 'out'}"]) == 2
    assert "two files have the same name" in capsys.readouterr().err


def test_lists_do_not_depend_on_the_order_of_conversations_or_items(tmp_path, words):
    assert main([*words, "--out", f"{tmp_path / 'lists.jsonl'}", "--draws", "200"]) == 0
    expected = read(tmp_path / "lists.jsonl")
    for name in ("test.jsonl", "meta.jsonl"):
        write_lines(tmp_path / name, read(tmp_path / name)[::-1])
    words[words.index("--index") + 1] = f"{tmp_path / 'other'}"
    assert main([*words, "--out", f"{tmp_path / 'lists.jsonl'}", "--draws", "200"]) == 0
    assert read(tmp_path / "lists.jsonl") == expected[::-1]


def test_mentioned_items_stay_if_it_is_asked_for(tmp_path, words):
    assert main([*words, "--out", f"{tmp_path / 'lists.jsonl'}", "--no-exclude-mentioned", "--draws", "200"]) == 0
    rows = read(tmp_path / "lists.jsonl")
    assert all(row["context_items"][0] in row["candidates_fused"] for row in rows)


def test_rows_of_the_catalogue_are_counted_by_reason(tmp_path, words):
    with (tmp_path / "meta.jsonl").open("a") as file:
        file.write(
            '{"parent_asin": "B0001", "title": "again"}\n{"title": "no id"}\n{broken\n'
            '{"parent_asin": "B9", "title": ""}\n'
        )
    assert main([*words, "--out", f"{tmp_path / 'lists.jsonl'}", "--draws", "200"]) == 0
    counts = results(tmp_path / "lists.retrieve")["index"]["counts"]
    assert counts == {"rows": 130, "repeated": 1, "unreadable": 2, "no_text": 1}


def test_the_same_command_again_reads_the_index_only(tmp_path, words, monkeypatch):
    out = ["--out", f"{tmp_path / 'lists.jsonl'}", "--draws", "200"]
    assert main([*words, *out]) == 0
    first = (tmp_path / "lists.jsonl").read_bytes()
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "index").iterdir()}
    assert main([*words, *out]) == 0
    assert (tmp_path / "lists.jsonl").read_bytes() == first
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "index").iterdir()} == times
    without = [word for word in words if word not in ("--items", f"{tmp_path / 'meta.jsonl'}")]
    assert main([*without, *out]) == 0
    assert (tmp_path / "lists.jsonl").read_bytes() == first


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--bm25.k1", "2"], "`bm25` was made with other settings"),
        (["--text.fields", "title", "features"], "the index has other texts"),
        (["--key", "list"], "--key"),
        (["--k", "0"], "--k"),
        (["--store", "absent"], "not a whole item store"),
        (["--store", "{index}"], "not a whole item store"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(tmp_path, words, capsys, more, message):
    out = ["--out", f"{tmp_path / 'lists.jsonl'}", "--draws", "200"]
    assert main([*words, *out]) == 0
    capsys.readouterr()
    assert main([*words, *out, *(word.format(index=tmp_path / "index") for word in more)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_catalogue_without_an_item_says_why(tmp_path, words, capsys):
    words[words.index("--items") + 1] = f"{write_lines(tmp_path / 'empty.jsonl', [{'title': 'no id'}])}"
    assert main([*words, "--out", f"{tmp_path / 'lists.jsonl'}"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"lavic retrieve: error: {tmp_path / 'empty.jsonl'}: no item to index; unreadable 1"


def test_an_input_is_not_overwritten(tmp_path, words, capsys):
    test = tmp_path / "test.jsonl"
    before = test.read_bytes()
    for given in (f"{test}", f"file://{test}"):
        words[words.index("--conversations") + 1] = given
        assert main([*words, "--out", f"{test}"]) == 2
        assert "is an input too" in capsys.readouterr().err
    assert test.read_bytes() == before


def test_a_catalogue_that_changed_is_refused_and_one_that_grew_extends(tmp_path, words, capsys):
    out = ["--out", f"{tmp_path / 'lists.jsonl'}", "--draws", "200"]
    assert main([*words, *out]) == 0
    catalogue(tmp_path, 160)
    assert main([*words, *out]) == 2
    assert "another catalogue (128 items, now 160" in capsys.readouterr().err
    assert main([*words, *out, "--extend"]) == 0
    assert len(RetrievalIndex.open(tmp_path / "index")) == 160
    lists = (tmp_path / "lists.jsonl").read_bytes()
    words[words.index("--index") + 1] = f"{tmp_path / 'new'}"
    assert main([*words, *out]) == 0
    assert (tmp_path / "lists.jsonl").read_bytes() == lists
    catalogue(tmp_path, 100)
    assert main([*words, *out, "--extend"]) == 2
    assert "60 of the index are gone" in capsys.readouterr().err


def test_a_catalogue_that_was_replaced_with_its_old_time_is_noticed(tmp_path, words, capsys):
    out = ["--out", f"{tmp_path / 'lists.jsonl'}", "--draws", "200"]
    assert main([*words, *out]) == 0
    items = tmp_path / "meta.jsonl"
    times, text = items.stat(), items.read_text("utf-8")
    items.write_text(text.replace("red lamp", "tan lamp"), "utf-8")
    os.utime(items, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert items.stat().st_size == times.st_size
    assert main([*words, *out]) == 2
    assert "another catalogue" in capsys.readouterr().err


def test_lists_by_a_server_that_is_asked_once(tmp_path, words):
    with openai_server() as server:
        ask = ["--methods", "bm25", "endpoint", "--endpoint.url", server.url, "--endpoint.model", "m"]
        ask += ["--endpoint.cache", f"{tmp_path / 'cache'}", "--draws", "200"]
        assert main([*words, *ask, "--out", f"{tmp_path / 'lists.jsonl'}"]) == 0
        asked = server.requests
        assert asked
        assert main([*words, *ask, "--out", f"{tmp_path / 'again.jsonl'}"]) == 0
        assert server.requests == asked
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "lists.jsonl").read_bytes()
    methods = results(tmp_path / "lists.retrieve")["sets"]["test"]["methods"]
    assert list(methods) == ["bm25", "endpoint", "fused"]
    row = read(tmp_path / "lists.jsonl")[0]
    assert row["scores_fused"][0] <= 2 / 61


def test_what_the_index_has_besides_grows_too(tmp_path, words, capsys):
    out = ["--out", f"{tmp_path / 'lists.jsonl'}", "--draws", "200"]
    with openai_server() as server:
        served = ["--endpoint.url", server.url, "--endpoint.model", "m"]
        assert main([*words, *out, *served, "--methods", "endpoint", "--approximate.index", "Flat"]) == 0
        assert main([*words, *out, "--bm25.k1", "2"]) == 0
        before = RetrievalIndex.open(tmp_path / "index").manifest.methods
        catalogue(tmp_path, 160)
        capsys.readouterr()
        grow = [*words, *out, "--extend", "--bm25.k1", "2"]
        assert main(grow) == 2
        assert "the index has `endpoint` too: name its --endpoint.url" in capsys.readouterr().err
        assert main([*grow, *served]) == 0
    index = RetrievalIndex.open(tmp_path / "index")
    assert set(index.methods) == {"bm25", "endpoint"} and len(index) == 160
    after = index.manifest.methods
    assert {name: record.settings for name, record in after.items()} == {n: r.settings for n, r in before.items()}
    assert after["endpoint"].approximate["settings"] == before["endpoint"].approximate["settings"]
    assert sum(file.rows for file in after["endpoint"].files) == 160


def item_store(folder: Path, numbers: range) -> Path:
    """What of an item store tells its items."""
    folder.mkdir(exist_ok=True)
    write_lines(folder / "items-00.jsonl", [{"id": f"B{n:04d}", "key": f"{n}", "title": title(n)} for n in numbers])
    (folder / "manifest.json").write_text(json.dumps({"parts": [{"name": "00", "items": len(numbers)}]}))
    return folder


def test_an_index_without_its_catalogue_has_no_items_that_the_store_lacks(tmp_path, words, capsys):
    out = ["--out", f"{tmp_path / 'lists.jsonl'}", "--draws", "200"]
    assert main([*words, *out]) == 0
    rest = [word for word in words if word not in (words[1], words[2])]
    assert main([*rest, *out, "--store", f"{item_store(tmp_path / 'more', range(200))}"]) == 0
    capsys.readouterr()
    assert main([*rest, *out, "--store", f"{item_store(tmp_path / 'fewer', range(100))}"]) == 2
    assert "lacks 28 of the 128 items of the index" in capsys.readouterr().err


def test_an_index_of_a_catalogue_that_lies_elsewhere_is_read_by_several(tmp_path, words):
    words[2] = (tmp_path / "meta.jsonl").as_uri()
    out = ["--out", f"{tmp_path / 'lists.jsonl'}", "--draws", "200"]
    assert main([*words, *out]) == 0
    assert not RetrievalIndex.open(tmp_path / "index").manifest.catalogue_files
    rest = [word for word in words if word not in (words[1], words[2])]
    with lock_output_folder(tmp_path / "index"):
        assert main([*rest, *out]) == 0


def test_conversations_that_lie_elsewhere(tmp_path, words, capsys):
    out = ["--draws", "200", "--out"]
    assert main([*words, *out, f"{tmp_path / 'lists.jsonl'}"]) == 0
    where = words.index("--conversations") + 1
    words[where] = Path(words[where]).as_uri()
    assert main([*words, *out, f"{tmp_path / 'again.jsonl'}"]) == 0
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "lists.jsonl").read_bytes()
    assert results(tmp_path / "again.retrieve")["sets"]["test"]["file"] == words[where]
    capsys.readouterr()
    words[where] += ".absent"
    assert main([*words, *out, f"{tmp_path / 'absent.jsonl'}"]) == 2
    assert "test.jsonl.absent: no such file" in capsys.readouterr().err


def test_methods_count_by_their_weights(tmp_path, words, capsys):
    with openai_server() as server:
        words += ["--methods", "bm25", "endpoint", "--endpoint.url", server.url, "--endpoint.model", "m"]
        words += ["--out", f"{tmp_path / 'lists.jsonl'}", "--draws", "200"]
        assert main([*words, "--weights", "1", "1e-9"]) == 0
        assert main([*words, "--weights", "1"]) == 2
    assert "--weights: 1 for 2 methods" in capsys.readouterr().err
    runs = {name: {} for name in ("bm25", "fused")}
    for name, lists in runs.items():
        for line in (tmp_path / "lists.retrieve" / f"test.{name}.run").read_text().splitlines():
            lists.setdefault(line.split()[0], []).append(line.split()[2])
    for query, ids in runs["bm25"].items():
        assert runs["fused"][query][: len(ids)] == ids


@pytest.mark.parametrize("name", ["lists.json", "lists.jsonl.gz"])
def test_a_file_of_lists_ends_in_jsonl(tmp_path, words, capsys, name):
    assert main([*words, "--out", f"{tmp_path / name}"]) == 2
    assert "a file of lists ends in .jsonl" in capsys.readouterr().err
    assert not (tmp_path / name).exists()


@pytest.mark.ray
@pytest.mark.slow
def test_ray_finds_what_one_process_finds(tmp_path, words, sentence_model):
    words += ["--methods", "bm25", "dense", "--dense.model", f"{sentence_model}", "--draws", "200"]
    assert main([*words, "--out", f"{tmp_path / 'here.jsonl'}", "--executor", "local"]) == 0
    index = sorted(path.name for path in (tmp_path / "index").iterdir())
    words[words.index("--index") + 1] = f"{tmp_path / 'index2'}"
    with ray_session(RaySettings(cpus=2)):
        for parts in ("1", "2"):
            ray = ["--ray.workers", "1", "--index-parts", parts]
            assert main([*words, "--out", f"{tmp_path / 'there.jsonl'}", *ray]) == 0
            assert (tmp_path / "there.jsonl").read_bytes() == (tmp_path / "here.jsonl").read_bytes()
    assert sorted(path.name for path in (tmp_path / "index2").iterdir()) == index
