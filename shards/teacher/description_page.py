"""A page of descriptions beside their photos, to judge a teacher by: one HTML file without scripts."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

from lavic.data.descriptions import ORIGIN, read_rows
from lavic.data.shard_dataset import ShardDataset
from lavic.data.tar_shards import Sample
from lavic.shards.teacher.tally import Tally
from lavic.storage.atomic import atomic_write

_SIDE = 256
_FLAGGED_SHARE = 3
"""At most one example in so many is a flagged one."""
_STYLE = """
:root { color-scheme: light dark; --line: light-dark(#d8d8d8, #404040); --flag: light-dark(#a33000, #ff9a6b); }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; }
dt { font-weight: 600; } dd { margin: 0; overflow-wrap: anywhere; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1rem; }
article { border: 1px solid var(--line); border-radius: .5rem; padding: .75rem; overflow-wrap: anywhere; }
img { display: block; max-width: 100%; max-height: 16rem; margin: 0 auto .5rem; }
h2 { font-size: 1rem; margin: 0 0 .25rem; } p { margin: .25rem 0; } .flag { color: var(--flag); font-weight: 600; }
"""


@dataclass(frozen=True)
class _Example:
    index: int
    """Index of the sample in the set."""
    text: str
    flag: str


def write_page(path: Path, data: ShardDataset, count: int, tally: Tally | None) -> None:
    """Writes a page of `count` examples: flagged ones first, the others from all over the set.

    Photos without a description are left out. `tally` has what this run did, None for nothing.
    """
    flags: Counter[str] = Counter()
    origins: set[tuple[str, ...]] = set()
    for _, row in _rows(data):
        flags[row["flag"]] += 1
        origins.add(tuple(row[name] for name in ORIGIN))
    flagged = sum(flags.values()) - flags[""]
    num_flagged = min(flagged, count // _FLAGGED_SHARE)
    examples = [*_spread(data, flagged, num_flagged, True), *_spread(data, flags[""], count - num_flagged, False)]
    summary = {
        "Photos": f"{len(data):,}, {sum(flags.values()):,} described",
        "Flagged": ", ".join(f"{n:,} {flag}" for flag, n in sorted(flags.items()) if flag) or "none",
        "Written by": "; ".join(
            ", ".join(f"{name} {value}" for name, value in zip(ORIGIN, origin, strict=True) if value)
            for origin in sorted(origins)
        ),
        **(tally.lines() if tally else {}),
    }
    summary_html = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in summary.items())
    cards = "".join(_card(data[example.index], example) for example in examples)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(
        path,
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Descriptions</title><style>{_STYLE}</style></head><body><h1>Descriptions</h1>"
        f"<dl>{summary_html}</dl><main>{cards}</main></body></html>\n",
    )


def _rows(data: ShardDataset) -> Iterator[tuple[int, dict[str, str]]]:
    """(index in the set, row) of every description."""
    start = 0
    for number, shard in enumerate(data.manifest.shards):
        indices = {key: start + n for n, key in enumerate(data.keys_of(number))}
        for row in read_rows(data.manifest.path(shard)):
            if row["key"] in indices:
                yield indices[row["key"]], row
        start += shard.samples


def _spread(data: ShardDataset, total: int, count: int, flagged: bool) -> Iterator[_Example]:
    """At most `count` of the `total` rows that are flagged, or not, at equal distances."""
    count = min(total, count)
    chosen_rows = {n * total // count for n in range(count)}
    rows = ((index, row) for index, row in _rows(data) if bool(row["flag"]) == flagged)
    for number, (index, row) in enumerate(rows):
        if number in chosen_rows:
            yield _Example(index, row["text"], row["flag"])


def _card(sample: Sample, example: _Example) -> str:
    flag = f'<p class="flag">{escape(example.flag)}</p>' if example.flag else ""
    text = escape(example.text) if example.text else "<i>no text</i>"
    return (
        f'<article><img alt="" src="{_thumbnail(sample)}"><h2>{escape(sample.title)}</h2>{flag}<p>{text}</p>'
        f"<p><small>{escape(sample.key)}</small></p></article>"
    )


def _thumbnail(sample: Sample) -> str:
    image = sample.image
    image.thumbnail((_SIDE, _SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
