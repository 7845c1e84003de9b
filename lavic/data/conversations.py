"""Conversations in the released jsonl form, one per line."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lavic.data.records import Conversation, conversation_from_row
from lavic.errors import DataError
from lavic.storage.json_text import BadJson, json_type, parse_json
from lavic.storage.text_files import read_lines


def read_conversations(path: str | Path, *, candidates: str | None = None) -> list[Conversation]:
    """Read a conversation file whole, in its order.

    Args:
        path: A jsonl file with `context`, `context_items`, `gt_items` and any number of `candidates_*` lists.
        candidates: A candidate list that every conversation must have, as `candidates_st`; None asks for none.

    Raises:
        DataError: The file is missing or empty, a line is not a conversation, or the named list is not in it.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such conversation file")
    lines = (text for _, text in read_lines(path))
    return parse_conversations(lines, file=str(path), candidates=candidates)


def parse_conversations(lines: Iterable[str], *, file: str, candidates: str | None = None) -> list[Conversation]:
    """Conversations from lines of JSON, such as those of standard input.

    Args:
        lines: One conversation each; blank ones are passed over.
        file: What messages and the conversations call their source.
        candidates: As for `read_conversations`.

    Raises:
        DataError: As `read_conversations`.
    """
    conversations: list[Conversation] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            conversations.append(_parse(line, number, len(conversations), file))
    if not conversations:
        raise DataError(f"{file}: no conversation in it")
    for conversation in conversations:
        if candidates is not None and candidates not in conversation.candidates:
            present = ", ".join(conversation.candidates) or "none"
            raise DataError(f"{conversation.place}: no candidate list `{candidates}`; it has: {present}")
    return conversations


def _parse(line: str, number: int, index: int, file: str) -> Conversation:
    place = f"{file}:{number}"
    try:
        row = parse_json(line)
    except BadJson as error:
        raise DataError(f"{place}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise DataError(f"{place}: {json_type(row)} where an object with one conversation was expected")
    try:
        return conversation_from_row(row, id=f"{Path(file).stem}-{index}", index=index, file=file, line=number)
    except ValueError as error:
        raise DataError(f"{place}: {error}") from None
