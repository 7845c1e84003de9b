"""Texts to vectors by a sentence-transformers model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import PositiveInt

from lavic.config import settings
from lavic.errors import ConfigError, LaunchError, first_line
from lavic.recommend.retrieval.query import shorten

_QUERY_ROWS = 32
_FILES = (
    *("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "tokenizer_config.json"),
    *("tokenizer.json", "tokenizer.model", "sentencepiece.bpe.model", "vocab.txt", "vocab.json", "merges.txt"),
)
"""What vectors depend on besides config and weights: the tokenizer, the longest text, the prompts."""


@settings
class DenseSettings:
    """Search by meaning."""

    model: str = "sentence-transformers/all-MiniLM-L6-v2"
    """A sentence-transformers model: a folder, or a name on Hugging Face."""
    max_tokens: PositiveInt | None = None
    """Maximum length of a text, tokens; by default the model's own limit. An item's text is cut at its end; a query
    keeps its last turn, then its first."""
    batch_size: PositiveInt = 64
    """Texts of one forward pass."""


def dense_settings(chosen: DenseSettings) -> dict[str, Any]:
    """What the vectors depend on, as an index records it.

    Raises:
        ConfigError: There is no such model.
    """
    folder = _folder(chosen.model)
    name = str(folder.absolute()) if Path(chosen.model).expanduser().is_dir() else chosen.model
    return {"model": name, **_digests(folder), "max_tokens": chosen.max_tokens}


class SentenceEncoder:
    """A model, loaded.

    Args:
        recorded: By `dense_settings`.
        device: Of torch; by default a GPU where there is one.
        batch_size: Texts of one forward pass.

    Raises:
        ConfigError: The model is not there, or is not the one that the index was made with.
        LaunchError: sentence-transformers is not installed.
    """

    def __init__(self, recorded: Mapping[str, Any], *, device: str | None = None, batch_size: int = 64) -> None:
        folder = _folder(recorded["model"])
        for name, digest in _digests(folder).items():
            if digest != recorded[name]:
                raise ConfigError(
                    f"{recorded['model']}: the index was made with another version of this model ({name} "
                    f"{recorded[name]}, now {digest}): put that one back, or make another index with this one"
                )
        try:
            from sentence_transformers import SentenceTransformer
            from transformers.utils.logging import disable_progress_bar
        except ImportError as error:
            raise LaunchError(f"searching by meaning needs pip install 'lavic[retrieve]' ({error})") from None
        disable_progress_bar()
        self._model: Any = SentenceTransformer(str(folder), device=device, local_files_only=True)
        self._model.eval()
        if recorded["max_tokens"]:
            self._model.max_seq_length = recorded["max_tokens"]
        self._tokenizer: Any = self._model.tokenizer
        self._batch_size = batch_size
        self._limit = int(self._model.max_seq_length or 1 << 30)

    def documents(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of items' texts: float32 [n, d]."""
        return self._encode(self._model.encode_document, list(texts), self._batch_size)

    def queries(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of queries (see `query_text`), of which each keeps its last turn: float32 [n, d]."""
        prompt = len(self._tokenizer.encode(str((self._model.prompts or {}).get("query") or "")))
        shortened = [shorten(text, self._limit - prompt, self._cut) for text in texts]
        return self._encode(self._model.encode_query, shortened, _QUERY_ROWS)

    def _encode(self, encode: Any, texts: list[str], batch_size: int) -> np.ndarray:
        vectors = encode(texts, batch_size=batch_size, convert_to_numpy=True, show_progress_bar=False)
        return np.asarray(vectors, np.float32)

    def _cut(self, text: str, limit: int, middle: bool) -> tuple[str, int]:
        """See `shorten`. A token is cut out by its place in the text, so what is left is the text as it was written."""
        offsets = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
            "offset_mapping"
        ]
        if len(offsets) <= limit:
            return text, len(offsets) + 1
        head = limit // 2 if middle else limit
        tail = limit - head
        cut_text = text[: offsets[head - 1][1]] if head else ""
        if tail:
            cut_text = f"{cut_text} {text[offsets[len(offsets) - tail][0] :]}"
        return cut_text.strip(), limit


def _digests(folder: Path) -> dict[str, str]:
    """Digests that identify a model: of config and weights, and of everything else that vectors depend on.

    Raises:
        ConfigError: The model's list of modules is damaged.
    """
    from lavic.model.hub import fingerprint

    digest = hashlib.sha256()
    modules = folder / "modules.json"
    try:
        parts = [part["path"] for part in json.loads(modules.read_bytes())] if modules.is_file() else []
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{modules}: damaged ({first_line(error)}): copy the model again") from None
    inner = [path for part in parts if part for path in sorted((folder / part).rglob("*"))]
    for path in [*(folder / name for name in _FILES), *inner]:
        if path.is_file():
            digest.update(f"{path.relative_to(folder)}:{path.stat().st_size}:".encode() + path.read_bytes())
    return {"fingerprint": fingerprint(folder), "modules": digest.hexdigest()[:16]}


def _folder(model: str) -> Path:
    from lavic.model.config import ModelSettings
    from lavic.model.hub import resolve

    try:
        return resolve(ModelSettings(name=model))
    except ConfigError as error:
        raise ConfigError(first_line(error).replace("--model.name", "--dense.model")) from None
