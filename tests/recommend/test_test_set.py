"""What is asked: nothing silently left out, who depends on whom, and shuffles that leave nothing in place."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from lavic.errors import ConfigError, DataError
from lavic.evaluation.test_set import TestSet
from lavic.launch.evaluation.setup.input_files import named
from lavic.model.item_store import ItemStore

from .conftest import KEY, Assets, make_rows, write_rows


def read_test_set(assets: Assets, path: Path, rows: list[dict], **settings) -> TestSet:
    write_rows(path, rows)
    return TestSet.read("t", path, candidates=KEY, stores=[ItemStore.open(assets.store)], **settings)


def make_changed_rows(assets: Assets, count: int, **changes) -> list[dict]:
    rows = make_rows(ItemStore.open(assets.store).ids, count, seed=9)
    return [{**row, **changes} for row in rows]


def test_a_missing_candidate_is_refused_or_dropped_and_counted(assets: Assets, tmp_path: Path):
    rows = make_changed_rows(assets, 3)
    rows[1][KEY] = [*rows[1][KEY][:4], "B0GONE0001", "B0GONE0002", *rows[1][KEY][4:]]
    rows[1]["gt_items"] = ["B0GONE0001"]
    with pytest.raises(DataError, match=r"t\.jsonl:2: candidate B0GONE0001 and 1 more of 12 .* --missing drop"):
        read_test_set(assets, tmp_path / "t.jsonl", rows)
    test_set = read_test_set(assets, tmp_path / "t.jsonl", rows, missing="drop")
    assert test_set.left_out == {"candidates_not_in_store": 2}
    assert [len(listed) for listed in test_set.lists] == [10, 10, 10]
    # The dropped item stays the target: dropping never raises the hit rate.
    assert test_set.conversations[1].targets == ("B0GONE0001",)


def test_conversations_without_a_target_are_counted(assets: Assets, tmp_path: Path):
    rows = make_changed_rows(assets, 4)
    rows[2]["gt_items"] = []
    test_set = read_test_set(assets, tmp_path / "t.jsonl", rows)
    assert (len(test_set), test_set.left_out) == (3, {"conversations_without_target": 1})
    with pytest.raises(DataError, match="none of its 2 conversations has a target"):
        read_test_set(assets, tmp_path / "t.jsonl", make_changed_rows(assets, 2, gt_items=[]))


def test_empty_lists_are_counted_and_a_set_without_candidates_is_refused(assets: Assets, tmp_path: Path):
    rows = make_changed_rows(assets, 3)
    rows[1][KEY] = []
    assert read_test_set(assets, tmp_path / "t.jsonl", rows).left_out == {"empty_lists": 1}
    with pytest.raises(DataError, match=rf"t\.jsonl: every list `{KEY}` is empty$"):
        read_test_set(assets, tmp_path / "t.jsonl", make_changed_rows(assets, 2, **{KEY: []}))
    with pytest.raises(DataError, match=rf"every list `{KEY}` is empty without the items that are not in the store"):
        read_test_set(
            assets, tmp_path / "t.jsonl", make_changed_rows(assets, 2, **{KEY: ["B0GONE0001"]}), missing="drop"
        )


@pytest.mark.parametrize("name", ["a/b", "a b", "", "a%"])
def test_an_invalid_set_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.chdir(tmp_path)
    Path("test.jsonl").touch()
    with pytest.raises(ConfigError, match="is not a name: use letters"):
        named(f"{name}=test.jsonl")
    assert named("né_1-b=test.jsonl") == ("né_1-b", "test.jsonl")


def test_bootstrap_clusters_by_submission_and_target(assets: Assets, tmp_path: Path):
    rows = make_changed_rows(assets, 5)
    rows[1]["context"] = rows[0]["context"].upper().replace("SUBMISSION", "submission").replace("COMMENT", "comment")
    rows[3]["gt_items"] = rows[1]["gt_items"]
    rows[4]["gt_items"] = ["B0OTHER001"]
    for row, target in zip(rows, "abcbe", strict=True):
        row["gt_items"] = [target]
    test_set = read_test_set(assets, tmp_path / "t.jsonl", rows)
    assert test_set.clusters("both").tolist() == [0, 0, 1, 0, 2]
    assert test_set.clusters("submission").tolist() == [0, 0, 1, 2, 3]
    assert test_set.clusters("target").tolist() == [0, 1, 2, 1, 3]
    assert test_set.clusters("none").tolist() == [0, 1, 2, 3, 4]


def test_derangement_depends_only_on_seed_and_conversation(assets: Assets, tmp_path: Path):
    test_set = read_test_set(assets, tmp_path / "t.jsonl", make_changed_rows(assets, 300))
    partners = Counter()
    for row, listed in enumerate(test_set.lists):
        shown = test_set.derangement(row, seed=0)
        assert sorted(shown) == sorted(shown.values()) == sorted(listed)
        assert all(item != other for item, other in shown.items())
        partners[listed.index(shown[listed[0]])] += 1
    # The first candidate's tokens come from every other position about equally often.
    assert set(partners) == set(range(1, 10))
    assert max(partners.values()) < 3 * min(partners.values())
    fewer = read_test_set(assets, tmp_path / "t.jsonl", make_changed_rows(assets, 300)[:7])
    assert fewer.derangement(5, seed=0) == test_set.derangement(5, seed=0) != test_set.derangement(5, seed=1)


def test_derangement_of_one_item_is_the_identity(assets: Assets, tmp_path: Path):
    rows = make_changed_rows(assets, 1)
    rows[0][KEY] = rows[0][KEY][:1]
    test_set = read_test_set(assets, tmp_path / "t.jsonl", rows)
    assert test_set.derangement(0, seed=0) == {rows[0][KEY][0]: rows[0][KEY][0]}


def test_top_keeps_the_first_candidates_of_each_list(assets: Assets) -> None:
    full, shortened = (
        TestSet.read("t", assets.test, candidates=KEY, stores=[ItemStore.open(assets.store)], top=top)
        for top in (None, 3)
    )
    assert shortened.lists == tuple(listed[:3] for listed in full.lists)
    assert [row.targets for row in shortened.conversations] == [row.targets for row in full.conversations]
