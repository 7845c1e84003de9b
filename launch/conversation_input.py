"""Reads a conversation from a file, standard input or the command line, and the candidates to rank."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lavic.data.conversations import parse_conversations
from lavic.data.schema import TAG, Conversation
from lavic.errors import ConfigError, DataError
from lavic.recommend.conversation_forms import to_conversation
from lavic.storage.compression import unpacked_name
from lavic.storage.json_text import BadJson, parse_json
from lavic.storage.text_files import TextFileError, decode_text, read_text

NO_CANDIDATES = (
    "give the items to rank: --candidates ID ..., or --candidates-file FILE; or search the whole catalogue: --index DIR"
)

_ROW = re.compile(r'[\s\[]*\{\s*"(context|context_items|gt|gt_items|candidates\w*)"\s*:')
"""The start of a row in the LaViC format, complete or not."""
_TEXT_SUFFIXES = (".txt", ".json", ".jsonl", ".gz", ".md", ".csv", ".tsv")


def read_candidates(texts: Sequence[str], file: Path | None) -> tuple[str, ...]:
    """The item ids of `--candidates` or `--candidates-file`; empty if neither is given.

    Raises:
        ConfigError: Both are given, or `texts` has no id.
        DataError: The file cannot be read, or has no id.
    """
    ids = tuple(part for text in texts for part in _split_ids(text))
    if file is None:
        if texts and not ids:
            raise ConfigError("--candidates: no item id in it")
        return ids
    if ids:
        raise ConfigError("--candidates and --candidates-file: give one of them")
    try:
        text = read_text(file)
    except TextFileError as error:
        raise DataError(f"--candidates-file {error}") from None
    ids = tuple(_split_ids(text))
    if not ids:
        raise DataError(f"--candidates-file {file}: no item id in it; one per line, or separated by commas")
    return ids


def _split_ids(text: str) -> list[str]:
    """Item ids separated by commas, blanks or line ends."""
    return [part for part in re.split(r"[,\s]+", text) if part]


def read_conversation(
    source: str, ids: tuple[str, ...], key: str, *, candidates_needed: bool = True
) -> list[Conversation]:
    """The conversations of a file, of standard input or of a text, each with its candidate list under `key`.

    `ids` are the candidates of every conversation; without them each has its own list, if `candidates_needed`.

    Raises:
        ConfigError: A text has no candidates.
        DataError: The file cannot be read, is empty, has rows that are not conversations, or no words of a seeker.
    """
    name, text = _text_of(source)
    if not text.strip():
        raise DataError(f"{name}: empty; write what you are looking for")
    if _is_json(name, text):
        rows = parse_conversations(text, name=name, candidates=key if candidates_needed and not ids else None)
        return [replace(row, candidates={key: ids}) if ids else row for row in rows]
    if candidates_needed and not ids:
        raise ConfigError(NO_CANDIDATES)
    conversation = to_conversation(text, name)
    return [replace(conversation, id=Path(name).stem.removeprefix("--"), candidates={key: ids})]


def _text_of(source: str) -> tuple[str, str]:
    """The text that `--conversation` gives, and the name of its source in messages."""
    if source == "-":
        data = sys.stdin.buffer.read()
        try:
            return "standard input", decode_text(data, "standard input")
        except TextFileError:
            text = data.decode("utf-8", "replace").replace("\0", "\ufffd")
            print("standard input: not UTF-8; invalid characters were replaced", file=sys.stderr)
            return "standard input", text
    try:
        if source.strip() and (Path(source).exists() or _is_path(source)):
            return source, read_text(source)
    except (OSError, ValueError):  # too long for a path, or with a NUL
        pass
    return "--conversation", source.encode("utf-8", "replace").decode()


def _is_path(source: str) -> bool:
    """Whether a text is meant as the path of a file, which must then exist."""
    if TAG.search(source):
        return False
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
    """Whether a text is rows of JSON. Plain text may start with a bracket too; a .jsonl file is never plain text."""
    if Path(unpacked_name(name)).suffix in (".json", ".jsonl") or _ROW.match(text):
        return True
    text = text.strip()
    return text.startswith(("{", "[")) and any(map(_is_value, (text.partition("\n")[0], text)))


def _is_value(text: str) -> bool:
    try:
        return isinstance(parse_json(text), (dict, list))
    except BadJson:
        return False
