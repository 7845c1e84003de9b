"""Base models on Hugging Face or in a folder: their files, configuration and fingerprint. Loads no weights."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.resources
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lavic.errors import ConfigError, first_line
from lavic.model.config import ModelSettings

SEVEN_B = "llava-hf/llava-v1.6-mistral-7b-hf"
"""The model of the LaViC paper."""

SEVEN_B_CONFIG: Mapping[str, Any] = {
    "model_type": "llava_next",
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    "image_token_index": 32000,
    "tie_word_embeddings": False,
    "text_config": {
        "model_type": "mistral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rope_theta": 1e6,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "vocab_size": 32064,
    },
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_channels": 3,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
    },
}
"""The configuration of `SEVEN_B`, so that a run can be planned before the model is downloaded."""

_TOKENIZER_FILES = ("tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json")
"""Files of a tokenizer without tokenizer.json."""
_FINGERPRINT_SAMPLE = 1 << 20
"""Bytes of the start and the end of each weight file: enough to distinguish models without reading 15 GB."""


def resolve(model: ModelSettings) -> Path:
    """The folder of a model: packaged, local, or downloaded into Hugging Face's cache."""
    if model.name == "mini":
        return Path(str(importlib.resources.files("lavic.mini") / "base"))
    folder = Path(model.name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"--model.name {model.name}: no model in this folder (no config.json)")
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
    try:
        return Path(snapshot_download(model.name, revision=model.revision, allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as e:
        raise ConfigError(
            f"--model.name {model.name}: no such folder, and cannot be downloaded from Hugging Face ({first_line(e)})"
        ) from e


def name_of(model: ModelSettings) -> str:
    """The name of a model in records: its Hugging Face name, or the absolute path of its folder."""
    folder = Path(model.name).expanduser()
    return str(folder.absolute()) if model.name != "mini" and folder.is_dir() else model.name


def read_config(model: ModelSettings) -> Mapping[str, Any]:
    """The config.json of a base model: from its folder, Hugging Face's cache, or `SEVEN_B_CONFIG`. Downloads nothing.

    Raises:
        ConfigError: It is missing, or not that of a LLaVA-NeXT.
    """
    file: Path | str | None = None
    if model.name == "mini" or Path(model.name).expanduser().is_dir():
        file = resolve(model) / "config.json"
    elif model.name == SEVEN_B:
        return SEVEN_B_CONFIG
    else:
        with contextlib.suppress(ModuleNotFoundError):  # then there is no cache either
            from huggingface_hub import try_to_load_from_cache

            cached = try_to_load_from_cache(model.name, "config.json", revision=model.revision)
            file = cached if isinstance(cached, str) else None
    if file is None:
        raise ConfigError(
            f"--model.name {model.name}: no such folder, and not in Hugging Face's cache; a dry run downloads nothing: "
            f"run `hf download {model.name} config.json` first"
        )
    try:
        config: dict[str, Any] = json.loads(Path(file).read_text("utf-8"))
    except (OSError, ValueError) as e:
        raise ConfigError(f"--model.name {model.name}: {e}") from e
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != "llava_next":
        raise ConfigError(f"--model.name {model.name}: a {kind} model; LaViC needs LLaVA-NeXT (llava_next)")
    return config


def fingerprint(folder: Path) -> str:
    """A digest of a model folder: its config, and size, header, first and last bytes of each weight file.

    Raises:
        ConfigError: It is not a model folder, its weights are pickled, or a weight file is truncated.
        OSError: A weight file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        for volatile in ("_name_or_path", "transformers_version"):
            config.pop(volatile, None)
    except (OSError, ValueError, AttributeError) as e:
        raise ConfigError(f"{folder}: not a Hugging Face model: no usable config.json ({first_line(e)})") from e
    digest.update(json.dumps(config, sort_keys=True).encode())
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{folder}: no .safetensors weights; convert the model first (pickled weights are not read)")
    for file in files:
        check_weights(file)
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(_FINGERPRINT_SAMPLE))
            stream.seek(max(0, size - _FINGERPRINT_SAMPLE))
            digest.update(stream.read())
    return digest.hexdigest()[:16]


def check_weights(file: Path) -> None:
    """Compares a .safetensors file's size with its header: 8 bytes of the header's length, JSON, then the tensors.

    Raises:
        ConfigError: It is truncated.
        OSError: It cannot be read.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = stream.read(length) if length <= size else b""
    try:
        tensors = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    except (ValueError, AttributeError, TypeError, KeyError, IndexError):
        raise ConfigError(f"{file}: not a .safetensors file, or truncated: copy or download it again") from None
    if 8 + length + end != size:
        raise ConfigError(f"{file}: {size:,} bytes, {8 + length + end:,} by its header: copy or download it again")


def tokenizer_digest(folder: Path) -> str:
    """A digest of a model folder's tokenizer, which is not part of the fingerprint.

    Raises:
        ConfigError: It has no tokenizer.
    """
    names = ("tokenizer.json",) if (folder / "tokenizer.json").is_file() else _TOKENIZER_FILES
    files = [folder / name for name in names if (folder / name).is_file()]
    if not files:
        raise ConfigError(f"{folder}: no tokenizer (no tokenizer.json or tokenizer.model)")
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}:{file.stat().st_size}:".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
