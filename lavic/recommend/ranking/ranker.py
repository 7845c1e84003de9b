"""Ranks candidates by the likelihood that the model answers with their id.

One forward pass per conversation: the ids of all candidates follow the prompt, each at the positions directly behind it
and masked from the others (a tree attention mask), which gives each candidate exactly the score of a pass over
`prompt + id + end-of-sequence`. Ids that end with the end-of-sequence token are prefix-free, so their probabilities
need no length correction and can be normalized over the list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import nn

from lavic.errors import DataError, first_names
from lavic.model import prompts
from lavic.model.bundle import Bundle
from lavic.model.generation import generate
from lavic.model.inputs.token_loss import splice, unwrap_peft
from lavic.model.item_store import ItemStore
from lavic.recommend.ranking.answer_ids import mentions, released_answer, unlisted, words_in
from lavic.recommend.ranking.ranked_list import RankedList
from lavic.recommend.ranking.request import EncodedRequest, Request
from lavic.recommend.ranking.token_source import StoredTokens, TokenSource

_TARGETS = 1 << 16
"""Items whose ids are kept as tokens."""
MAX_NEW_TOKENS = 16
"""Maximum length of a generated answer, in tokens: an id of Amazon's and a word or two before it."""
_WORDS_BEFORE = 4
"""Tokens that an answer may have besides the longest id of its list."""


class Ranker:
    """Ranks candidate lists with a bundle and its item store.

    Args:
        bundle: Loaded without the vision tower; only the projector and the language model are used.
        store: Titles and item tokens of every candidate.
        tokens_per_batch: Maximum tokens of a batch, padding included. None: 8,192 on a GPU, 2,048 on a CPU, whose
            caches do not hold more. Results do not depend on it.
        tokens_per_item: Number of item tokens per candidate (the first ones); None: as in tuning.
        tokens: Shown behind the titles instead of the store's, whether the bundle was tuned with item tokens or not.
        max_length: Longest prompt, tokens; None: as in tuning.

    Raises:
        DataError: The store was not made for this bundle.
    """

    def __init__(
        self,
        bundle: Bundle,
        store: ItemStore,
        *,
        tokens_per_batch: int | None = None,
        tokens_per_item: int | None = None,
        tokens: TokenSource | None = None,
        max_length: int | None = None,
    ) -> None:
        bundle.info.check_store(store)
        self.tokens_per_item = tokens_per_item or bundle.info.tokens_per_item
        self.max_length = max_length or bundle.info.max_length
        self.tokens = tokens
        if tokens is None and bundle.info.tokens == "items":
            self.tokens = StoredTokens(bundle.backbone.model, store, self.tokens_per_item)
        self.bundle, self.store = bundle, store
        self.encoder = bundle.backbone.encoder
        self._target = lru_cache(_TARGETS)(self.encoder.target)  # an item is in many lists
        self.device = bundle.backbone.device
        self.tokens_per_batch = tokens_per_batch or (2048 if self.device.type == "cpu" else 8192)

    def rank(
        self,
        requests: Sequence[Request],
        *,
        decode: Literal["likelihood", "generate"] = "likelihood",
        progress: Callable[[int], None] | None = None,
    ) -> list[RankedList]:
        """Ranks every request, in order.

        Args:
            requests: Any number; each is checked before the first is ranked.
            decode: `likelihood` ranks the whole list; `generate` generates text greedily and parses the id from it, as
                the released scripts do.
            progress: Called with the number of requests done since the last call.

        Raises:
            DataError: A candidate is not in the store, or a list exceeds the model's maximum length.
        """
        return self.rank_encoded([self.encode(request) for request in requests], decode=decode, progress=progress)

    def rank_encoded(
        self,
        encoded: Sequence[EncodedRequest],
        *,
        decode: Literal["likelihood", "generate"] = "likelihood",
        progress: Callable[[int], None] | None = None,
    ) -> list[RankedList]:
        """As `rank`, of requests that `encode` has checked."""
        rankings: list[RankedList] = [RankedList(ids=())] * len(encoded)
        batches = self._batches(encoded) if decode == "likelihood" else ([row] for row in range(len(encoded)))
        for rows in batches:
            batch = [encoded[row] for row in rows]
            ranked = self._score(batch) if decode == "likelihood" else [self._generate(batch[0])]
            for row, ranking in zip(rows, ranked, strict=True):
                rankings[row] = ranking
            if progress is not None:
                progress(len(rows))
        return rankings

    def encode(self, request: Request) -> EncodedRequest:
        """Tokenizes a request; a conversation that is too long is shortened (see `Encoder.recommendation`)."""
        conversation, candidates = request.conversation, tuple(dict.fromkeys(request.candidates))
        needed = dict.fromkeys([*candidates, *(request.tokens_of or {}).values()])
        missing = [item for item in needed if item not in self.store]
        if missing:
            raise DataError(
                f"{conversation.place}: candidate {first_names(missing)} of {len(candidates)} is not "
                f"in the item store {self.store.folder}: embed its photo, or remove it from the list"
            )
        texts, tokens_of = request.texts or {}, request.tokens_of or {}
        token_source = self.tokens if request.texts is None else None
        prompt_candidates = [
            prompts.Candidate(item, self.store.title(item)[: request.max_title], texts.get(item)) for item in candidates
        ]
        none = self.bundle.info.none
        targets = [self._target(item) for item in (*candidates, *([prompts.NONE] if none else []))]
        prompt = self.encoder.recommendation(
            conversation,
            prompt_candidates,
            photo_tokens=[token_source.count(tokens_of.get(item, item)) if token_source else 0 for item in candidates],
            max_length=self.max_length,
            reserve=max((len(target) for target in targets), default=0),
            none=none,
        )
        return EncodedRequest(request, candidates, prompt.input_ids, targets)

    def _batches(self, encoded: Sequence[EncodedRequest]) -> Iterator[list[int]]:
        """Batches of rows of similar length, without the requests that have no candidates."""
        rows = sorted(
            (row for row, request in enumerate(encoded) if request.candidates), key=lambda row: encoded[row].length
        )
        batch: list[int] = []
        for row in rows:
            if batch and (len(batch) + 1) * encoded[row].length > self.tokens_per_batch:
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch

    @torch.no_grad()  # not inference_mode: a model that caches tensors in such a pass can't be trained on afterwards
    def _score(self, batch: Sequence[EncodedRequest]) -> list[RankedList]:
        """One forward pass: each prompt is followed by the ids of its candidates."""
        width = max(request.length for request in batch)
        ids = torch.full((len(batch), width), self.encoder.pad)
        positions = torch.zeros((len(batch), width), dtype=torch.long)
        # 0 for the prompt, n for the n-th candidate, -1 for padding, which attends to padding only.
        branch = torch.full((len(batch), width), -1)
        sources: list[int] = []
        labels: list[int] = []
        for row, request in enumerate(batch):
            start = prompt_end = len(request.prompt)
            ids[row, :start] = torch.tensor(request.prompt)
            positions[row, :start] = torch.arange(start)
            branch[row, :start] = 0
            for number, target in enumerate(request.targets, 1):
                end = start + len(target) - 1
                ids[row, start:end] = torch.tensor(target[:-1])
                positions[row, start:end] = torch.arange(prompt_end, prompt_end + len(target) - 1)
                branch[row, start:end] = number
                # The last token of the prompt predicts the first one of the id.
                sources += [row * width + prompt_end - 1, *range(row * width + start, row * width + end)]
                labels += target
                start = end
        model: Any = unwrap_peft(self.bundle.backbone.model)
        embeds = splice(model, ids.to(self.device), self._image_features(batch))
        mask = _tree(branch.to(self.device), embeds.dtype)
        hidden = model.model.language_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions.to(self.device), use_cache=False
        ).last_hidden_state
        logits = model.lm_head(hidden.flatten(0, 1)[torch.tensor(sources, device=self.device)]).float()
        losses = nn.functional.cross_entropy(logits, torch.tensor(labels, device=self.device), reduction="none")
        if len(wrong := (~losses.isfinite()).nonzero()):
            place = batch[sources[int(wrong[0])] // width].request.conversation.place
            raise DataError(
                f"{place}: the model gives probabilities that are not finite (NaN or infinity): the item store or the "
                "bundle is damaged, or its numbers are too large for the precision: try --dtype float32"
            )
        pieces = iter((-losses).double().cpu().split([len(target) for request in batch for target in request.targets]))
        return [_sort(request.candidates, [float(next(pieces).sum()) for _ in request.targets]) for request in batch]

    def _generate(self, request: EncodedRequest) -> RankedList:
        """Greedy generation; the first id in the text is the answer."""
        (output,) = generate(
            self.bundle.backbone.model,
            self.encoder,
            [request.prompt],
            self._image_features([request]),
            max_new_tokens=max(MAX_NEW_TOKENS, _WORDS_BEFORE + max(map(len, request.targets), default=0)),
        )
        answer = self._parse_id(output.text, request.candidates)
        none = (float(answer is None and prompts.NONE in output.text.lower())) if self.bundle.info.none else None
        released = released_answer(output.text, request.candidates)
        if answer is None:
            return RankedList(ids=(), text=output.text, answer=released, none=none)
        return RankedList(ids=(answer,), logprobs=(output.logprob,), text=output.text, answer=released, none=none)

    def _parse_id(self, text: str, candidates: Sequence[str]) -> str | None:
        """The first word of a text that is a candidate, another item, or has the shape of an id."""
        known = [*candidates, *(word for word in words_in(text) if word in self.store)]
        named = mentions(text, [*known, *unlisted(text, known)])
        return named[0].item if named else None

    def _image_features(self, batch: Sequence[EncodedRequest]) -> torch.Tensor | None:
        """[n, d_text] projected item tokens for all image tokens of the batch, in order."""
        if self.tokens is None:
            return None
        items = [
            (encoded.request.tokens_of or {}).get(item, item)
            for encoded in batch
            if encoded.request.texts is None
            for item in encoded.candidates
        ]
        if not items:
            return None
        distinct = list(dict.fromkeys(items))  # an item of several lists is projected once
        rows = dict(zip(distinct, self.tokens.features(distinct), strict=True))
        return torch.cat([rows[item] for item in items])


def _tree(branch: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[b, 1, length, length] additive mask: causal attention to the prompt and the token's own branch."""
    same_branch = branch[:, :, None] == branch[:, None, :]
    prompt = (branch[:, None, :] == 0) & (branch[:, :, None] >= 0)
    causal = torch.ones(branch.shape[1], branch.shape[1], dtype=torch.bool, device=branch.device).tril()
    allowed = (same_branch | prompt) & causal
    mask = torch.zeros(allowed.shape, dtype=dtype, device=branch.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]


def _sort(candidates: Sequence[str], logprobs: Sequence[float]) -> RankedList:
    """The candidates best first; ties keep their order. A last log-probability without a candidate is of "none"."""
    order = sorted(range(len(candidates)), key=lambda index: -logprobs[index])
    ordered = torch.tensor([logprobs[index] for index in order], dtype=torch.float64)
    all_logprobs = torch.tensor(logprobs, dtype=torch.float64)
    return RankedList(
        ids=tuple(candidates[index] for index in order),
        logprobs=tuple(ordered.tolist()),
        probabilities=tuple(ordered.softmax(0).tolist()),
        none=float(all_logprobs.softmax(0)[-1]) if len(all_logprobs) > len(candidates) else None,
    )
