"""Items and conversations, and the only place that knows the keys of the sources' JSON.

Sources: the released LaViC files (`item2meta_train.json`, `item2meta_valid.jsonl`, conversation `*.jsonl`) and Amazon
Reviews 2023 item metadata (`meta_*.jsonl`, parquet).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Literal

from lavic.storage.json_text import BadJson, json_type, parse_json

ImageSize = Literal["hi_res", "large", "thumb"]
"""The sizes in which the sources link a photo, largest first."""

SIZES: tuple[ImageSize, ...] = ("hi_res", "large", "thumb")

_ITEM_KEYS = """parent_asin asin image_name title images image categories features description details price
main_category average_rating rating_number videos store bought_together subtitle author"""
ITEM_KEYS = frozenset(_ITEM_KEYS.split())
"""Keys of an item's record: an object with one of them is an item, not a mapping of ids to items."""

_OPENING_TAG = re.compile(r"<(submission|comment)>")
TAG = re.compile(r"<(?=/?(?:submission|comment)>)")
"""The start of a tag, which begins or ends a turn in the text of a conversation."""
_NO_LINK = frozenset({"", "none", "nan", "null", "nil", "na", "n/a", "<na>", "undefined", "-"})
"""What exports contain in place of a missing link."""
NO_TEXT = (bool, list, tuple, Mapping)
"""Types that are not converted to text."""
_LARGEST_EXACT = 2.0**53
"""All integers below it are floats."""
_PHOTO_NAME = re.compile(r"(?P<item>.+)_(?P<n>\d{1,9})(\.\w+)?")


@dataclass(frozen=True, kw_only=True)
class Photo:
    """One product image of an item, before it is fetched."""

    n: int
    """Position in the item's list of images, from 0; positions without a URL are skipped, not renumbered."""
    url: str
    description: str = ""
    """What the catalogue says about this very photo, or empty."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One product of a catalogue."""

    id: str
    title: str
    images: tuple[str, ...] = ()
    """One URL per photo, in the catalogue's order."""
    numbers: tuple[int, ...] = ()
    """Position of each photo in the item's own list; empty means 0, 1, 2, ..."""
    categories: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    description: tuple[str, ...] = ()
    details: str = "{}"
    """The catalogue's free-form attributes as one JSON object."""
    descriptions: dict[str, str] = field(default_factory=dict)
    """Text about single photos, by photo name `<id>_<n>.jpg`."""
    unlinked: int = 0
    """Entries of the item's list of images that have no link."""

    @property
    def photos(self) -> Iterator[Photo]:
        """The photos that have a URL."""
        for n, url in zip(self.numbers or range(len(self.images)), self.images, strict=True):
            yield Photo(n=n, url=url, description=self.descriptions.get(f"{self.id}_{n}.jpg", ""))


@dataclass(frozen=True)
class Turn:
    """One post of a conversation: the seeker's request, or a comment."""

    role: Literal["seeker", "comment"]
    text: str


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """One request with its comments so far, the items that were recommended next, and lists to choose from."""

    id: str
    """`<file stem>-<row>`, unique within a file."""
    turns: tuple[Turn, ...]
    """The oldest first; the first is the seeker's."""
    context_items: tuple[str, ...] = ()
    """Item ids that the conversation has already named."""
    targets: tuple[str, ...] = ()
    """Item ids that count as right (`gt_items`)."""
    candidates: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Lists of item ids by key of the source, as `candidates_st`; in the order of the file."""
    row: int = 0
    """Row of the file, from 0; blank lines do not count."""
    file: str = ""
    line: int = 0
    """Line of the file, from 1; 0 where it is not from a line."""

    @property
    def place(self) -> str:
        """Where it stands, for messages: `file:line`."""
        return f"{self.file}:{self.line}" if self.line else self.file


def item_from_meta(meta: Mapping[str, Any], id: str | None = None, sizes: Sequence[ImageSize] = SIZES) -> Item:
    """The item of a record of a LaViC or Amazon Reviews 2023 catalogue.

    Its id is read from the record unless it is given, since the file holds it as a key. Of a photo's links the first of
    these sizes is taken.

    Raises:
        ValueError: The record is not an item; the message says why, without the place.
    """
    if "image_name" in meta:
        return _item_from_photo_row(meta)
    if not (id := as_text(id) or _text_of(meta, "parent_asin") or _text_of(meta, "asin")):
        raise ValueError(f"no item id: expected `parent_asin`, got the keys {_listed(meta)}; see --columns")
    image_links = _image_list(meta.get("images"))
    images = [(n, url) for n, links in enumerate(image_links) if (url := _link(links, sizes))]
    descriptions = meta.get("image_descriptions_llava_cleaned") or {}
    if not isinstance(descriptions, Mapping):
        raise ValueError("`image_descriptions_llava_cleaned` is not an object of photo name to text")
    return Item(
        id=id,
        title=_text_of(meta, "title"),
        images=tuple(url for _, url in images),
        numbers=tuple(n for n, _ in images),
        categories=_texts(meta.get("categories")),
        features=_texts(meta.get("features")),
        description=_texts(meta.get("description")),
        details=_details(meta.get("details")),
        descriptions={str(name): _text_of(descriptions, name) for name, text in descriptions.items() if text},
        unlinked=len(image_links) - len(images),
    )


def conversation_from_row(row: Mapping[str, Any], *, id: str, index: int, file: str, line: int = 0) -> Conversation:
    """The conversation of a row of the released files. Raises ValueError for another row, without its place."""
    if "context" not in row or "gt_items" not in row:
        raise ValueError(f"not a conversation: expected the keys `context` and `gt_items`, got {_listed(row)}")
    if not isinstance(row["context"], str):
        raise ValueError(f"`context` is {_type_of(row['context'])}, not text")
    return Conversation(
        id=id,
        turns=turns_of(as_text(row["context"])),
        context_items=_ids(row, "context_items"),
        targets=_ids(row, "gt_items"),
        candidates={key: _ids(row, key) for key in row if key.startswith("candidates")},
        row=index,
        file=file,
        line=line,
    )


def _ids(row: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """A list of item ids. Numbers are refused: an id written as a number may have lost leading zeros."""
    ids = row.get(key, ())
    if not isinstance(ids, (list, tuple)):
        raise ValueError(f"`{key}` is {_type_of(ids)}, not a list of item ids")
    for index, item in enumerate(ids):
        if not isinstance(item, str) or not item.strip():
            raise ValueError(f"`{key}[{index}]` is {_type_of(item)}, not an item id as text")
    return tuple(as_text(item) for item in ids)


def _type_of(value: Any) -> str:
    return "empty" if value == "" else json_type(value)


def turns_of(context: str) -> tuple[Turn, ...]:
    """Splits `<submission>...</submission>` and `<comment>...</comment>` into turns; text outside any tag is kept."""
    turns: list[tuple[str, str]] = []
    end = 0
    unclosed: set[str] = set()
    for opening in _OPENING_TAG.finditer(context):
        tag = opening[1]
        if opening.start() < end or tag in unclosed:
            continue
        # A missing closing tag is searched for only once: many opening tags do not make this quadratic.
        closing = context.find(f"</{tag}>", opening.end())
        if closing < 0:
            unclosed.add(tag)
            continue
        turns.append(("comment" if turns else "submission", context[end : opening.start()]))
        turns.append((tag, context[opening.end() : closing]))
        end = closing + len(f"</{tag}>")
    turns.append(("comment" if turns else "submission", context[end:]))
    return tuple(
        Turn("seeker" if tag == "submission" else "comment", text.strip()) for tag, text in turns if text.strip()
    )


def context_of(turns: Sequence[Turn]) -> str:
    """The `context` of some turns: `turns_of` reads the same turns from it.

    In a tag within a turn, a space is inserted after `<`, so that it does not begin or end a turn.
    """
    tags = {"seeker": "submission", "comment": "comment"}
    return "".join(f"<{tags[turn.role]}>{TAG.sub('< ', turn.text.strip())}</{tags[turn.role]}>\n" for turn in turns)


def _item_from_photo_row(meta: Mapping[str, Any]) -> Item:
    """A row of `item2meta_valid.jsonl`: one photo with its description, named `<id>_<n>.jpg`."""
    name = _text_of(meta, "image_name")
    if not (match := _PHOTO_NAME.fullmatch(name)):
        raise ValueError(f"`image_name` is {name!r}, not <item id>_<number>.jpg")
    id, n, url = match["item"], int(match["n"]), as_link(meta.get("image"))
    text = _text_of(meta, "image_description_llava_cleaned")
    return Item(
        id=id,
        title=_text_of(meta, "title"),
        images=(url,) if url else (),
        numbers=(n,) if url else (),
        descriptions={f"{id}_{n}.jpg": text} if text else {},
        unlinked=0 if url else 1,
    )


def _image_list(images: Any) -> list[Mapping[str, Any]]:
    """One mapping of size to URL per photo, from a list of objects or of URLs, an object of lists, or one object."""
    if isinstance(images, Mapping):
        if any(isinstance(images.get(size), str) for size in SIZES):
            return [images]
        columns = {size: images[size] for size in SIZES if isinstance(images.get(size), (list, tuple))}
        rows = max((len(column) for column in columns.values()), default=0)
        return [{size: column[n] for size, column in columns.items() if n < len(column)} for n in range(rows)]
    if _is_missing(images):
        return []
    if not isinstance(images, (list, tuple)):
        raise ValueError(f"`images` is {json_type(images)}, not a list of objects or an object of lists")
    return [{"large": image} if isinstance(image, (str, bytes)) else image for image in images]


def _link(links: Any, sizes: Sequence[ImageSize]) -> str:
    if not isinstance(links, Mapping):
        return ""
    return next((url for size in sizes if (url := as_link(links.get(size)))), "")


def as_link(value: Any) -> str:
    """A link; empty for a value that stands for a missing one."""
    text = "" if isinstance(value, NO_TEXT) else as_text(value)
    return "" if text.lower() in _NO_LINK else text


def _is_missing(value: Any) -> bool:
    # An empty cell of a table is read as NaN.
    return value is None or (isinstance(value, float) and value != value)


def _details(details: Any) -> str:
    """The details as one canonical JSON object, whether the source holds an object, a parquet map, or its text."""
    if isinstance(details, str):
        try:
            details = parse_json(details) if details.strip() else {}
        except BadJson:
            details = {"text": details}
    if isinstance(details, list) and details and all(isinstance(entry, tuple) for entry in details):
        details = dict(details)
    if not isinstance(details, Mapping):
        details = {} if _is_missing(details) else {"value": details}
    try:
        return as_text(json.dumps(details, ensure_ascii=False, sort_keys=True, allow_nan=False))
    except (TypeError, ValueError):
        return as_text(json.dumps(_json_value(details), ensure_ascii=False, sort_keys=True))


def _json_value(value: Any) -> Any:
    """A value of a parquet file as one of JSON: dates, decimals and bytes become text, NaN and infinity null."""
    if isinstance(value, Mapping):
        return {as_text(key): _json_value(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(entry) for entry in value]
    if isinstance(value, float):
        return value if isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else as_text(value)


def as_text(value: Any) -> str:
    """A value as text that can be written; empty for a missing one.

    Raises:
        ValueError: It is a list, an object or a boolean.
    """
    if isinstance(value, NO_TEXT):
        raise ValueError(f"{json_type(value)} where a text was expected")
    if isinstance(value, bytes):
        # Older Parquet writers do not mark byte arrays as strings.
        value = value.decode("utf-8", "replace")
    if isinstance(value, float) and value.is_integer() and abs(value) < _LARGEST_EXACT:
        # pandas turns a column of integers in which one is missing into floats.
        value = int(value)
    text = "" if _is_missing(value) else str(value).strip()
    # JSON may contain a lone surrogate, which UTF-8 cannot encode.
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _text_of(meta: Mapping[str, Any], key: str) -> str:
    """The text under a key; raises ValueError, which names it."""
    try:
        return as_text(meta.get(key))
    except ValueError as error:
        raise ValueError(f"`{key}`: {error}") from None


def _texts(value: Any) -> tuple[str, ...]:
    """The texts of a list, or of lists in it: the categories of older catalogues are a list of paths."""
    if _is_missing(value):
        return ()
    if isinstance(value, str):
        return (value.strip(),) if value.strip() else ()
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"expected a list of texts, got {json_type(value)}")
    flat: list[str] = []
    for entry in value:
        flat += _texts(entry) if isinstance(entry, (list, tuple)) else filter(None, (as_text(entry),))
    return tuple(flat)


def _listed(row: Mapping[str, Any]) -> str:
    keys = [str(key) for key in row][:12]
    return ", ".join(keys) + (", ..." if len(row) > len(keys) else "") or "none"
