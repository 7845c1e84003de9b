"""From conversations and titles to prompts as token ids, shortened to fit."""

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
    """Turns pieces into token ids with one base model's tokenizer."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_token_id: int,
        style: prompts.Style = "inst",
        chat: prompts.ChatFormat = prompts.MISTRAL,
    ) -> None:
        """Takes over a tokenizer.

        Args:
            tokenizer: Of the base model.
            image_token_id: Of its image token.
            style: How the model is asked.
            chat: Tags of the base model's chat template.

        Raises:
            ConfigError: The tokenizer does not put one beginning-of-sequence token, and nothing else, around a text.
        """
        check_tokenizer(tokenizer)
        self.tokenizer = tokenizer
        self.style: prompts.Style = style
        self.chat = chat
        self.version = prompts.version_of(style, chat)
        """Of words and tags."""
        self.image_token_id = image_token_id
        self.image_token = str(tokenizer.convert_ids_to_tokens(image_token_id))
        end = chat.end if style == "inst" else None
        self.eos: int = tokenizer.eos_token_id if end is None else tokenizer.get_vocab()[end]
        """Ends an answer."""
        self.pad: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self._marks = sorted({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab(), *chat.marks})
        # Where the tokenizer puts none, the chat template may still write one.
        self._bos: int | None = tokenizer.bos_token_id
        begins = style == "inst" and bool(tokenizer.bos_token) and chat.prefix.startswith(tokenizer.bos_token)
        self._bos_count = int(begins or tokenizer("A").input_ids[:1] == [self._bos])

    def prompt(self, pieces: Sequence[Piece]) -> list[int]:
        """Token ids of a prompt, with the tokenizer's beginning-of-sequence token."""
        ids: list[int] = self.tokenizer(self.render(pieces)).input_ids
        if self._bos is not None:
            begins = self._bos_count == 0 or ids[0] == self._bos
            assert begins and ids.count(self._bos) == self._bos_count, "one beginning-of-sequence token, at the start"
        return ids

    def describe(self, title: str, photo_tokens: int, words: Sequence[str] | None = None) -> tuple[Piece, ...]:
        """Asks for a description of one photo; see `prompts.describe`."""
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
        """Words from data with every mark of the tokenizer broken: a title that says `<image>` adds no photo."""
        for mark in self._marks:
            if mark in text:
                text = text.replace(mark, f"{mark[0]} {mark[1:]}")
        return text

    def target(self, text: str) -> list[int]:
        """Token ids of what the model is to say, with the end-of-sequence token."""
        return [*self.tokenizer(self.plain(text), add_special_tokens=False).input_ids, self.eos]

    def example(self, pieces: Sequence[Piece], target: str | None, *, max_length: int | None = None) -> Example:
        """A prompt and its target. Prompt and target are tokenised apart, so that the label mask is exact.

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
        """The prompt of one conversation and its list.

        When it is longer than `max_length - reserve` tokens, the conversation is shortened: first its oldest
        comments are left out, then the request is cut at its end. Candidates and target stay whole.

        Raises:
            DataError: The list and the target alone are too long; names the conversation.
        """
        room = max_length - reserve

        def encode(turns: Sequence[tuple[str, str]]) -> Example:
            pieces = prompts.recommend(
                turns, candidates, photo_tokens=photo_tokens, style=self.style, chat=self.chat, none=none
            )
            return self.example(pieces, target)

        turns: list[tuple[str, str]] = [(turn.role, turn.text) for turn in conversation.turns]
        example = encode(turns)
        if len(example.input_ids) > room:
            example, turns = self._without_oldest(turns, example, encode, room)
        while (excess := len(example.input_ids) - room) > 0:
            if not turns:
                raise DataError(
                    f"{conversation.place}: {len(candidates)} candidates alone need "
                    f"{len(example.input_ids)} tokens, --max-length is {max_length}: raise it or show fewer candidates"
                )
            role, text = turns.pop()
            if text:
                # A token is rarely shorter than one character: to cut `excess` of them never cuts too much at once.
                turns.append((role, text[: max(0, len(text) - excess)]))
            example = encode(turns)
        return example

    def _without_oldest(
        self,
        turns: list[tuple[str, str]],
        example: Example,
        encode: Callable[[Sequence[tuple[str, str]]], Example],
        room: int,
    ) -> tuple[Example, list[tuple[str, str]]]:
        """Leaves out as few of the oldest comments as bring a prompt down to `room` tokens, or all of them.

        The comments are tokenised once, which tells nearly how many to leave out. Texts that meet may share a token,
        so the prompt is made again for that number and a few near it.
        """
        comments = [place for place, (role, _) in enumerate(turns) if role == "comment"]
        best = example, turns
        if not comments:
            return best
        texts = [self.render(prompts.turn(*turns[place], self.style)) for place in comments]
        sizes = (len(ids) for ids in self.tokenizer(texts, add_special_tokens=False).input_ids)
        total = [0, *accumulate(sizes)]
        too_few, enough = 0, len(comments) + 1
        count, length = 0, len(example.input_ids)
        while enough - too_few > 1:
            # The number that leaves `length - room` tokens fewer than `count` does, inside what is still open.
            guess = bisect_left(total, total[count] + length - room)
            count = min(max(guess, too_few + 1), enough - 1)
            dropped = set(comments[:count])
            kept = [turn for place, turn in enumerate(turns) if place not in dropped]
            example = encode(kept)
            length = len(example.input_ids)
            if length > room and count < len(comments):
                too_few = count
            else:
                enough, best = count, (example, kept)
        return best


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a tokenizer whose prompts would not begin with one beginning-of-sequence token, or would end otherwise.

    A tokenizer whose settings say `add_bos_token: false` is of a model that was trained without one.

    Raises:
        ConfigError: One line.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    name = tokenizer.name_or_path or "the base model"
    without = _trained_without_bos(tokenizer)
    if (bos is None and not without) or eos is None:
        missing = "end-of-sequence" if eos is None else "beginning-of-sequence"
        raise ConfigError(
            f"the tokenizer of {name} has no {missing} token: set {'eos' if eos is None else 'bos'}_token in its "
            "tokenizer_config.json to the one that the model was trained with"
        )
    words = tokenizer("A", add_special_tokens=False).input_ids
    ids = tokenizer("A").input_ids
    if ids != [bos, *words] and not (without and ids == words):
        shown = " ".join(tokenizer.convert_ids_to_tokens(ids))
        raise ConfigError(
            f"the tokenizer of {name} makes {shown!r} of the text 'A': prompts need one {tokenizer.bos_token} before "
            "the text and nothing after it; correct add_bos_token and add_eos_token in its tokenizer_config.json, or "
            "the post_processor of its tokenizer.json"
        )


def _trained_without_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's file says so; transformers 5 does not read that where there is a tokenizer.json."""
    if not tokenizer.name_or_path:
        return False
    try:
        settings = json.loads((Path(tokenizer.name_or_path) / "tokenizer_config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and settings.get("add_bos_token") is False
