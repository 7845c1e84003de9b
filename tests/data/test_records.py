"""The sources' JSON, in every form it is released in."""

from __future__ import annotations

import json

import pytest

from lavic.data.records import conversation_from_row, item_from_meta, turns_of

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
    ("meta", "says"),
    [
        ({"title": "x"}, "parent_asin"),
        ({"parent_asin": "B1", "images": "http://x/0.jpg"}, "images"),
        ({"parent_asin": "B1", "categories": {"a": 1}}, "list of texts"),
        ({"image_name": "photo.jpg"}, "image_name"),
    ],
)
def test_what_is_no_item_says_why(meta: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        item_from_meta(meta)


def test_half_a_surrogate_pair_becomes_text_that_can_be_written() -> None:
    item = item_from_meta({"parent_asin": "B1", "title": "a\ud800b", "details": {"x": "\udfff"}})
    assert (item.title + item.details).encode()


def test_turns() -> None:
    context = "<submission>Need a\nmug</submission>\n<comment>Budget?</comment>\n<comment>  </comment>\n"
    assert [(turn.role, turn.text) for turn in turns_of(context)] == [("seeker", "Need a\nmug"), ("comment", "Budget?")]
    assert [(turn.role, turn.text) for turn in turns_of("plain words")] == [("seeker", "plain words")]
    assert [turn.role for turn in turns_of("<submission>a</submission> and then b")] == ["seeker", "comment"]


def test_conversation_row() -> None:
    row = {"context": "<submission>hi</submission>", "gt_items": ["A", "B"], "candidates_st": ["A", "C"], "gt": "..."}
    conversation = conversation_from_row(row, id="test-3", index=3, file="test.jsonl")
    assert conversation.targets == ("A", "B") and conversation.context_items == ()
    assert conversation.candidates == {"candidates_st": ("A", "C")} and conversation.row == 3
