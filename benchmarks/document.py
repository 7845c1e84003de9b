"""Tables of a document that a script computes, each between `<!-- NAME -->` and `<!-- end -->`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

Table = Iterator[Sequence[str]]
"""Rows of cells, the header first."""


def markdown(table: Table) -> str:
    """A table as Markdown."""
    header, *rows = table
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def update(document: Path, tables: Mapping[str, Table], *, check: bool, hint: str) -> int:
    """Rewrites the tables of a document, or with `check` only compares them; returns the exit code.

    Args:
        document: A Markdown file.
        tables: By name.
        check: Change nothing; return 1 where a table differs.
        hint: What the tables should be and how to rewrite them, for the message.

    Raises:
        SystemExit: The document has no place for a table, or several.
    """
    current = document.read_text("utf-8")
    text = current
    for name, table in tables.items():
        content = markdown(table)
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        text, count = re.subn(
            pattern, lambda match, content=content: f"{match[1]}{content}\n{match[2]}", text, flags=re.S
        )
        if count != 1:
            raise SystemExit(f"{document}: has {count} places for the table '{name}', expected one")
    if not check:
        document.write_text(text, "utf-8")
    elif text != current:
        print(f"{document}: its tables are not {hint}")
        return 1
    return 0
