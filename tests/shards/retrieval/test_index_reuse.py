"""The index of `lavic retrieve` in a second run: reused, refused, extended."""

from __future__ import annotations

import os

import pytest

from lavic.cli import main
from lavic.recommend.retrieval import RetrievalIndex
from lavic.storage.output_folder import lock_output_folder
from tests.endpoint.openai_server import openai_server
from tests.shards.retrieval.retrieval_files import write_catalogue, write_item_store


def test_a_repeated_command_only_reads_the_index(tmp_path, argv, monkeypatch):
    out = ["--out", f"{tmp_path / 'lists.jsonl'}", "--draws", "200"]
    assert main([*argv, *out]) == 0
    first = (tmp_path / "lists.jsonl").read_bytes()
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "index").iterdir()}
    assert main([*argv, *out]) == 0
    assert (tmp_path / "lists.jsonl").read_bytes() == first
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "index").iterdir()} == times
    without_items = [word for word in argv if word not in ("--items", f"{tmp_path / 'meta.jsonl'}")]
    assert main([*without_items, *out]) == 0
    assert (tmp_path / "lists.jsonl").read_bytes() == first


def test_a_catalogue_in_another_order_gives_the_same_lists(tmp_path, argv):
    out = ["--out", f"{tmp_path / 'lists.jsonl'}", "--draws", "200"]
    assert main([*argv, *out]) == 0
    first = (tmp_path / "lists.jsonl").read_bytes()
    items = tmp_path / "meta.jsonl"
    items.write_text("".join(items.read_text("utf-8").splitlines(keepends=True)[::-1]), "utf-8")
    assert main([*argv, *out]) == 0
    assert (tmp_path / "lists.jsonl").read_bytes() == first


def test_a_missing_file_is_made_again(tmp_path, argv, capsys):
    out = ["--out", f"{tmp_path / 'lists.jsonl'}", "--draws", "200"]
    assert main([*argv, *out]) == 0
    first = (tmp_path / "lists.jsonl").read_bytes()
    for name in sorted(RetrievalIndex.open(tmp_path / "index").manifest.file_names() - {"manifest.json"}):
        (tmp_path / "index" / name).unlink()
        capsys.readouterr()
        without_items = [word for word in argv if word not in ("--items", f"{tmp_path / 'meta.jsonl'}")]
        if name.startswith("items"):
            assert main([*without_items, *out]) == 2
            assert "missing: `lavic retrieve` with --items makes it again" in capsys.readouterr().err
        assert main([*argv, *out]) == 0
        assert (tmp_path / "lists.jsonl").read_bytes() == first


def test_approximate_search_stays_until_another_is_named(tmp_path, argv):
    def approximate():
        record = RetrievalIndex.open(tmp_path / "index").manifest.methods["endpoint"].approximate
        return record and record["settings"]["index"]

    out = ["--out", f"{tmp_path / 'lists.jsonl'}", "--draws", "200", "--methods", "endpoint"]
    with openai_server() as server:
        out += ["--endpoint.url", server.url, "--endpoint.model", "m"]
        for option, expected in ((["Flat"], "Flat"), ([], "Flat"), (["exact"], None), ([], None)):
            words = ["--approximate.index", *option] if option else []
            assert main([*argv, *out, *words]) == 0
            assert approximate() == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--extend"], "--extend is about the items of a catalogue"),
        (["--text.fields", "title", "features"], "--text.fields is about the items of a catalogue"),
        (["--approximate.recall", "0.99"], "need --approximate.index"),
        (["--executor", "local", "--ray.address", "nowhere:1"], "--executor local does not use Ray"),
    ],
)
def test_options_that_would_not_be_used_are_refused(tmp_path, argv, capsys, options, message):
    without_items = [word for word in argv if word not in ("--items", f"{tmp_path / 'meta.jsonl'}")]
    assert main([*without_items, "--out", f"{tmp_path / 'lists.jsonl'}", *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bm25.k1", "2"], "`bm25` was made with other settings"),
        (["--text.fields", "title", "features"], "the index has other texts"),
        (["--key", "list"], "--key"),
        (["--k", "0"], "--k"),
        (["--store", "absent"], "not a whole item store"),
        (["--store", "{index}"], "not a whole item store"),
    ],
)
def test_other_settings_are_refused_in_one_line(tmp_path, argv, capsys, options, message):
    out = ["--out", f"{tmp_path / 'lists.jsonl'}", "--draws", "200"]
    assert main([*argv, *out]) == 0
    capsys.readouterr()
    assert main([*argv, *out, *(word.format(index=tmp_path / "index") for word in options)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_changed_catalogue_is_refused_and_a_grown_one_extends(tmp_path, argv, capsys):
    out = ["--out", f"{tmp_path / 'lists.jsonl'}", "--draws", "200"]
    assert main([*argv, *out]) == 0
    write_catalogue(tmp_path, 160)
    assert main([*argv, *out]) == 2
    assert "another catalogue (128 items, now 160" in capsys.readouterr().err
    assert main([*argv, *out, "--extend"]) == 0
    assert len(RetrievalIndex.open(tmp_path / "index")) == 160
    lists = (tmp_path / "lists.jsonl").read_bytes()
    argv[argv.index("--index") + 1] = f"{tmp_path / 'new'}"
    assert main([*argv, *out]) == 0
    assert (tmp_path / "lists.jsonl").read_bytes() == lists
    write_catalogue(tmp_path, 100)
    assert main([*argv, *out, "--extend"]) == 2
    assert "60 of the index are gone" in capsys.readouterr().err


def test_a_replaced_catalogue_with_its_old_mtime_is_noticed(tmp_path, argv, capsys):
    out = ["--out", f"{tmp_path / 'lists.jsonl'}", "--draws", "200"]
    assert main([*argv, *out]) == 0
    items = tmp_path / "meta.jsonl"
    times, text = items.stat(), items.read_text("utf-8")
    items.write_text(text.replace("red lamp", "tan lamp"), "utf-8")
    os.utime(items, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert items.stat().st_size == times.st_size
    assert main([*argv, *out]) == 2
    assert "another catalogue" in capsys.readouterr().err


def test_extending_covers_every_method_of_the_index(tmp_path, argv, capsys):
    out = ["--out", f"{tmp_path / 'lists.jsonl'}", "--draws", "200"]
    with openai_server() as server:
        served = ["--endpoint.url", server.url, "--endpoint.model", "m"]
        assert main([*argv, *out, *served, "--methods", "endpoint", "--approximate.index", "Flat"]) == 0
        assert main([*argv, *out, "--bm25.k1", "2"]) == 0
        before = RetrievalIndex.open(tmp_path / "index").manifest.methods
        write_catalogue(tmp_path, 160)
        capsys.readouterr()
        grow = [*argv, *out, "--extend", "--bm25.k1", "2"]
        assert main(grow) == 2
        assert "the index has `endpoint` too: name its --endpoint.url" in capsys.readouterr().err
        assert main([*grow, *served]) == 0
    index = RetrievalIndex.open(tmp_path / "index")
    assert set(index.methods) == {"bm25", "endpoint"} and len(index) == 160
    after = index.manifest.methods
    assert {name: record.settings for name, record in after.items()} == {n: r.settings for n, r in before.items()}
    assert after["endpoint"].approximate["settings"] == before["endpoint"].approximate["settings"]
    assert sum(file.rows for file in after["endpoint"].files) == 160


def test_an_index_with_items_that_the_store_lacks_is_refused(tmp_path, argv, capsys):
    out = ["--out", f"{tmp_path / 'lists.jsonl'}", "--draws", "200"]
    assert main([*argv, *out]) == 0
    without_items = [word for word in argv if word not in (argv[1], argv[2])]
    assert main([*without_items, *out, "--store", f"{write_item_store(tmp_path / 'more', range(200))}"]) == 0
    capsys.readouterr()
    assert main([*without_items, *out, "--store", f"{write_item_store(tmp_path / 'fewer', range(100))}"]) == 2
    assert "lacks 28 of the 128 items of the index" in capsys.readouterr().err


def test_an_index_of_a_remote_catalogue_is_read_without_a_lock(tmp_path, argv):
    argv[2] = (tmp_path / "meta.jsonl").as_uri()
    out = ["--out", f"{tmp_path / 'lists.jsonl'}", "--draws", "200"]
    assert main([*argv, *out]) == 0
    assert not RetrievalIndex.open(tmp_path / "index").manifest.catalogue_files
    without_items = [word for word in argv if word not in (argv[1], argv[2])]
    with lock_output_folder(tmp_path / "index"):
        assert main([*without_items, *out]) == 0
