"""Encodes conversations and titles as prompts of token ids, truncated to fit."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from lavic.data.schema import Conversation
from lavic.errors import ConfigError, DataError
from lavic.model import prompts
from lavic.model.inputs.label_mask import Example, masked_example
from lavic.model.prompts import Piece, Slot, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Encoder:
    """Turns pieces into token ids with a base model's tokenizer.

    Raises:
        ConfigError: The tokenizer adds anything but one beginning-of-sequence token to a text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_token_id: int,
        style: prompts.Style = "inst",
        chat: prompts.ChatFormat = prompts.MISTRAL,
    ) -> None:
        check_tokenizer(tokenizer)
        self.tokenizer = tokenizer
        self.style: prompts.Style = style
        self.chat = chat
        self.version = prompts.version_of(style, chat)
        """Version of the prompts and tags."""
        self.image_token_id = image_token_id
        self.image_token = str(tokenizer.convert_ids_to_tokens(image_token_id))
        end = chat.end if style == "inst" else None
        self.eos: int = tokenizer.eos_token_id if end is None else tokenizer.get_vocab()[end]
        """Ends an answer."""
        self.pad: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self._marks = sorted({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab(), *chat.marks})
        # The chat template may add a beginning-of-sequence token that the tokenizer does not.
        self._bos: int | None = tokenizer.bos_token_id
        in_template = style == "inst" and bool(tokenizer.bos_token) and chat.prefix.startswith(tokenizer.bos_token)
        self._bos_count = int(in_template or tokenizer("A").input_ids[:1] == [self._bos])

    def prompt(self, pieces: Sequence[Piece]) -> list[int]:
        """Token ids of a prompt, with the tokenizer's beginning-of-sequence token."""
        ids: list[int] = self.tokenizer(self.render(pieces)).input_ids
        if self._bos is not None:
            bos_first = self._bos_count == 0 or ids[0] == self._bos
            assert bos_first and ids.count(self._bos) == self._bos_count, "expected one BOS token, at the start"
        return ids

    def describe(self, title: str, photo_tokens: int, words: Sequence[str] | None = None) -> tuple[Piece, ...]:
        """The prompt for a description of one photo; see `prompts.describe`."""
        return prompts.describe(title, photo_tokens, self.style, self.chat, words)

    def render(self, pieces: Sequence[Piece]) -> str:
        """The prompt as one string; a slot is its image token, repeated."""
        parts = []
        for piece in pieces:
            if isinstance(piece, Slot):
                parts.append(self.image_token * piece.tokens)
            elif isinstance(piece, Text):
                parts.append(self.plain(piece.text))
            else:
                parts.append(piece)
        return "".join(parts)

    def plain(self, text: str) -> str:
        """Text from data with every special token broken up, so that a title with `<image>` adds no photo."""
        for mark in self._marks:
            if mark in text:
                text = text.replace(mark, f"{mark[0]} {mark[1:]}")
        return text

    def target(self, text: str) -> list[int]:
        """Token ids of the model's answer, with the end-of-sequence token."""
        return [*self.tokenizer(self.plain(text), add_special_tokens=False).input_ids, self.eos]

    def example(self, pieces: Sequence[Piece], target: str | None, *, max_length: int | None = None) -> Example:
        """A prompt and its target, which are tokenized separately, so that the label mask is exact.

        Raises:
            DataError: They are longer than `max_length` tokens.
        """
        prompt = self.prompt(pieces)
        answer = [] if target is None else self.target(target)
        if max_length is not None and len(prompt) + len(answer) > max_length:
            raise DataError(
                f"a prompt of {len(prompt)} tokens and a target of {len(answer)} do not fit into --max-length "
                f"{max_length}: raise it"
            )
        return masked_example(prompt, answer)

    def recommendation(
        self,
        conversation: Conversation,
        candidates: Sequence[prompts.Candidate],
        *,
        photo_tokens: int | Sequence[int],
        target: str | None = None,
        max_length: int,
        reserve: int = 0,
        none: bool = False,
    ) -> Example:
        """The prompt of a conversation and its candidate list.

        If it is longer than `max_length - reserve` tokens, the conversation is truncated: first its oldest comments are
        dropped, then the end of the request. Candidates and target are never truncated.

        Raises:
            DataError: The list and the target alone are too long; names the conversation.
        """
        limit = max_length - reserve

        def encode(turns: Sequence[tuple[str, str]]) -> Example:
            pieces = prompts.recommend(
                turns, candidates, photo_tokens=photo_tokens, style=self.style, chat=self.chat, none=none
            )
            return self.example(pieces, target)

        turns: list[tuple[str, str]] = [(turn.role, turn.text) for turn in conversation.turns]
        example = encode(turns)
        if len(example.input_ids) > limit:
            example, turns = self._drop_oldest(turns, example, encode, limit)
        while len(example.input_ids) > limit:
            if not turns:
                raise DataError(
                    f"{conversation.place}: {len(candidates)} candidates alone need {len(example.input_ids)} tokens, "
                    f"and a prompt has {max_length} at most (--max-length of `lavic tune`): show fewer candidates, or "
                    "tune with longer prompts"
                )
            turns = _cut_last(turns, lambda kept: len(encode(kept).input_ids) <= limit)
            example = encode(turns)
        return example

    def _drop_oldest(
        self,
        turns: list[tuple[str, str]],
        example: Example,
        encode: Callable[[Sequence[tuple[str, str]]], Example],
        limit: int,
    ) -> tuple[Example, list[tuple[str, str]]]:
        """Drops as few of the oldest comments as bring a prompt down to `limit` tokens, or all of them.

        The comments are tokenized once, which gives about the number to drop. Adjacent texts may share a token, so the
        exact number is found by encoding the prompt for numbers near it.
        """
        comments = [index for index, (role, _) in enumerate(turns) if role == "comment"]
        best = example, turns
        if not comments:
            return best
        texts = [self.render(prompts.turn(*turns[index], self.style)) for index in comments]
        sizes = (len(ids) for ids in self.tokenizer(texts, add_special_tokens=False).input_ids)
        total = [0, *accumulate(sizes)]
        known_too_few, known_enough = 0, len(comments) + 1
        count, length = 0, len(example.input_ids)
        while known_enough - known_too_few > 1:
            # The number that drops `length - limit` more tokens than `count` does, within the open interval.
            guess = bisect_left(total, total[count] + length - limit)
            count = min(max(guess, known_too_few + 1), known_enough - 1)
            dropped = set(comments[:count])
            remaining = [turn for index, turn in enumerate(turns) if index not in dropped]
            example = encode(remaining)
            length = len(example.input_ids)
            if length > limit and count < len(comments):
                known_too_few = count
            else:
                known_enough, best = count, (example, remaining)
        return best


def _cut_last(
    turns: Sequence[tuple[str, str]], fits: Callable[[Sequence[tuple[str, str]]], bool]
) -> list[tuple[str, str]]:
    """Turns with the longest beginning of the last one that fits, or without it.

    The length is found by bisection: a character may be several tokens (an emoji is four bytes to most tokenizers), so
    the tokens that are too many do not say how many characters to cut.
    """
    *earlier_turns, (role, text) = turns
    length = bisect_left(range(1, len(text) + 1), True, key=lambda end: not fits([*earlier_turns, (role, text[:end])]))
    return [*earlier_turns, (role, text[:length])] if length else earlier_turns


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Checks that a tokenizer adds one beginning-of-sequence token to a text and nothing else.

    `add_bos_token: false` in its settings means that the model was trained without one.

    Raises:
        ConfigError: It does not.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    name = tokenizer.name_or_path or "the base model"
    without = _trained_without_bos(tokenizer)
    if (bos is None and not without) or eos is None:
        missing = "end-of-sequence" if eos is None else "beginning-of-sequence"
        raise ConfigError(
            f"the tokenizer of {name} has no {missing} token: set {'eos' if eos is None else 'bos'}_token in its "
            "tokenizer_config.json to that of the model's training"
        )
    ids_without_bos = tokenizer("A", add_special_tokens=False).input_ids
    ids = tokenizer("A").input_ids
    if ids != [bos, *ids_without_bos] and not (without and ids == ids_without_bos):
        tokens = " ".join(tokenizer.convert_ids_to_tokens(ids))
        raise ConfigError(
            f"the tokenizer of {name} makes {tokens!r} of the text 'A': prompts need one {tokenizer.bos_token} before "
            "the text and nothing after it; correct add_bos_token and add_eos_token in its tokenizer_config.json, or "
            "the post_processor of its tokenizer.json"
        )


def _trained_without_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """`add_bos_token: false` in tokenizer_config.json, which transformers 5 ignores if there is a tokenizer.json."""
    if not tokenizer.name_or_path:
        return False
    try:
        settings = json.loads((Path(tokenizer.name_or_path) / "tokenizer_config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and settings.get("add_bos_token") is False
