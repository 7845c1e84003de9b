"""Finds the tags of a chat template by rendering it for a probe text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lavic.errors import first_line
from lavic.model.prompts import ChatFormat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WORDS, ANSWER = "lavic-probe-words", "lavic-probe-answer"
"""Rendered instead of a prompt's text and of the answer; no template contains them."""


class Probe:
    """Renders a template for a probe text."""

    def __init__(self, template: str, tokenizer: PreTrainedTokenizerBase, image: str) -> None:
        self.template, self.tokenizer, self.image = template, tokenizer, image
        self.parts = True
        """Whether a message's content is a list of parts, or text with the image token."""

    def format(self) -> ChatFormat:
        """The tags around text, and around a photo that is followed by text.

        Raises:
            ValueError: The template omits, repeats or changes its input.
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
            raise ValueError("it ends a message with a photo differently from one without")
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
        except Exception as e:  # a template is a program and may raise anything
            raise ValueError(first_line(e)) from None
        return str(rendered)

    def _cut(self, rendered: str, *, photo: bool) -> tuple[str, str, str]:
        """The tags before the photo, between photo and text, and after the text."""
        if rendered.count(WORDS) != 1 or rendered.count(self.image) != photo:
            raise ValueError("it does not contain a message's photo and text exactly once")
        head, suffix = rendered.split(WORDS)
        if not photo:
            return head, "", suffix
        if self.image not in head:
            raise ValueError("it puts a photo after its text")
        prefix, between = head.split(self.image)
        return prefix, between, suffix

    def _once(self, prefix: str) -> str:
        """Removes the beginning-of-sequence token if the tokenizer adds it too."""
        bos = self.tokenizer.bos_token
        if bos and self.tokenizer("A").input_ids[:1] == [self.tokenizer.bos_token_id]:
            return prefix.removeprefix(str(bos))
        return prefix

    def _end(self) -> str | None:
        """The token that the template puts after an answer, if it is not the end-of-sequence token."""
        try:
            after = self._render(photo=False, answered=True).partition(ANSWER)[2].lstrip()
        except ValueError:
            return None
        tokens = {*self.tokenizer.all_special_tokens, *self.tokenizer.get_added_vocab()} - {self.image}
        end = max((token for token in tokens if after.startswith(token)), key=len, default=None)
        return None if end == self.tokenizer.eos_token else end
