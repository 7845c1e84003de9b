"""What is counted from the lines of the dumps to the rows of the set: the name and meaning of each count."""

from __future__ import annotations

LINES = {
    "lines": "lines of the dumps",
    "without_a_link": "lines that do not name Amazon; not parsed",
    "not_json": "lines that are not JSON objects",
    "neither_comment_nor_submission": "lines with neither `link_id` nor `title`",
    "no_id": "posts without a Reddit id",
    "no_submission_id": "comments without `link_id`",
    "no_time": "posts without a time in `created_utc`",
    "submission": "submissions that name Amazon",
    "name_without_a_link": "comments that name Amazon without a link to an item",
    "short_link_only": "comments whose only links are short ones, which were not resolved",
    "item_not_in_catalogue": "comments whose items are not in the catalogue",
    "comment_with_an_item": "comments that link to an item of the catalogue",
}
"""The first pass: each line is counted once, besides in `lines`."""

POSTS = {
    "comments": "comments in the threads of these comments",
    "submissions": "their submissions",
    "repeated": "posts that the dumps contain more than once",
}
"""The second pass."""

BROKEN = ("not_json", "neither_comment_nor_submission", "no_id", "no_submission_id", "no_time")
"""Why a line is not a post: keys of `LINES`, counted in the second pass too."""

COMMENTS = {
    "linking": "comments that link to an item of the catalogue, each once",
    "deleted": "deleted by their author",
    "removed": "removed by moderators or Reddit",
    "deleted_later": "deleted or removed by the second retrieval",
    "restored": "deleted at first and restored in the dump; not used",
    "author_missing": "without an author",
    "author_deleted": "by a deleted account",
    "bot": "by a bot, or by a moderator in that role",
    "quoted_links": "whose links are all in quotes",
    "asker": "by the original poster",
    "score": "with a low score",
    "in_context": "whose items the conversation has named already",
    "too_many_items": "with a list of items",
    "sentiment": "that advise against the item",
    "submission_missing": "whose submission is not in the dumps",
    "submission_gone": "whose submission is deleted or removed",
    "parent_missing": "with a comment above them that is not in the dumps",
    "parent_gone": "with a comment above them that is deleted or removed",
    "bot_context": "with a bot's comment above them",
    "no_context": "without any text before them",
    "kept": "that became a conversation",
}
"""The third pass: each comment is counted under the first reason that applies."""

NOTES = {
    "score_unknown": "conversations whose comment has no score in the dumps",
    "turns_left_out": "turns that are missing in conversations (--labels.incomplete keep)",
    "items_quoted": "items of kept comments that were left out, since only quotes link to them",
    "items_in_context": "items of kept comments that were left out, since they were named before",
    "items_against": "items of kept comments that were left out, since the comment advises against them",
    "variants": "links to a variant that were merged into its parent",
    "short_links": "short links that were resolved",
}
"""What happened to conversations that were kept."""
