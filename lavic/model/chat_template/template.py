"""Finds the chat template of a base model, which is part of the version of its prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavic.errors import ConfigError, first_line
from lavic.model.chat_template.probe import Probe
from lavic.model.config import ModelSettings
from lavic.model.prompts import MISTRAL, ChatFormat, version_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(model: ModelSettings, folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder.

    Raises:
        ConfigError: It cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, ImportError) as e:
        raise ConfigError(f"--model.name {model.name}: the tokenizer cannot be loaded ({first_line(e)})") from e
    return tokenizer


def prompt_version(model: ModelSettings, folder: Path) -> str:
    """Version of a model's prompts, which covers its chat template. Loads no weights.

    Raises:
        ConfigError: The model has no tokenizer, or no chat template that can be used.
    """
    if model.prompt == "lavic":
        return version_of(model.prompt)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    image = config.get("image_token_index", config.get("image_token_id"))
    return version_of(model.prompt, chat_format(model, folder, load_tokenizer(model, folder), image))


def chat_format(
    model: ModelSettings, folder: Path, tokenizer: PreTrainedTokenizerBase, image_token_id: int
) -> ChatFormat:
    """The tags around a model's prompts; the style `lavic` has none and needs no template.

    Raises:
        ConfigError: The template is missing or cannot be used.
    """
    if model.prompt == "lavic":
        return MISTRAL
    if model.chat_template is not None:
        source, template = f"--model.chat-template {model.chat_template}", _read_file(model.chat_template)
    else:
        source, template = f"--model.name {model.name}", _read_folder(folder, tokenizer) or ""
    if not template:
        raise ConfigError(
            f"{source}: it has no chat template (chat_template.jinja): give one with --model.chat-template FILE, or "
            "use plain-text prompts with --model.prompt lavic"
        )
    try:
        return Probe(template, tokenizer, str(tokenizer.convert_ids_to_tokens(image_token_id))).format()
    except ValueError as e:
        raise ConfigError(
            f"{source}: the chat template cannot be used ({e}): give another one with --model.chat-template FILE"
        ) from None


def _read_file(path: Path) -> str:
    """A template file: Jinja, or JSON with the key `chat_template`."""
    try:
        text = path.expanduser().read_text("utf-8")
        template = json.loads(text)["chat_template"] if path.suffix == ".json" else text
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ConfigError(f"--model.chat-template {path}: not a chat template ({first_line(e)})") from None
    return str(template)


def _read_folder(folder: Path, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The template of a model folder, by the precedence of transformers: the processor's, then the tokenizer's."""
    template: Any = None
    for name in ("processor_config.json", "chat_template.json"):
        if template is None and (folder / name).is_file():
            try:
                template = json.loads((folder / name).read_text("utf-8")).get("chat_template")
            except (ValueError, AttributeError) as e:
                raise ConfigError(f"{folder / name}: not a JSON object ({first_line(e)})") from None
    if template is None and (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text("utf-8")
    if template is None:
        template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else None
