"""Other systems' files, and the files for other programs."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import ir_measures
import pytest
from ir_measures import RR, P, nDCG

from lavic.errors import ConfigError, DataError
from lavic.launch import evaluate
from lavic.metrics.trec_files import plain, read_run, token, write_run
from tests.evaluation.systems import KEY, rows, run, scorer, trec, write


def test_a_trec_run_scores_as_ir_measures_scores_it(tmp_path: Path):
    conversations = rows(60)
    test = write(tmp_path / "t.jsonl", conversations)
    ours = trec(tmp_path / "a.run", conversations, scorer(1, 0.3))
    rows_only = trec(tmp_path / "b.run", conversations, scorer(1, 0.3), query="{}")
    results = run(tmp_path / "out", test, "--run", f"sys={ours}", f"by_row={rows_only}", "--arms", "random")
    qrels = [ir_measures.Qrel(f"t-{n}", row["gt_items"][0], 1) for n, row in enumerate(conversations)]
    scored = list(ir_measures.read_trec_run(str(ours)))
    expected = ir_measures.calc_aggregate([P @ 1, RR, nDCG @ 10], qrels, scored)
    got = results["arms"]["sys"]
    assert got["hit_rate"]["value"] == pytest.approx(expected[P @ 1])
    assert got["mrr"]["value"] == pytest.approx(expected[RR])
    assert got["ndcg_at_10"]["value"] == pytest.approx(expected[nDCG @ 10])
    assert results["arms"]["by_row"] == got
    assert results["main"] == "sys"
    assert results["lineage"]["runs"]["sys"]["file"] == str(ours)

    # What is written beside the results gives the same numbers again.
    qrels = list(ir_measures.read_trec_qrels(str(tmp_path / "out" / "trec" / "t" / "qrels")))
    written = list(ir_measures.read_trec_run(str(tmp_path / "out" / "trec" / "t" / "sys.run")))
    assert ir_measures.calc_aggregate([P @ 1, RR, nDCG @ 10], qrels, written) == pytest.approx(expected)


def test_written_scores_fall_strictly_whatever_they_were(tmp_path: Path):
    ids = [f"i{n}" for n in range(6)]
    scores = (3.0, 1 + 1e-12, 1.0, 1.0, 1.0, -1e30)
    write_run(tmp_path / "x.run", [("q 1", ids, scores), ("q2", ids, ())], tag="a tag")
    for docs in ({}, {}):
        for line in (tmp_path / "x.run").read_text().splitlines():
            query, _, item, rank, score, tag = line.split()
            docs.setdefault(query, []).append((int(rank), float(score), item))
            assert tag == "a%20tag"
    assert list(docs) == ["q%201", "q2"]
    for ranked in docs.values():
        assert [rank for rank, _, _ in ranked] == [1, 2, 3, 4, 5, 6]
        assert all(a[1] > b[1] for a, b in pairwise(ranked))
    assert [item for _, _, item in docs["q2"]] == ids
    assert docs["q%201"][0][2] == "i0" and docs["q%201"][5][2] == "i5"
    assert set(read_run(tmp_path / "x.run")) == {"q 1", "q2"}


@pytest.mark.parametrize("text", ["plain", "a b", "100%", "%41", "é\t\n", "\ud83d", "", "\u2028"])
def test_any_id_is_one_word_and_comes_back(text: str):
    word = token(text)
    assert len(word.split()) == 1 and word.isascii()
    assert plain(word) == text


@pytest.mark.parametrize("word", ["B%FF", "50%off", "%", "100%25%C3"])
def test_an_id_of_another_program_with_a_percent_sign_is_read(tmp_path: Path, word: str):
    (tmp_path / "x.run").write_text(f"t-0 Q0 {word} 1 2.0 x\r\nt-0 Q0 B2 2 1.0 x\r\n")
    ((first, score), _) = read_run(tmp_path / "x.run")["t-0"]
    assert (first, score) == ("" if word == "%" else word, 2.0)


def test_every_arm_of_every_set_has_its_own_run(tmp_path: Path):
    """A set `a-b` with an arm `c`, and a set `a` with an arm `b-c`; and no run of an evaluation before."""
    sets = {"a": rows(4), "a-b": rows(5), "a.qrels": rows(3)}
    tests = [
        f"{name}={write(tmp_path / f'{name}.jsonl', conversations)}"
        for name, conversations in sets.items()
        if "." not in name
    ]
    tests.append(str(write(tmp_path / "a.qrels.jsonl", sets["a.qrels"])))
    runs = [
        f"b-c@a={trec(tmp_path / '1.run', sets['a'], scorer(1, 0), query='{}')}",
        f"c@a-b={trec(tmp_path / '2.run', sets['a-b'], scorer(1, 0), query='{}')}",
    ]
    words = ["--test", *tests, "--out", tmp_path / "out", "--draws", "50"]
    assert evaluate.main([*map(str, words), "--run", *runs]) == 0
    files = {str(path.relative_to(tmp_path / "out" / "trec")) for path in (tmp_path / "out" / "trec").rglob("*.run")}
    lists = {f"{name}/list_order.run" for name in sets}
    assert files == {"a/b-c.run", "a-b/c.run", *lists}
    for name, conversations in sets.items():
        qrels = list(ir_measures.read_trec_qrels(str(tmp_path / "out" / "trec" / name / "qrels")))
        assert len(qrels) == len(conversations)
        written = ir_measures.read_trec_run(str(tmp_path / "out" / "trec" / name / "list_order.run"))
        assert len({row.query_id for row in written}) == len(conversations)
    assert evaluate.main([*map(str, words), "--overwrite"]) == 0
    files = {str(path.relative_to(tmp_path / "out" / "trec")) for path in (tmp_path / "out" / "trec").rglob("*.run")}
    assert files == lists


def test_names_that_some_file_systems_take_for_one_are_refused(tmp_path: Path):
    conversations = rows(2)
    test = write(tmp_path / "t.jsonl", conversations)
    ranked = trec(tmp_path / "x.run", conversations, scorer(0, 0), query="{}")
    with pytest.raises(ConfigError, match="the name X is in use"):
        run(tmp_path / "out", test, "--run", f"x={ranked}", f"X={ranked}")
    with pytest.raises(ConfigError, match="the name BM25 is in use"):
        run(tmp_path / "out", test, "--run", f"BM25={ranked}")
    words = ["--test", f"t={test}", f"T={test}", "--out", tmp_path / "out"]
    with pytest.raises(ConfigError, match="two files have the name T"):
        evaluate.main([str(word) for word in words])


def test_beir_files_are_one_test_set(tmp_path: Path):
    conversations = rows(5)
    run(tmp_path / "out", write(tmp_path / "t.jsonl", conversations))
    folder = tmp_path / "out" / "beir" / "t"
    corpus = [json.loads(line) for line in (folder / "corpus.jsonl").read_text().splitlines()]
    queries = [json.loads(line) for line in (folder / "queries.jsonl").read_text().splitlines()]
    head, *qrels = [line.split("\t") for line in (folder / "qrels" / "test.tsv").read_text().splitlines()]
    assert head == ["query-id", "corpus-id", "score"]
    assert {query["_id"] for query in queries} == {query for query, _, _ in qrels} == {f"t-{n}" for n in range(5)}
    assert "row 3" in queries[3]["text"]
    assert {item for row in conversations for item in (*row[KEY], *row["gt_items"])} == {item["_id"] for item in corpus}


def test_released_answers(tmp_path: Path):
    conversations = rows(6)
    targets = [row["gt_items"][0] for row in conversations]
    answers = [
        {**conversations[1], "recommended_st": targets[1], "response_st": f"{targets[1]} is right"},
        {
            **conversations[0],
            "recommended_st": "B999999999",
            "response_st": "B999999999",
        },  # a target that was not listed
        {**conversations[4], "recommended_st": None, "response_st": "I like them all"},
        {**conversations[2], "recommended_st": conversations[2][KEY][0], "response_st": conversations[2][KEY][0]},
        {
            **conversations[5],
            "recommended_st": "",
            "response_st": f"The best: {targets[5]}A0",
        },  # no ASIN: \b, as released
    ]  # conversations[3] is missing
    conversations[2]["gt_items"] = answers[3]["gt_items"] = ["B888888888"]
    test = write(tmp_path / "t.jsonl", conversations)
    results = run(tmp_path / "out", test, "--run", f"theirs={write(tmp_path / 'a.jsonl', answers)}")
    got = {name: value["value"] for name, value in results["arms"]["theirs"].items()}
    assert got["hit_rate"] == pytest.approx(2 / 6)
    assert got["recall_micro"] == pytest.approx(2 / 6)
    assert got["valid_ratio"] == got["valid_ratio_raw"] == pytest.approx(2 / 6)
    assert results["sets"]["t"]["missing"] == {"theirs": 1}

    # Of a response alone the released rule reads the id.
    texts = [{k: v for k, v in answer.items() if k != "recommended_st"} for answer in answers]
    again = run(tmp_path / "texts", test, "--run", f"theirs={write(tmp_path / 'b.jsonl', texts)}")
    assert again["arms"]["theirs"] == results["arms"]["theirs"]
    # Without the conversations rows are taken in order, and must be as many.
    bare = [{"recommended_x": target} for target in targets]
    ordered = run(tmp_path / "bare", test, "--run", f"theirs={write(tmp_path / 'c.jsonl', bare)}")
    assert ordered["arms"]["theirs"]["hit_rate"]["value"] == pytest.approx(5 / 6)
    with pytest.raises(DataError, match=r"5 rows without `context` and `gt_items` for the 6 conversations"):
        run(tmp_path / "few", test, "--run", f"theirs={write(tmp_path / 'd.jsonl', bare[:5])}")


@pytest.mark.parametrize("keys", [("context", "gt_items"), ()], ids=["by content", "in order"])
def test_responses_may_name_listed_ids_of_any_form(tmp_path: Path, keys: tuple[str, ...]):
    listed = ["B00", "B00.X", "B012345678.X", "a b"]
    conversations = [
        {"context": f"<submission>{n}</submission>", "context_items": [], "gt_items": [item], KEY: listed}
        for n, item in enumerate(listed)
    ]
    answers = [
        {**{key: row[key] for key in keys}, "response_x": f"The best is {item}."}
        for row, item in zip(conversations, listed, strict=True)
    ]
    test = write(tmp_path / "t.jsonl", conversations)
    results = run(tmp_path / "out", test, "--run", f"x={write(tmp_path / 'x.jsonl', answers)}")
    assert results["arms"]["x"]["hit_rate"]["value"] == results["arms"]["x"]["valid_ratio_raw"]["value"] == 1.0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("t-0 Q0 a 1 0.5", r"x:1: 5 columns where a TREC run has 6"),
        ("t-0 Q0 a 1 high x", r"x:1: the score 'high' is not a number"),
        ("t-0 Q0 a 1 nan x", r"x:1: the score 'nan' is not a number"),
        ("t-0 Q0 a 1 2 x\nt-0 Q0 a 2 1 x", r"x:2: a is there twice for the query t-0"),
        ("q7 Q0 a 1 2 x\nq8 Q0 a 1 2 x", r"the query q7 and 1 more is no conversation of .*such as t-0"),
        ("", r"x: no line in it"),
        ('{"context": "z", "gt_items": ["a"], "recommended_a": "a"}', r"none of its 1 rows is a conversation of"),
        ('{"context": "z", "gt_items": ["a"]}', r"neither a TREC run nor rows with"),
        ('{"recommended_a": 5}\n', r"x:1: `recommended_a` is not an item id"),
        ("[1]", r"x:1: not an object"),
    ],
)
def test_a_file_that_is_no_run_is_refused(tmp_path: Path, content: str, message: str):
    test = write(tmp_path / "t.jsonl", rows(2))
    (tmp_path / "x").write_text(content)
    with pytest.raises(DataError, match=message):
        run(tmp_path / "out", test, "--run", f"theirs={tmp_path / 'x'}")


def test_keys_and_names_that_are_not_clear_are_refused(tmp_path: Path):
    conversations = rows(2)
    test = write(tmp_path / "t.jsonl", conversations)
    both = write(
        tmp_path / "x.jsonl", [{**row, "recommended_a": row[KEY][0], "recommended_b": None} for row in conversations]
    )
    with pytest.raises(ConfigError, match="choose one with FILE@KEY"):
        run(tmp_path / "out", test, "--run", f"x={both}")
    results = run(tmp_path / "out", test, "--run", f"x={both}@recommended_a")
    assert results["arms"]["x"]["valid_ratio"]["value"] == 1.0
    for words, message in (
        (f"random={both}", "in use"),
        ("x", "expected NAME=FILE"),
        (f"x@no={both}", "no test set no"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(tmp_path / "out", test, "--run", words)


def test_a_run_may_have_queries_that_are_not_scored(tmp_path: Path):
    conversations = rows(6)
    conversations[1]["gt_items"] = []
    test = write(tmp_path / "t.jsonl", conversations)
    ranked = trec(tmp_path / "x.run", conversations, scorer(0, 9.0), query="{}")
    results = run(tmp_path / "out", test, "--run", f"x={ranked}", "--limit", "4")
    assert results["arms"]["x"]["hit_rate_in_list"] | {"low": 0, "high": 0} == {"value": 1, "low": 0, "high": 0, "n": 1}
    ranked.write_text(ranked.read_text() + "\n6 Q0 B000000001 1 1.0 x\n")
    with pytest.raises(DataError, match="the query 6 is no conversation"):
        run(tmp_path / "out", test, "--run", f"x={ranked}")
    ranked.write_text("t-2 Q0 B000000001 1 1.0 x\n2 Q0 B000000001 1 1.0 x\n")
    with pytest.raises(DataError, match="t-2 and 2 are one conversation"):
        run(tmp_path / "out", test, "--run", f"x={ranked}")


def test_a_run_without_a_scored_conversation_is_refused_before_anything_is_ranked(tmp_path: Path):
    test = write(tmp_path / "t.jsonl", rows(6))
    (tmp_path / "x.run").write_text("t-5 Q0 B000000001 1 1.0 x\n")
    words = ("--run", f"x={tmp_path / 'x.run'}", "--limit", "4", "--dry-run")
    with pytest.raises(DataError, match="the arm x has no ranking for any of the 4 conversations"):
        run(tmp_path / "out", test, *words)
