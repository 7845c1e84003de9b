"""What a user asks for: a conversation from a file, standard input or the command line, and the items to rank."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lavic.data.conversations import parse_conversations
from lavic.data.schema import Conversation, turns_of
from lavic.errors import ConfigError, DataError
from lavic.storage.json_text import BadJson, parse_json
from lavic.storage.text_files import TextFileError, read_text, text_of

NAME_THEM = "name the items to choose from: --candidates ID ..., or --candidates-file FILE"

_ROW = re.compile(r'[\s\[]*\{\s*"(context|context_items|gt|gt_items|candidates\w*)"\s*:')
"""How a row of the released form begins, also one that breaks off."""
_TEXT_SUFFIXES = (".txt", ".json", ".jsonl", ".gz", ".md", ".csv", ".tsv")


def read_candidates(words: Sequence[str], file: Path | None) -> tuple[str, ...]:
    """The item ids of `--candidates` or of `--candidates-file`; none where neither is given.

    Raises:
        ConfigError: Both are given, or the words hold no id.
        DataError: The file cannot be read, or holds no id.
    """
    ids = tuple(part for word in words for part in re.split(r"[,\s]+", word) if part)
    if file is None:
        if words and not ids:
            raise ConfigError("--candidates: no item id in it")
        return ids
    if ids:
        raise ConfigError("--candidates and --candidates-file: give one of them")
    try:
        text = read_text(file)
    except TextFileError as error:
        raise DataError(f"--candidates-file {error}") from None
    named = tuple(line.strip() for line in text.split("\n") if line.strip())
    if not named:
        raise DataError(f"--candidates-file {file}: no item id in it; one per line is expected")
    return named


def read_conversation(source: str, named: tuple[str, ...], key: str) -> list[Conversation]:
    """The conversations of a file, of standard input or of words, each with the list to rank under `key`.

    Args:
        source: What `--conversation` says.
        named: Item ids that every conversation is ranked with; none: its own list.
        key: Of the list.

    Raises:
        ConfigError: A text comes without candidates.
        DataError: The file cannot be read, is empty, or holds rows that are no conversations.
    """
    name, text = _text_of(source)
    if not text.strip():
        raise DataError(f"{name}: empty; say what is looked for")
    if _is_json(name, text):
        rows = parse_conversations(text, name=name, candidates=None if named else key)
        return [replace(row, candidates={key: named}) if named else row for row in rows]
    if not named:
        raise ConfigError(NAME_THEM)
    return [Conversation(id=Path(name).stem, turns=turns_of(text), candidates={key: named}, file=name)]


def _text_of(source: str) -> tuple[str, str]:
    """What `--conversation` names: how messages call it, and its text."""
    if source == "-":
        data = sys.stdin.buffer.read()
        try:
            return "standard input", text_of(data, "standard input")
        except TextFileError:
            # Typed or piped text, perhaps of another encoding: what is not UTF-8 is replaced, the rest is ranked.
            text = data.decode("utf-8", "replace").replace("\0", "\ufffd")
            print("standard input: not UTF-8; characters that cannot be read were replaced", file=sys.stderr)
            return "standard input", text
    try:
        if source.strip() and (Path(source).exists() or _looks_like_a_path(source)):
            return source, read_text(source)
    except (OSError, ValueError):  # too long for a path, or a NUL in it
        pass
    return "--conversation", source.encode("utf-8", "replace").decode()


def _looks_like_a_path(source: str) -> bool:
    """Whether words that name no file were meant to name one: then that it is missing must be said."""
    path = Path(source)
    if (
        path.is_absolute()
        or path.parts[:1] == ("..",)
        or path.suffix in _TEXT_SUFFIXES
        or source.startswith(("./", "~"))
    ):
        return True
    return not any(character.isspace() for character in source) and ("/" in source or "." in source)


def _is_json(name: str, text: str) -> bool:
    """Whether a text holds rows of JSON. Prose may begin with a bracket too; a .jsonl file is never prose."""
    if Path(name.removesuffix(".gz")).suffix in (".json", ".jsonl") or _ROW.match(text):
        return True
    text = text.strip()
    return text.startswith(("{", "[")) and any(map(_is_value, (text.partition("\n")[0], text)))


def _is_value(text: str) -> bool:
    try:
        return isinstance(parse_json(text), (dict, list))
    except BadJson:
        return False
