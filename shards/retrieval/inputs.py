"""The conversation files of `lavic retrieve`, and where each is written with its lists."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lavic.data.catalog import find_files
from lavic.data.conversations import parse_conversations, set_names
from lavic.data.schema import Conversation
from lavic.data.sources.json_records import json_records
from lavic.errors import ConfigError
from lavic.shards.retrieval.settings import RetrieveSettings
from lavic.storage.paths import as_path, is_remote
from lavic.storage.text_files import TextFile, decode_text, open_bytes
from lavic.tracking.journal import JOURNAL_FILE


@dataclass(frozen=True, kw_only=True)
class Input:
    """A conversation file."""

    name: str
    path: str
    """A path, or a URI."""
    sha256: str
    out: Path
    """Where it is written with the lists."""
    conversations: list[Conversation]
    rows: list[dict[str, Any]]
    """As they are in the file."""


def read_inputs(chosen: RetrieveSettings) -> list[Input]:
    """The conversation files, and where each is written.

    Raises:
        ConfigError: OUT cannot take them.
        DataError: A file cannot be read.
    """
    paths = chosen.conversations
    if not paths:
        raise ConfigError("--conversations: name at least one file")
    if chosen.out.suffix in (".json", ".gz", ".zst") and not chosen.out.is_dir():
        raise ConfigError(f"--out {chosen.out}: a file of lists ends in .jsonl; for a folder use another name")
    if chosen.is_file and len(paths) > 1:
        raise ConfigError(f"--out {chosen.out}: a file holds one conversation file, not {len(paths)}: name a folder")
    names = set_names(paths)
    outputs = [chosen.out] if chosen.is_file else [chosen.out / f"{name}.jsonl" for name in names]
    if len(set(outputs)) < len(outputs):
        raise ConfigError(
            "--conversations: two files have the same name, and their folders too: give each its own --out"
        )
    _check_outputs(chosen, outputs)
    inputs = []
    for name, path, out in zip(names, paths, outputs, strict=True):
        with open_bytes(path) as file:
            data = file.read()
        text = decode_text(data, path)
        inputs.append(
            Input(
                name=name,
                path=path,
                sha256=hashlib.sha256(data).hexdigest(),
                out=out,
                conversations=parse_conversations(text, name=path),
                rows=_rows(text, path),
            )
        )
    return inputs


def _check_outputs(chosen: RetrieveSettings, outputs: Sequence[Path]) -> None:
    """Refuses to write over an input, or over a file that the command keeps in OUT.

    Raises:
        ConfigError: One line.
    """
    sources = [as_path(path) for path in (*chosen.conversations, *find_files(chosen.items))]
    present = [path for path in sources if not is_remote(path) and path.exists()]
    if chosen.folder.resolve() == chosen.index.resolve():
        raise ConfigError(f"--index {chosen.index}: the lists are written there too: use a folder of its own")
    for out in outputs:
        if out.exists() and any(out.samefile(path) for path in present):
            raise ConfigError(f"--out {out}: is an input too: use another one")
        if out.parent == chosen.folder and out.name == JOURNAL_FILE:
            raise ConfigError(f"--out {out}: the command's own journal has this name: rename the conversation file")


def _rows(text: str, path: str) -> list[dict[str, Any]]:
    """The rows as they are in the file; `parse_conversations` has checked them."""
    file, is_json = TextFile(io.BytesIO(text.encode()), path), Path(path).suffix == ".json"
    return [record.value for record in json_records(path, file, None, is_json=is_json, keyed=False)]
