"""Conversations in the LaViC format, that of the released data: jsonl, or a JSON list."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lavic.data.schema import Conversation, conversation_from_row
from lavic.data.sources.json_records import json_records
from lavic.data.sources.record import Record
from lavic.errors import DataError
from lavic.storage.compression import unpacked_name
from lavic.storage.json_text import json_type
from lavic.storage.text_files import TextFile, read_text


def read_conversations(
    path: str | Path, *, candidates: str | None = None, top: int | None = None
) -> list[Conversation]:
    """Reads all conversations of a file, in order.

    Args:
        path: A file of rows with `context`, `context_items`, `gt_items` and any number of `candidates_*` lists.
        candidates: A candidate list that every conversation must have, such as `candidates_st`; None requires none.
        top: Truncates that list to its first `top` distinct items.

    Raises:
        DataError: The file is missing or empty, a row is not a conversation, or the named list is not in it.
    """
    if not Path(path).is_file():
        raise DataError(f"{path}: no such conversation file")
    conversations = parse_conversations(read_text(path), name=str(path), candidates=candidates)
    if candidates is None or top is None:
        return conversations
    return [_shortened(conversation, candidates, top) for conversation in conversations]


def parse_conversations(text: str, *, name: str, candidates: str | None = None) -> list[Conversation]:
    """Conversations from the content of a file, or of standard input; otherwise as `read_conversations`.

    The name of the source is for messages and the conversations' ids.
    """
    file = TextFile(io.BytesIO(text.encode()), name)
    records = json_records(name, file, None, is_json=Path(name).suffix == ".json", keyed=False)
    conversations = [_conversation(record, index) for index, record in enumerate(records)]
    if not conversations:
        raise DataError(f"{name}: contains no conversations")
    for conversation in conversations:
        if candidates is not None and candidates not in conversation.candidates:
            present = ", ".join(conversation.candidates) or "none"
            raise DataError(f"{conversation.place}: no candidate list `{candidates}`; it has: {present}")
    return conversations


def file_stem(path: str | Path) -> str:
    """A file's name without its ending and that of its compression: `test` for `data/test.jsonl.gz`."""
    return Path(unpacked_name(path)).stem


def set_names(paths: Sequence[str | Path]) -> list[str]:
    """Names of conversation files, for output files.

    A file's name up to its first dot: `test` for `data/test.jsonl.gz`; if several files share it, with the folder:
    `home-test` for `home/test.jsonl`.
    """
    stems = [Path(path).name.partition(".")[0] or Path(path).name for path in paths]
    return [
        f"{Path(path).absolute().parent.name}-{stem}" if stems.count(stem) > 1 else stem
        for path, stem in zip(paths, stems, strict=True)
    ]


def _shortened(conversation: Conversation, key: str, top: int) -> Conversation:
    """A conversation with a truncated candidate list, which may lose its target."""
    first = tuple(dict.fromkeys(conversation.candidates[key]))[:top]
    return replace(conversation, candidates={**conversation.candidates, key: first})


def _conversation(record: Record, index: int) -> Conversation:
    row, file, line = record.value, record.file, record.line
    if not isinstance(row, dict):
        raise DataError(f"{file}:{line}: {json_type(row)} where an object with one conversation was expected")
    try:
        return conversation_from_row(row, id=f"{file_stem(file)}-{index}", index=index, file=file, line=line)
    except ValueError as error:
        raise DataError(f"{file}:{line}: {error}") from None
