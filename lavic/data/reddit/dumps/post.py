"""A post of Reddit, submission or comment: the only place that knows the keys of the dumps' JSON.

Formats: Pushshift (to 2023-03) and Arctic Shift (since then), monthly and per subreddit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any, NamedTuple

import orjson

_GONE = re.compile(r"\s*\[\s*(?:deleted|removed)(?: by\b[^\[\]\n]{0,100})?\s*\]\s*", re.IGNORECASE)
_END_TIME = 4_102_444_800
"""The year 2100; a time in milliseconds is later."""

NO_PARENT = -1
"""Parent of a comment whose `parent_id` is missing or cannot be read."""

_LARGEST = (1 << 63) - 1


class BadPost(ValueError):
    """A row that is not a post; the message is the reason by which it is counted."""


@dataclass(frozen=True, slots=True)
class Post:
    """A submission or a comment."""

    id: int
    """Reddit's base 36 number, without `t1_` or `t3_`."""
    submission: int
    """The submission that it is in, or that it is."""
    is_comment: bool
    parent: int
    """The comment that it answers; 0 where it answers the submission; `NO_PARENT` where the dump does not say."""
    author: str
    """Empty where it is missing."""
    created: int
    """Seconds since 1970."""
    score: int | None
    """Upvotes minus downvotes, as of the retrieval; None where it is not known."""
    subreddit: str
    title: str
    link: str
    """The link of a submission without a text; empty for others."""
    text: str
    gone: str
    """Why the text may not be used: `deleted`, `removed`, `deleted_later`, `restored`; or empty."""
    official: bool
    """A moderator's or administrator's post in that role."""
    crosspost: int
    """The submission that this one repeats; 0 for none."""
    retrieved: int
    """When it was last retrieved; 0 where it is not known."""


def read_object(line: bytes) -> dict[str, Any]:
    """The JSON object of a line. Raises BadPost for any other line."""
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        # orjson refuses lone surrogates, which the standard library accepts.
        try:
            row = json.loads(line.decode("utf-8", "replace"))
        except (ValueError, RecursionError):
            row = None
    if not isinstance(row, dict):
        raise BadPost("not_json")
    return row


class PostKey(NamedTuple):
    """What identifies a post."""

    is_comment: bool
    id: int
    submission: int
    created: int


def post_key(row: Mapping[str, Any]) -> PostKey:
    """What identifies the post of a row.

    Raises:
        BadPost: It has no id, no submission or no time, or is neither comment nor submission.
    """
    is_comment = "link_id" in row
    if not is_comment and "title" not in row:
        raise BadPost("neither_comment_nor_submission")
    id = number_of(row.get("id"))
    submission = number_of(row.get("link_id")) if is_comment else id
    if not id:
        raise BadPost("no_id")
    if not submission:
        raise BadPost("no_submission_id")
    try:
        created = int(float(row["created_utc"]))
    except (KeyError, TypeError, ValueError, OverflowError):
        created = 0
    if not 0 < created < _END_TIME:
        raise BadPost("no_time")
    return PostKey(is_comment, id, submission, created)


def post_text(row: Mapping[str, Any]) -> str:
    """The text of a row's post."""
    return _text(row.get("body" if "link_id" in row else "selftext"))


def post_from_row(row: Mapping[str, Any]) -> Post:
    """The post of a row. Raises BadPost as `post_key`."""
    is_comment, id, submission, created = post_key(row)
    text = post_text(row)
    return Post(
        id=id,
        submission=submission,
        is_comment=is_comment,
        parent=_parent(row.get("parent_id")) if is_comment else 0,
        author=_text(row.get("author")),
        created=created,
        score=_whole(row.get("score")),
        subreddit=_text(row.get("subreddit")),
        title="" if is_comment else _text(row.get("title")),
        link="" if is_comment or row.get("is_self") else _text(row.get("url")),
        text=text,
        gone=_gone(row, text),
        official=row.get("distinguished") in ("moderator", "admin"),
        crosspost=0 if is_comment else number_of(row.get("crosspost_parent")),
        retrieved=_retrieved(row),
    )


def is_gone(text: str) -> bool:
    """Whether a text, title or author is Reddit's placeholder for a deleted or removed one, such as `[deleted]`."""
    return _GONE.fullmatch(text) is not None


def pack_post(post: Post) -> bytes:
    """A post as one line."""
    values = astuple(post)
    try:
        return orjson.dumps(values)
    except orjson.JSONEncodeError:
        return json.dumps(values, separators=(",", ":")).encode()


def unpack_post(line: bytes) -> Post:
    """The post of such a line."""
    try:
        return Post(*orjson.loads(line))
    except orjson.JSONDecodeError:
        return Post(*json.loads(line))


def id_of(number: int) -> str:
    """A post's number as Reddit writes it, in base 36."""
    digits = ""
    while number:
        number, digit = divmod(number, 36)
        digits = "0123456789abcdefghijklmnopqrstuvwxyz"[digit] + digits
    return digits or "0"


def number_of(id: Any) -> int:
    """A post's number; 0 for anything but a Reddit id."""
    if not isinstance(id, str):
        return 0
    digits = id.rpartition("_")[2]
    try:
        number = int(digits, 36) if digits.isalnum() else 0
    except ValueError:
        return 0
    return number if number <= _LARGEST else 0


def _parent(id: Any) -> int:
    number = number_of(id)
    if not number:
        return NO_PARENT
    return 0 if str(id).startswith("t3_") else number


def _whole(value: Any) -> int | None:
    """An integer, also as text; None for anything else."""
    if isinstance(value, bool) or value is None:
        return None
    try:
        return int(float(value))
    except (TypeError, ValueError, OverflowError):
        return None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _gone(row: Mapping[str, Any], text: str) -> str:
    meta = _meta(row)
    removed = row.get("removed_by_category") or meta.get("removal_type")
    kind = "deleted" if removed == "deleted" else "removed"
    if meta.get("was_initially_deleted"):
        return "restored"
    if meta.get("was_deleted_later"):
        return "deleted_later"
    if is_gone(text):
        return "removed" if "removed" in text.lower() else "deleted"
    return kind if removed else ""


def _retrieved(row: Mapping[str, Any]) -> int:
    times = (_meta(row).get("retrieved_2nd_on"), row.get("retrieved_on"), row.get("retrieved_utc"))
    return max((time for time in map(_whole, times) if time), default=0)


def _meta(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Arctic Shift's metadata of a post."""
    meta = row.get("_meta")
    return meta if isinstance(meta, dict) else {}
