"""Inputs that failed once, kept beside the checkout; where they are not there the tests of the same kinds stand in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lavic.errors import DataError
from lavic.shards.plan import make_plan, read_tasks
from lavic.shards.tasks import PlanSettings

CASES = next((found for above in Path(__file__).parents if (found := above / "shared/cases/crawl").is_dir()), None)
SETTINGS = PlanSettings(
    set="cases", split="train", photos_per_shard=1000, photos="all", image_size="hi_res", text="auto"
)
pytestmark = pytest.mark.skipif(CASES is None, reason="no shared/cases/crawl beside the checkout")


def case(name: str) -> tuple[str, ...]:
    assert CASES is not None
    return (str(CASES / "cat" / name),)


def test_overlays_crops_and_views_are_pictures_of_their_own(tmp_path: Path) -> None:
    plan = make_plan(case("amazon_forms.jsonl"), tmp_path / "out", SETTINGS)
    assert (plan.counts.photos, plan.counts.shared) == (8, 0)


@pytest.mark.parametrize(
    ("name", "urls"),
    [
        ("bom_item2meta.json", [0, 1, 2, 3]),
        ("isgz.jsonl", [0, 1, 2, 3]),
        ("none_text.jsonl", [1]),
        ("[2023] raw/meta.jsonl", [0, 1, 2, 3]),
        ("[2023] raw/*.jsonl", [0, 1, 2, 3]),
    ],
)
def test_catalogues_as_people_have_them(tmp_path: Path, name: str, urls: list[int]) -> None:
    plan = make_plan(case(name), tmp_path / "out", SETTINGS)
    assert [task.url for task in read_tasks(plan.shard(0))] == [f"http://127.0.0.1:18099/g/{n}.jpg" for n in urls]
    assert plan.counts.rejected == 0 and all(task.text == task.title for task in read_tasks(plan.shard(0)))


def test_what_is_nested_too_deep_is_one_rejected_record(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no photo to fetch: 0 items, 1 records cannot be read, see .*rejected\.jsonl"):
        make_plan(case("deep.json"), tmp_path / "out", SETTINGS)


def test_ids_with_a_mark_and_line_ends_of_windows(tmp_path: Path) -> None:
    settings = replace(SETTINGS, ids=case("ids_bom.txt")[0])
    plan = make_plan(case("bom_item2meta.json"), tmp_path / "out", settings)
    assert (plan.counts.photos, plan.counts.ids_missing) == (2, 0)
