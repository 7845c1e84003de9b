"""A base model's chat template: where it stands, and what it puts around a prompt.

The template (Jinja) is rendered a few times for probe words, which shows the tags around a photo and around words; a
prompt is then made of these (`lavic.model.prompts`). So it equals what `apply_chat_template` of transformers makes of
the same message, and words from data never pass through the template.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavic.errors import ConfigError, first_line
from lavic.model.config import ModelSettings
from lavic.model.prompts import MISTRAL, ChatFormat, version_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WORDS, ANSWER = "lavic-probe-words", "lavic-probe-answer"
"""Rendered in the place of a prompt's words and of the answer; no template holds them."""


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
    """Version of the prompts that a model is asked with, which covers its chat template; no weights are loaded.

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
    """The tags that a model's prompts stand in.

    Args:
        model: Its settings; the style `lavic` has no tags and needs no template.
        folder: Of the model.
        tokenizer: Of the model.
        image_token_id: Of its image token.

    Raises:
        ConfigError: There is no template, or it cannot be used.
    """
    if model.prompt == "lavic":
        return MISTRAL
    if model.chat_template is not None:
        source, template = f"--model.chat-template {model.chat_template}", _read_file(model.chat_template)
    else:
        source, template = f"--model.name {model.name}", _read_folder(folder, tokenizer)
        if template is None:
            raise ConfigError(
                f"{source}: it has no chat template (chat_template.jinja): give one with --model.chat-template FILE, "
                "or ask in plain text with --model.prompt lavic"
            )
    try:
        return _Probe(template, tokenizer, str(tokenizer.convert_ids_to_tokens(image_token_id))).format()
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
    """The template of a model folder, in the order in which transformers looks: the processor's, the tokenizer's."""
    found: Any = None
    for name in ("processor_config.json", "chat_template.json"):
        if found is None and (folder / name).is_file():
            try:
                found = json.loads((folder / name).read_text("utf-8")).get("chat_template")
            except (ValueError, AttributeError) as e:
                raise ConfigError(f"{folder / name}: not a JSON object ({first_line(e)})") from None
    if found is None and (folder / "chat_template.jinja").is_file():
        found = (folder / "chat_template.jinja").read_text("utf-8")
    if found is None:
        found = tokenizer.chat_template
    if isinstance(found, dict):
        found = found.get("default")
    return found if isinstance(found, str) else None


class _Probe:
    """Renders a template for probe words."""

    def __init__(self, template: str, tokenizer: PreTrainedTokenizerBase, image: str) -> None:
        self.template, self.tokenizer, self.image = template, tokenizer, image
        self.parts = True
        """Whether a message's content is a list of parts, or text in which the image token stands."""

    def format(self) -> ChatFormat:
        """What stands around words, and around a photo with words behind it.

        Raises:
            ValueError: The template drops, repeats or changes what it is given; says which.
        """
        try:
            prefix, between, suffix = self._cut(self._render(photo=True), photo=True)
        except ValueError as reason:
            self.parts = False
            try:
                prefix, between, suffix = self._cut(self._render(photo=True), photo=True)
            except ValueError:
                raise reason from None
        words_prefix, _, words_suffix = self._cut(self._render(photo=False), photo=False)
        if words_suffix != suffix:
            raise ValueError("it ends a message with a photo otherwise than one without")
        return ChatFormat(
            photo_prefix=self._once(prefix),
            photo_suffix=between,
            prefix=self._once(words_prefix),
            suffix=suffix,
            end=self._end(),
        )

    def _content(self, text: str, photo: bool) -> Any:
        if self.parts:
            return [*([{"type": "image"}] if photo else []), {"type": "text", "text": text}]
        return f"{self.image}\n{text}" if photo else text

    def _render(self, *, photo: bool, answered: bool = False) -> str:
        messages = [{"role": "user", "content": self._content(WORDS, photo)}]
        if answered:
            messages.append({"role": "assistant", "content": self._content(ANSWER, False)})
        try:
            rendered: Any = self.tokenizer.apply_chat_template(
                messages, chat_template=self.template, tokenize=False, add_generation_prompt=not answered
            )
        except Exception as e:  # a template is a program of somebody else's: it may raise anything
            raise ValueError(first_line(e)) from None
        return str(rendered)

    def _cut(self, rendered: str, *, photo: bool) -> tuple[str, str, str]:
        """What stands before the photo, between it and the words, and behind them."""
        if rendered.count(WORDS) != 1 or rendered.count(self.image) != photo:
            raise ValueError("it does not show a message's photo and words once each")
        head, suffix = rendered.split(WORDS)
        if not photo:
            return head, "", suffix
        if self.image not in head:
            raise ValueError("it shows a photo behind its words")
        prefix, between = head.split(self.image)
        return prefix, between, suffix

    def _once(self, prefix: str) -> str:
        """Without the beginning-of-sequence token, where the tokenizer puts one as well."""
        bos = self.tokenizer.bos_token
        if bos and self.tokenizer("A").input_ids[:1] == [self.tokenizer.bos_token_id]:
            return prefix.removeprefix(str(bos))
        return prefix

    def _end(self) -> str | None:
        """The token that the template puts behind an answer, where it is not the end-of-sequence token."""
        try:
            behind = self._render(photo=False, answered=True).partition(ANSWER)[2].lstrip()
        except ValueError:
            return None
        tokens = {*self.tokenizer.all_special_tokens, *self.tokenizer.get_added_vocab()} - {self.image}
        end = max((token for token in tokens if behind.startswith(token)), key=len, default=None)
        return None if end == self.tokenizer.eos_token else end
