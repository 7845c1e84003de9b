"""Features of conversations and items by the frozen base model: the input of the retriever's trained head.

The features of a conversation are the mean of the language model's last hidden states and the last one. Those of an
item are the mean of its item tokens in the language model's space, and the mean hidden state of its title. They do not
depend on stage 2, because no language adapter is used.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lavic.data.schema import Conversation
from lavic.errors import DataError
from lavic.model import prompts
from lavic.model.bundle import Tokens
from lavic.model.inputs.token_loss import unwrap_peft
from lavic.model.item_store import ItemStore
from lavic.model.loading import Backbone
from lavic.model.visual_tokens import project

TITLE_LENGTH = 128
"""Maximum length of a title, tokens; a longer one is truncated."""


class FeatureExtractor:
    """Computes features of conversations and items with a base model.

    Args:
        backbone: Without vision tower; with the vision adapter of the store, for its projector.
        tokens: `none` uses only the title of an item.
        max_length: Longest conversation, tokens; see `query_ids`.
        tokens_per_batch: Maximum tokens of a forward pass, with padding.
    """

    def __init__(
        self, backbone: Backbone, *, tokens: Tokens = "items", max_length: int = 1024, tokens_per_batch: int = 8192
    ) -> None:
        self.backbone, self.tokens = backbone, tokens
        self.max_length, self.tokens_per_batch = max_length, tokens_per_batch
        text = unwrap_peft(backbone.model).config.text_config
        self.width = int(text.hidden_size)
        """d_text"""

    @property
    def query_width(self) -> int:
        """Width of a conversation's features."""
        return 2 * self.width

    @property
    def item_width(self) -> int:
        """Width of an item's features."""
        return self.width * (2 if self.tokens == "items" else 1)

    def queries(self, conversations: Sequence[Conversation]) -> torch.Tensor:
        """Features of conversations, float32 [n, 2 x d_text] on the CPU; the mean hidden state, then the last one.

        Raises:
            DataError: The model's output is not finite.
        """
        rows = [self.query_ids(conversation) for conversation in conversations]
        return self._hidden_states(rows, last=True)

    def items(self, store: ItemStore, ids: Sequence[str]) -> torch.Tensor:
        """Features of items, float32 [n, d_text or 2 x d_text] on the CPU; the title's, then the item tokens'.

        Raises:
            DataError: An item is not in the store, or the model's output is not finite.
        """
        encoder = self.backbone.encoder
        titles = [
            encoder.prompt(("Title: ", prompts.Text(store.title(id) if id in store else "")))[:TITLE_LENGTH]
            for id in ids
        ]
        features = self._hidden_states(titles, last=False)
        if self.tokens == "none" or not ids:
            return features if self.tokens == "none" else features.new_zeros((0, self.item_width))
        with torch.inference_mode():
            projected = project(self.backbone.model, store.tokens(ids).to(self.backbone.device)).float().cpu()
        photos = torch.stack([rows.mean(0) for rows in projected.split([store.count(id) for id in ids])])
        return torch.cat([features, _finite(photos)], dim=1)

    def query_ids(self, conversation: Conversation) -> list[int]:
        """Token ids of a conversation.

        The middle of a long one is dropped: it keeps the last turn if that fits, and as much of the start as remains.
        """
        encoder = self.backbone.encoder
        chat = encoder.chat
        prefix, suffix = (chat.prefix, chat.suffix) if encoder.style == "inst" else ("", "")
        # Roles by position: a search query has turns without roles.
        turns = [
            prompts.turn("comment" if index else "seeker", turn.text, encoder.style)
            for index, turn in enumerate(conversation.turns)
        ]
        ids = encoder.prompt((prefix, *(piece for turn in turns for piece in turn), suffix))
        if len(ids) <= self.max_length:
            return ids
        last = len(encoder.tokenizer(encoder.render((*turns[-1], suffix)), add_special_tokens=False).input_ids)
        # Keep at least the first token, which starts the sequence.
        tail = min(max(last, self.max_length // 2), self.max_length - 1)
        return [*ids[: self.max_length - tail], *ids[-tail:]]

    @torch.inference_mode()
    def _hidden_states(self, rows: Sequence[Sequence[int]], *, last: bool) -> torch.Tensor:
        """The mean of each row's last hidden states, and with `last` also that of its last token.

        Rows of similar length share a batch, and equal rows are computed once. Padding is on the right, where causal
        attention never sees it.
        """
        distinct = list(dict.fromkeys(map(tuple, rows)))
        features = torch.zeros(len(distinct), self.width * (2 if last else 1))
        model = unwrap_peft(self.backbone.model).model.language_model
        device = self.backbone.device
        for batch in _batches([len(row) for row in distinct], self.tokens_per_batch):
            lengths = torch.tensor([len(distinct[number]) for number in batch])
            ids = torch.full((len(batch), int(lengths.max())), self.backbone.encoder.pad)
            for row, number in enumerate(batch):
                ids[row, : lengths[row]] = torch.tensor(distinct[number])
            hidden = model(input_ids=ids.to(device), use_cache=False).last_hidden_state.float()
            mask = (torch.arange(ids.shape[1]) < lengths[:, None]).to(device)
            parts = [(hidden * mask[..., None]).sum(1) / lengths.to(device)[:, None]]
            if last:
                parts.append(hidden[torch.arange(len(batch)), lengths - 1])
            features[batch] = torch.cat(parts, dim=1).cpu()
        row_of = {row: number for number, row in enumerate(distinct)}
        return _finite(features[[row_of[tuple(row)] for row in rows]])


def _batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Batches of rows of similar length, of at most `max_tokens` tokens with padding."""
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        if not batches or (len(batches[-1]) + 1) * lengths[row] > max_tokens:
            batches.append([])
        batches[-1].append(row)
    return batches


def _finite(features: torch.Tensor) -> torch.Tensor:
    """The features, checked. Raises DataError."""
    if not features.isfinite().all():
        raise DataError(
            "the base model's hidden states are not finite: use --model.dtype float32, or check its weights"
        )
    return features
