"""HTML elements as text."""

from __future__ import annotations

from html import escape


def tag(name: str, *children: str, **attributes: str) -> str:
    """An element. Children are HTML; attributes are escaped, and may end in _ (`class_`, `for_`)."""
    written = "".join(f' {key.rstrip("_")}="{escape(text)}"' for key, text in attributes.items() if text)
    return f"<{name}{written}>{''.join(children)}</{name}>"


def permalink(anchor: str) -> str:
    """A link of an element to itself."""
    return tag("a", "#", class_="permalink", href=f"#{anchor}", title="Link to this place")
