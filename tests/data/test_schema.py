"""The sources' JSON, in every form it is released in."""

from __future__ import annotations

import json
from datetime import date, datetime
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lavic.data.schema import conversation_from_row, item_from_meta, turns_of

AMAZON = {
    "parent_asin": "B000000001",
    "title": " A mug ",
    "images": [
        {"hi_res": None, "large": "http://x/l0.jpg", "thumb": "http://x/t0.jpg", "variant": "MAIN"},
        {"hi_res": None, "large": None, "thumb": None, "variant": "PT01"},
        {"hi_res": "http://x/h2.jpg", "large": "http://x/l2.jpg", "thumb": None, "variant": "PT02"},
    ],
    "categories": ["Home", "Mugs"],
    "features": ["holds tea"],
    "description": [],
    "details": '{"b": 1, "a": "x"}',
    "price": "12.99",
}


def test_images_as_objects_take_the_largest_and_keep_their_number() -> None:
    item = item_from_meta(AMAZON)
    assert (item.id, item.title) == ("B000000001", "A mug")
    assert [(photo.n, photo.url) for photo in item.photos] == [(0, "http://x/l0.jpg"), (2, "http://x/h2.jpg")]
    assert item.categories == ("Home", "Mugs") and item.details == '{"a": "x", "b": 1}'


def test_images_as_lists_give_the_same_item() -> None:
    columns = {size: [image[size] for image in AMAZON["images"]] for size in ("hi_res", "large", "thumb", "variant")}
    assert item_from_meta({**AMAZON, "images": columns}) == item_from_meta(AMAZON)


def test_images_as_one_object_are_one_photo() -> None:
    assert item_from_meta({**AMAZON, "images": AMAZON["images"][2]}).images == ("http://x/h2.jpg",)


def test_details_as_object_or_text_give_the_same_item() -> None:
    assert item_from_meta({**AMAZON, "details": {"a": "x", "b": 1}}) == item_from_meta(AMAZON)
    assert json.loads(item_from_meta({**AMAZON, "details": "not json"}).details) == {"text": "not json"}
    assert item_from_meta({**AMAZON, "details": None}).details == "{}"


def test_a_chosen_size_comes_first() -> None:
    item = item_from_meta(AMAZON, sizes=("thumb", "hi_res", "large"))
    assert item.images == ("http://x/t0.jpg", "http://x/h2.jpg")


def test_lavic_catalogue_entry() -> None:
    meta = {
        "title": "Bag",
        "images": [{"large": "http://x/0.jpg"}, {"large": "http://x/1.jpg"}],
        "image_descriptions_llava_cleaned": {"B1_1.jpg": "A brown bag."},
    }
    item = item_from_meta(meta, "B1")
    assert [photo.description for photo in item.photos] == ["", "A brown bag."]


def test_lavic_validation_row_keeps_its_photo_number() -> None:
    row = {
        "title": "Mask",
        "image_name": "B08LYS9WYD_4.jpg",
        "image": "http://x/m.jpg",
        "image_description_llava_cleaned": "A mask.",
    }
    item = item_from_meta(row)
    (photo,) = item.photos
    assert (item.id, photo.n, photo.url, photo.description) == ("B08LYS9WYD", 4, "http://x/m.jpg", "A mask.")


@pytest.mark.parametrize(
    ("meta", "reason"),
    [
        ({"title": "x"}, "parent_asin"),
        ({"parent_asin": "B1", "images": "http://x/0.jpg"}, "images"),
        ({"parent_asin": "B1", "categories": {"a": 1}}, "list of texts"),
        ({"image_name": "photo.jpg"}, "image_name"),
        ({"image_name": ["B1_0.jpg"]}, "`image_name`: a list where a text was expected"),
        ({"parent_asin": ["B1"]}, "`parent_asin`: a list where a text was expected"),
        ({"parent_asin": True}, "`parent_asin`: a boolean where a text was expected"),
        ({"parent_asin": "B1", "title": {"en": "mug"}}, "`title`: an object where a text was expected"),
        ({"parent_asin": "B1", "features": ["warm", {"a": 1}]}, "an object where a text was expected"),
        ({"parent_asin": "B1", "image_descriptions_llava_cleaned": {"B1_0.jpg": ["a"]}}, "`B1_0.jpg`: a list where"),
    ],
)
def test_what_is_no_item_says_why(meta: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        item_from_meta(meta)


def test_categories_of_older_catalogues_are_lists_of_paths() -> None:
    item = item_from_meta({"asin": "B1", "title": 1984, "categories": [["Home", "Mugs"], ["Gifts", None, 5]]})
    assert (item.title, item.categories) == ("1984", ("Home", "Mugs", "Gifts", "5"))


@pytest.mark.parametrize("link", [["http://x/0.jpg"], {"url": "http://x/0.jpg"}, True])
def test_what_is_no_text_is_no_link(link: object) -> None:
    item = item_from_meta(
        {"parent_asin": "B1", "images": [{"hi_res": link, "thumb": "http://x/1.jpg"}, {"large": link}]}
    )
    assert (item.images, item.unlinked) == (("http://x/1.jpg",), 1)


def test_half_a_surrogate_pair_becomes_text_that_can_be_written() -> None:
    item = item_from_meta({"parent_asin": "B1", "title": "a\ud800b", "details": {"x": "\udfff"}})
    assert (item.title + item.details).encode()


def test_turns() -> None:
    context = "<submission>Need a\nmug</submission>\n<comment>Budget?</comment>\n<comment>  </comment>\n"
    assert [(turn.role, turn.text) for turn in turns_of(context)] == [("seeker", "Need a\nmug"), ("comment", "Budget?")]
    assert [(turn.role, turn.text) for turn in turns_of("plain words")] == [("seeker", "plain words")]
    assert [turn.role for turn in turns_of("<submission>a</submission> and then b")] == ["seeker", "comment"]


def test_tags_that_are_never_closed_are_text_and_read_in_one_pass() -> None:
    context = "<comment>a <submission>b</submission> <comment>c" + "<comment>x " * 100_000
    first, second, third = turns_of(context)
    assert (first.role, first.text) == ("seeker", "<comment>a")
    assert (second.role, second.text) == ("seeker", "b")
    assert third.role == "comment" and third.text.startswith("<comment>c<comment>x")


def test_conversation_row() -> None:
    row = {"context": "<submission>hi</submission>", "gt_items": ["A", "B"], "candidates_st": ["A", "C"], "gt": "..."}
    conversation = conversation_from_row(row, id="test-3", index=3, file="test.jsonl")
    assert conversation.targets == ("A", "B") and conversation.context_items == ()
    assert conversation.candidates == {"candidates_st": ("A", "C")} and conversation.row == 3


@pytest.mark.parametrize("none", ["None", "nan", "NULL", " ", "", "N/A", None, float("nan")])
def test_what_stands_for_no_link_is_none_and_the_next_size_counts(none: object) -> None:
    links = [{"hi_res": none, "large": "http://x/l.jpg"}, {"hi_res": none, "large": none}, none]
    item = item_from_meta({"parent_asin": "B1", "images": links})
    assert (item.images, item.numbers, item.unlinked) == (("http://x/l.jpg",), (0,), 2)
    columns = {"hi_res": [none, "http://x/h.jpg"], "large": [none, none]}
    assert item_from_meta({"parent_asin": "B1", "images": columns}).images == ("http://x/h.jpg",)
    assert item_from_meta({"image_name": "B1_2.jpg", "image": none}).images == ()


def test_cells_without_a_value_are_missing() -> None:
    nan = float("nan")
    item = item_from_meta({"parent_asin": "B1", "title": nan, "images": nan, "categories": nan, "details": nan})
    assert (item.title, item.images, item.categories, item.details) == ("", (), (), "{}")


def test_values_that_json_does_not_have_are_written_as_json() -> None:
    """Parquet files have them."""
    details = {
        "day": date(2020, 1, 2),
        "time": datetime(2020, 1, 2, 3, 4, 5),
        "price": Decimal("1.50"),
        "raw": b"caf\xc3\xa9",
        "weights": [float("nan"), float("inf"), 1.5, None, True],
        "inner": {"weight": float("nan"), "count": 7},
    }
    item = item_from_meta({**AMAZON, "details": details})
    assert json.loads(item.details, parse_constant=pytest.fail) == {
        "day": "2020-01-02",
        "time": "2020-01-02 03:04:05",
        "price": "1.50",
        "raw": "café",
        "weights": [None, None, 1.5, None, True],
        "inner": {"weight": None, "count": 7},
    }
    assert item_from_meta({**AMAZON, "details": [("a", "x"), ("b", 1)]}) == item_from_meta(AMAZON)
    assert item_from_meta({**AMAZON, "images": [b"http://x/1.jpg"]}).images == ("http://x/1.jpg",)


@pytest.mark.parametrize(
    ("id", "text"), [(123.0, "123"), (-1.0, "-1"), (1.5, "1.5"), (2.0**60, str(2.0**60)), (2**60, str(2**60))]
)
def test_a_whole_number_is_an_id_without_a_fraction(id: float, text: str) -> None:
    assert item_from_meta({**AMAZON, "parent_asin": id}).id == text


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, '{"a": 1e999}', "{'a': 1}"])
def test_details_that_cannot_be_read_are_kept_as_text(text: str) -> None:
    assert json.loads(item_from_meta({**AMAZON, "details": text}).details) == {"text": text}


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)
META_KEYS = ("parent_asin", "asin", "title", "images", "categories", "features", "description", "details", "image_name")


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(META_KEYS) | st.text(max_size=8), JSON, max_size=8), st.none() | st.text())
def test_any_record_is_an_item_or_a_reason(meta: dict, id: str | None) -> None:
    try:
        item = item_from_meta(meta, id)
    except ValueError as error:
        assert str(error)
        return
    assert item.id and len(item.images) == len(item.numbers)
    for photo in item.photos:
        assert photo.url and photo.n >= 0
    (item.id + item.title + item.details + "".join(item.images)).encode()
    assert isinstance(json.loads(item.details), dict)
