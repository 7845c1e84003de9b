"""The data card of a set, as markdown and as a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from lavic.data.reddit.funnel import BROKEN, COMMENTS, LINES, NOTES, POSTS

_MOST_ROWS = 25
_TERMS = (
    "The texts are their authors'. Reddit's Public Content Policy asks that what was deleted is not used, and that the "
    "use is not commercial without an agreement; its user agreement and the terms of the dumps' publishers apply.",
    "Amazon Reviews 2023 is published without a licence.",
    "Posts that were deleted or removed by the second retrieval are left out. What was deleted after the dumps were "
    "made is still included: fetch newer dumps, or rebuild the set from its ids.",
    "Share the ids, not the texts: `<split>.ids.jsonl` has no text, and `lavic reddit rebuild` rebuilds the set "
    "from them and the dumps.",
)
_KNOWN = (
    "A link is not always a recommendation: the sentiment check finds warnings but not irony.",
    "Scores are those of 36 hours after the post (Arctic Shift) or of the retrieval (Pushshift), not today's.",
    "A category is the first of the item's in the catalogue.",
    "The ids say what was linked, not which variant was meant; variants count for their parent where reviews name it.",
)


@dataclass(frozen=True)
class _Table:
    title: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


@dataclass(frozen=True)
class _List:
    title: str
    lines: tuple[str, ...]


def card_markdown(funnel: Mapping[str, Any]) -> str:
    """The card as markdown."""
    blocks = ["# Conversations from Reddit with items of Amazon", _lead(funnel)]
    for block in _blocks(funnel):
        blocks.append(f"## {_plain(block.title)}")
        if isinstance(block, _List):
            blocks.append("\n".join(f"- {_plain(line)}" for line in block.lines))
            continue
        lines = [block.head, tuple("---" if n == 0 else "--:" for n in range(len(block.head))), *block.rows]
        blocks.append("\n".join("| " + " | ".join(map(_plain, line)) + " |" for line in lines))
    return "\n\n".join(blocks) + "\n"


def _plain(text: str) -> str:
    """A text on one line, without HTML and new cells of a table."""
    return " ".join(text.split()).replace("<", "&lt;").replace("|", "\\|")


def card_html(funnel: Mapping[str, Any]) -> str:
    """The card as a page without scripts and links."""
    body = ["<h1>Conversations from Reddit with items of Amazon</h1>", f"<p>{escape(_lead(funnel))}</p>"]
    for block in _blocks(funnel):
        body.append(f"<h2>{escape(block.title)}</h2>")
        if isinstance(block, _List):
            body.append("<ul>" + "".join(f"<li>{escape(line)}</li>" for line in block.lines) + "</ul>")
            continue
        head = "".join(f"<th>{escape(cell)}</th>" for cell in block.head)
        rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in block.rows)
        body.append(f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>Data card</title><style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;margin:1rem 0}"
    "td,th{padding:.2rem .8rem;border-bottom:1px solid #8884;text-align:right}"
    "td:first-child,th:first-child{text-align:left}"
)


def _lead(funnel: Mapping[str, Any]) -> str:
    rows = {name: split["rows"] for name, split in funnel["splits"].items()}
    days = [split[key] for split in funnel["splits"].values() for key in ("first", "last") if split[key]]
    span = f", posted from {min(days)} to {max(days)}" if days else ""
    counts = ", ".join(f"{name} {count:,}" for name, count in rows.items())
    return (
        f"{sum(rows.values()):,} conversations ({counts}){span}. "
        "Each has the request and the comments up to one that links to items of the catalogue, which are its target."
    )


def _blocks(funnel: Mapping[str, Any]) -> list[_Table | _List]:
    splits: Mapping[str, Mapping[str, Any]] = funnel["splits"]
    blocks: list[_Table | _List] = [
        _Table(title, ("", "count"), [(text, f"{funnel[stage].get(key, 0):,}") for key, text in texts.items()])
        for title, texts, stage in _STAGES
    ]
    count_keys = ("rows", "submissions", "items", "distinct_items", "rows_with_several_items", "rows_without_comments")
    rows = [(name.replace("_", " "), *(f"{split[name]:,}" for split in splits.values())) for name in count_keys]
    rows += [(name, *(split[name] for split in splits.values())) for name in ("first", "last")]
    rows += [
        (
            f"{name.replace('_', ' ')}, {statistic}",
            *(f"{split[name].get(statistic, 0):,.6g}" for split in splits.values()),
        )
        for name in ("turns", "context_characters")
        for statistic in ("mean", "p50", "p95", "p100")
    ]
    blocks.append(_Table("Splits", ("", *splits), rows))
    overlap = [
        (
            pair,
            f"{counts['items']:,} of {counts['items_of_the_later']:,}",
            f"{counts['authors']:,} of {counts['authors_of_the_later']:,}",
        )
        for pair, counts in funnel["overlap"].items()
    ]
    blocks.append(_Table("Overlap of the splits", ("", "items of the later one", "accounts of the later one"), overlap))
    duplicates = funnel["duplicates"]
    blocks.append(
        _List(
            "Same submissions",
            (
                f"{duplicates['groups']:,} groups of near-duplicates, reposts and crossposts with "
                f"{duplicates['grouped']:,} submissions, each group in the split of its first; "
                f"{duplicates['moved']:,} submissions are in an earlier split for that.",
            ),
        )
    )
    for name, title in _COUNTED.items():
        blocks.append(_Table(title, ("", *splits), _top({split: values[name] for split, values in splits.items()})))
    settings = [f"{key} = {value}" for key, value in funnel["settings"].items()]
    return [*blocks, _List("Settings", tuple(settings)), _List("What to know", _KNOWN), _List("Terms", _TERMS)]


_STAGES = (
    ("Lines", LINES, "lines"),
    ("Posts of the threads", {**POSTS, **{name: LINES[name] for name in BROKEN}}, "posts"),
    ("Comments that link to an item", COMMENTS, "comments"),
    ("Notes", NOTES, "notes"),
)
_COUNTED = {
    "categories": "Categories of the items",
    "subreddits": "Subreddits",
    "years": "Years",
    "forms": "Links by form",
    "shops": "Shops",
}


def _top(counts: Mapping[str, Mapping[str, int]]) -> list[tuple[str, ...]]:
    """The most frequent values with their counts in each split, and the sum of the others."""
    totals: dict[str, int] = {}
    for split in counts.values():
        for name, count in split.items():
            totals[name] = totals.get(name, 0) + count
    order = sorted(totals, key=lambda name: (-totals[name], name))
    rows = [
        (name or "(none)", *(f"{split.get(name, 0):,}" for split in counts.values())) for name in order[:_MOST_ROWS]
    ]
    if others := order[_MOST_ROWS:]:
        rows.append(
            (
                f"{len(others):,} others",
                *(f"{sum(split.get(name, 0) for name in others):,}" for split in counts.values()),
            )
        )
    return rows
