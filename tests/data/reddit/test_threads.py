"""Conversations of a thread: one case for each reason by which a comment is dropped."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lavic.data.reddit.dumps.post import id_of, post_from_row
from lavic.data.reddit.funnel import COMMENTS, NOTES, POSTS
from lavic.data.reddit.item_table import ItemTable, merge_catalogue, read_catalogue, read_reviews
from lavic.data.reddit.settings import LabelSettings
from lavic.data.reddit.threads import Example, Threads
from tests.data.reddit.reddit_dumps import ITEMS, comment, dp, submission, write_items, write_reviews

VARIANT = "B1AAAAAAA1"
ASKED = submission("s1", "Which razor?", "I have dry skin, and need one.")
MIDDLE = comment("c1", "s1", "t3_s1", "What is your budget?", author="other")
ANSWER = comment("c2", "s1", "t1_c1", f"I love this one: {dp(ITEMS[1])}")


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> ItemTable:
    folder = tmp_path_factory.mktemp("table")
    read_catalogue(str(write_items(folder / "meta.jsonl")), folder / "a")
    read_reviews(str(write_reviews(folder / "r.jsonl.gz", {VARIANT: ITEMS[0]})), folder / "b")
    merge_catalogue(folder, [folder / "a"], [folder / "b"])
    return ItemTable(folder)


def build(items: ItemTable, *rows: dict[str, Any], **options: Any) -> tuple[list[Example], Counter[str]]:
    labels = options.pop("labels", LabelSettings())
    threads = Threads([post_from_row(row) for row in rows], items, labels, **options)
    examples = list(threads.examples())
    assert set(threads.counts) <= {*POSTS, *COMMENTS, *NOTES}
    reasons = sum(count for name, count in threads.counts.items() if name in COMMENTS and name != "linking")
    assert reasons == threads.counts["linking"], "each comment is counted once"
    return examples, threads.counts


def test_a_conversation_is_the_path_to_the_comment(items: ItemTable) -> None:
    beside = comment("c9", "s1", "t3_s1", "Nothing to see.", author="third")
    [example], _ = build(items, ANSWER, beside, MIDDLE, ASKED)
    assert example.row == {
        "context": "<submission>Which razor? I have dry skin, and need one.</submission>\n"
        "<comment>What is your budget?</comment>\n",
        "context_items": (),
        "gt": f"I love this one: {dp(ITEMS[1])}",
        "gt_items": (ITEMS[1],),
    }
    assert (id_of(example.submission), [id_of(turn) for turn in example.turns], id_of(example.comment)) == (
        "s1",
        ["c1"],
        "c2",
    )


DROPPED: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "deleted later": ("deleted_later", [ASKED, MIDDLE, {**ANSWER, "_meta": {"was_deleted_later": True}}]),
    "restored": ("restored", [ASKED, MIDDLE, {**ANSWER, "_meta": {"was_initially_deleted": True}}]),
    "removed": ("removed", [ASKED, MIDDLE, {**ANSWER, "removed_by_category": "moderator"}]),
    "deleted": ("deleted", [ASKED, MIDDLE, {**ANSWER, "removed_by_category": "deleted"}]),
    "no author": ("author_missing", [ASKED, MIDDLE, {**ANSWER, "author": None}]),
    "deleted author": ("author_deleted", [ASKED, MIDDLE, {**ANSWER, "author": "[deleted]"}]),
    "bot by list": ("bot", [ASKED, MIDDLE, {**ANSWER, "author": "AutoModerator"}]),
    "bot by name": ("bot", [ASKED, MIDDLE, {**ANSWER, "author": "amazon_link_bot"}]),
    "bot by its words": ("bot", [ASKED, MIDDLE, {**ANSWER, "body": f"{dp(ITEMS[1])} ^(I am a bot)"}]),
    "moderator": ("bot", [ASKED, MIDDLE, {**ANSWER, "distinguished": "moderator"}]),
    "quoted": ("quoted_links", [ASKED, MIDDLE, {**ANSWER, "body": f"&gt; {dp(ITEMS[1])}\n\nNo idea."}]),
    "the asker's": ("asker", [ASKED, MIDDLE, {**ANSWER, "author": "asker"}]),
    "low score": ("score", [ASKED, MIDDLE, {**ANSWER, "score": 0}]),
    "in the submission": ("in_context", [{**ASKED, "selftext": f"Not {dp(ITEMS[1])}"}, MIDDLE, ANSWER]),
    "in the title": ("in_context", [{**ASKED, "title": f"Is {dp(ITEMS[1])} any good?"}, MIDDLE, ANSWER]),
    "what a link post links to": (
        "in_context",
        [{**ASKED, "selftext": "", "is_self": False, "url": dp(ITEMS[1])}, MIDDLE, ANSWER],
    ),
    "in a comment above": ("in_context", [ASKED, {**MIDDLE, "body": dp(ITEMS[1])}, ANSWER]),
    "a variant above": (
        "in_context",
        [{**ASKED, "selftext": dp(ITEMS[0])}, MIDDLE, {**ANSWER, "body": f"good: {dp(VARIANT)}"}],
    ),
    "a list": ("too_many_items", [ASKED, MIDDLE, {**ANSWER, "body": " ".join(map(dp, ITEMS[:21]))}]),
    "warning": ("sentiment", [ASKED, MIDDLE, {**ANSWER, "body": f"Don't buy this garbage: {dp(ITEMS[1])}"}]),
    "no submission": ("submission_missing", [MIDDLE, ANSWER]),
    "deleted submission": ("submission_gone", [{**ASKED, "selftext": "[deleted]"}, MIDDLE, ANSWER]),
    "title removed": ("submission_gone", [{**ASKED, "title": "[ Removed by moderator ]"}, MIDDLE, ANSWER]),
    "deleted title": ("submission_gone", [{**ASKED, "title": "[deleted by user]"}, MIDDLE, ANSWER]),
    "no parent": ("parent_missing", [ASKED, ANSWER]),
    "no parent id": ("parent_missing", [ASKED, MIDDLE, {**ANSWER, "parent_id": None}]),
    "a circle": ("parent_missing", [ASKED, {**MIDDLE, "parent_id": "t1_c2"}, ANSWER]),
    "deleted parent": ("parent_gone", [ASKED, {**MIDDLE, "body": "[deleted]"}, ANSWER]),
    "bot above": ("bot_context", [ASKED, {**MIDDLE, "author": "AutoModerator"}, ANSWER]),
    "no words": (
        "no_context",
        [{**ASKED, "title": "https://i.redd.it/x.jpg", "selftext": ""}, {**ANSWER, "parent_id": "t3_s1"}],
    ),
}


@pytest.mark.parametrize("name", DROPPED)
def test_a_dropped_comment_is_counted_under_its_reason(items: ItemTable, name: str) -> None:
    reason, rows = DROPPED[name]
    examples, counts = build(items, *rows)
    dropped = {key: count for key, count in counts.items() if key in COMMENTS and count and key != "linking"}
    if reason == "in_context" and name == "in a comment above":
        # The comment above is a recommendation itself.
        assert [id_of(example.comment) for example in examples] == ["c1"] and dropped == {"kept": 1, "in_context": 1}
    else:
        assert not examples and dropped == {reason: 1}


def test_every_reason_has_a_case() -> None:
    assert {reason for reason, _ in DROPPED.values()} == set(COMMENTS) - {"linking", "kept"}


def test_restored_text_is_used_nowhere(items: ItemTable) -> None:
    restored = {**MIDDLE, "_meta": {"was_initially_deleted": True}, "body": "restored words"}
    [example], counts = build(items, ASKED, restored, ANSWER, labels=LabelSettings(incomplete="keep"))
    assert "restored" not in example.context and counts["turns_left_out"] == 1


def test_settings_change_what_is_kept(items: ItemTable) -> None:
    for rows, labels in (
        ([ASKED, MIDDLE, {**ANSWER, "score": -3}], LabelSettings(min_score=None)),
        ([ASKED, MIDDLE, {**ANSWER, "body": f"garbage {dp(ITEMS[1])}"}], LabelSettings(min_sentiment=None)),
        ([ASKED, MIDDLE, {**ANSWER, "author": "[deleted]"}], LabelSettings(deleted_authors="keep")),
        ([ASKED, ANSWER], LabelSettings(incomplete="keep")),
    ):
        assert len(build(items, *rows, labels=labels)[0]) == 1
    assert build(items, ASKED, MIDDLE, ANSWER, bots={"helper"})[1]["bot"] == 1


def test_an_unknown_score_is_kept_and_counted(items: ItemTable) -> None:
    examples, counts = build(items, ASKED, MIDDLE, {**ANSWER, "score": None})
    assert len(examples) == 1 and counts["score_unknown"] == 1


def test_several_targets_and_what_is_left_out_of_them(items: ItemTable) -> None:
    body = (
        f"> what about {dp(ITEMS[9])}\n\nGet {dp(ITEMS[1])} or {dp(VARIANT)}, both great.\n"
        f"Avoid {dp(ITEMS[2])}, it is garbage.\nYours: {dp(ITEMS[3])}"
    )
    submission_row = {**ASKED, "selftext": f"I have {dp(ITEMS[3])}"}
    [example], counts = build(items, submission_row, MIDDLE, {**ANSWER, "body": body})
    assert example.gt_items == (ITEMS[1], ITEMS[0]) and example.context_items == (ITEMS[3],)
    left_out = {name: counts[name] for name in ("items_quoted", "items_in_context", "items_against", "variants")}
    assert left_out == {"items_quoted": 1, "items_in_context": 1, "items_against": 1, "variants": 1}


def test_names_are_removed_as_the_editor_escapes_them(items: ItemTable) -> None:
    submission_row = {
        **ASKED,
        "selftext": r"u/some\_one\_else and bob\_12 and reddit.com/u/third_1 say user/password, not bob_123",
    }
    answer = {**ANSWER, "author": "bob_12", "body": rf"see https://www.reddit.com/user/x\_y/ {dp(ITEMS[1])} -bob\_12"}
    [example], _ = build(items, submission_row, MIDDLE, answer)
    text = "[user] and [user] and reddit.com/[user] say user/password, not bob_123"
    assert f"{text}</submission>" in example.context
    assert example.gt == f"see https://www.reddit.com/[user]/ {dp(ITEMS[1])} -bob\\_12"


def test_a_link_in_a_text_without_spaces_is_cut(items: ItemTable) -> None:
    submission_row = {**ASKED, "selftext": f"アマゾンamazon.co.jp/dp/{ITEMS[3]} ですか"}
    [example], _ = build(items, submission_row, MIDDLE, ANSWER)
    assert example.context_items == (ITEMS[3],) and ITEMS[3] not in example.context


def test_a_path_of_ten_thousand_comments(items: ItemTable) -> None:
    """Each by another account, whose names are looked for in every one of the texts."""
    ids = [id_of(50_000 + n) for n in range(10_000)]
    parents = ["t3_s1", *(f"t1_{id}" for id in ids)]
    above = [
        comment(id, "s1", parent, f"no {n}", author=f"name_{n}")
        for n, (id, parent) in enumerate(zip(ids, parents, strict=False))
    ]
    answer = {**ANSWER, "parent_id": parents[-1], "body": f"name_7, {dp(ITEMS[1])}"}
    [example], _ = build(items, ASKED, *above, answer)
    assert len(example.turns) == 10_000 and example.context.endswith("<comment>no 9999</comment>\n")
    assert example.gt == f"[user], {dp(ITEMS[1])}"


def test_resolved_short_links_are_targets(items: ItemTable) -> None:
    rows = [ASKED, MIDDLE, {**ANSWER, "body": "great: https://amzn.to/3HR4q7E"}]
    assert not build(items, *rows)[0]
    [example], counts = build(items, *rows, resolved={"https://amzn.to/3HR4q7E": ITEMS[4]})
    assert example.gt_items == (ITEMS[4],) and example.forms == ("short",) and counts["short_links"] == 1


def test_the_order_of_the_posts_does_not_matter_nor_do_repeated_ones(items: ItemTable) -> None:
    edited = {**ANSWER, "body": f"Edited: {dp(ITEMS[5])}", "retrieved_on": ANSWER["retrieved_on"] + 9}
    rows = [ASKED, MIDDLE, ANSWER, edited, MIDDLE]
    results = [build(items, *order) for order in itertools.permutations(rows)]
    assert all(result == results[0] for result in results)
    examples, counts = results[0]
    assert [example.gt_items for example in examples] == [(ITEMS[5],)] and counts["repeated"] == 2


def test_a_mark_of_deletion_in_any_version_counts(items: ItemTable) -> None:
    marked = {**ANSWER, "_meta": {"was_deleted_later": True}, "retrieved_on": 1}
    for rows in itertools.permutations([ASKED, MIDDLE, ANSWER, marked]):
        assert not build(items, *rows)[0]


def test_the_context_has_no_links_names_entities_and_mojibake(items: ItemTable, tmp_path: Path) -> None:
    submission_row = submission(
        "s1",
        "Razors &amp; soap",
        "I\u00e2\u0080\u0099d like [this](https://x.y/z) or https://b.c/d_e. Ask u/some_one, /u/other-one or bob_12!"
        "</submission><comment>",
    )
    middle = comment("c1", "s1", "t3_s1", "@bob_12 see [https://x.y](https://x.y)\n\n\n\nok \ud83d", author="bob_12")
    [example], _ = build(items, submission_row, middle, {**ANSWER, "body": f"u/bob_12 I love {dp(ITEMS[1])}"})
    assert example.context == (
        "<submission>Razors & soap I\u2019d like this or Ask [user], [user] or [user]!</submission>\n"
        "<comment>[user] see\n\nok \ufffd</comment>\n"
    )
    assert example.gt == f"[user] I love {dp(ITEMS[1])}"
