"""Ranking by likelihood: how probable is it that the model answers with each candidate's id?

A conversation is read once. Behind its prompt stand the ids of all candidates, each at the positions that follow the
prompt and blind to the others (a tree-shaped attention mask), so that one pass gives for every candidate exactly what
a pass over `prompt + id + end-of-sequence` would. Ids that end with the end-of-sequence token are prefix-free: their
probabilities can be compared, and normalised over the list, without any correction for length.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from lavic.data.schema import Conversation
from lavic.errors import DataError
from lavic.model import prompts
from lavic.model.bundle import Bundle
from lavic.model.generation import generate
from lavic.model.item_store import ItemStore
from lavic.model.prompt_encoder import core, splice
from lavic.model.visual_tokens import project

ID_SHAPE = re.compile(r"\bB[A-Z0-9]{9}\b")
"""What the released scripts look for in free text; the first match is the answer."""

FREE_TOKENS = 16
"""Longest free answer, tokens: room for an id and a word or two before it."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One conversation and the list to rank."""

    conversation: Conversation
    candidates: tuple[str, ...]
    """Item ids in the order shown. Repeated ones are shown once, where they first stand."""
    shown: Mapping[str, str] | None = None
    """Candidate -> the item whose tokens stand behind its title; None: its own. For the shuffled control."""
    looks: Mapping[str, str] | None = None
    """Candidate -> words in the place of its tokens. For the control that reads the photo as words."""


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """What the model makes of one request."""

    ids: tuple[str, ...]
    """Best first. Every candidate when ranking; the answered id, or nothing, when generating."""
    logprobs: tuple[float, ...] = ()
    """Natural logarithm of the probability that the model writes this id and stops."""
    probabilities: tuple[float, ...] = ()
    """The same, normalised over the list."""
    text: str | None = None
    """The free answer, when generating."""
    none: float | None = None
    """Probability of "none of these", normalised with those of the list, where the bundle knows that answer."""


@dataclass(frozen=True)
class Encoded:
    """A request in tokens."""

    request: Request
    candidates: tuple[str, ...]
    prompt: list[int]
    targets: list[list[int]]
    """The ids of the candidates, and "none" behind them where it is an answer, each with the end-of-sequence token."""

    @property
    def length(self) -> int:
        """Tokens of the one pass; the last token of an id is predicted but never read."""
        return len(self.prompt) + sum(len(target) - 1 for target in self.targets)


class Ranker:
    """Ranks candidate lists with a bundle and the item store its tokens come from.

    Args:
        bundle: Loaded without vision tower; only the projector and the language model are used.
        store: Titles and item tokens of every candidate.
        tokens_per_batch: Prompts are read together up to this many tokens. Results do not depend on it.
        tokens_per_item: Item tokens shown of each candidate, its first ones; None: as many as the bundle was tuned on.

    Raises:
        DataError: The store was not made for this bundle.
    """

    def __init__(
        self,
        bundle: Bundle,
        store: ItemStore,
        *,
        tokens_per_batch: int = 8192,
        tokens_per_item: int | None = None,
    ) -> None:
        bundle.check_store(store)
        self.most = tokens_per_item or bundle.info.tokens_per_item
        self.bundle, self.store, self.tokens_per_batch = bundle, store, tokens_per_batch
        self.encoder = bundle.backbone.encoder
        self.device = bundle.backbone.device

    def rank(
        self,
        requests: Sequence[Request],
        *,
        decode: Literal["likelihood", "generate"] = "likelihood",
        progress: Callable[[int], None] | None = None,
    ) -> list[Ranking]:
        """Ranks every request; the results keep their order.

        Args:
            requests: Any number; each is checked before the first is ranked.
            decode: `likelihood` ranks the whole list and always answers with a candidate; `generate` lets the model
                write freely, greedily, and reads the id out of what it wrote, as the released scripts do.
            progress: Called with the number of requests done since the last call.

        Raises:
            DataError: A candidate is not in the store, or a list alone is longer than the model reads; names the
                conversation.
        """
        encoded = [self.encode(request) for request in requests]
        found: list[Ranking] = [Ranking(ids=())] * len(requests)
        batches = self._batches(encoded) if decode == "likelihood" else ([row] for row in range(len(encoded)))
        for rows in batches:
            part = [encoded[row] for row in rows]
            rankings = self._score(part) if decode == "likelihood" else [self._generate(part[0])]
            for row, ranking in zip(rows, rankings, strict=True):
                found[row] = ranking
            if progress is not None:
                progress(len(rows))
        return found

    def encode(self, request: Request) -> Encoded:
        """The request in tokens, shortened where it is too long (see `Encoder.recommendation`)."""
        conversation, candidates = request.conversation, tuple(dict.fromkeys(request.candidates))
        shown = [*candidates, *(request.shown or {}).values()]
        missing = [item for item in dict.fromkeys(shown) if item not in self.store]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise DataError(
                f"{conversation.place}: candidate {missing[0]}{more} of {len(candidates)} is not "
                f"in the item store {self.store.folder}: embed its photo, or take it off the list"
            )
        looks, shows = request.looks or {}, request.shown or {}
        looked_at = request.looks is None and self.bundle.info.tokens == "items"
        listed = [prompts.Candidate(item, self.store.title(item), looks.get(item)) for item in candidates]
        none = self.bundle.info.none
        targets = [self.encoder.target(item) for item in (*candidates, *([prompts.NONE] if none else []))]
        prompt = self.encoder.recommendation(
            conversation,
            listed,
            photo_tokens=[
                self.store.count(shows.get(item, item), self.most) if looked_at else 0 for item in candidates
            ],
            max_length=self.bundle.info.max_length,
            reserve=max((len(target) for target in targets), default=0),
            none=none,
        )
        return Encoded(request, candidates, prompt.input_ids, targets)

    def _batches(self, encoded: Sequence[Encoded]) -> Iterator[list[int]]:
        """Rows of like length together, as many as fit; a request without candidates has nothing to rank."""
        rows = sorted((row for row, one in enumerate(encoded) if one.candidates), key=lambda row: encoded[row].length)
        batch: list[int] = []
        for row in rows:
            if batch and (len(batch) + 1) * encoded[row].length > self.tokens_per_batch:
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch

    @torch.inference_mode()
    def _score(self, batch: Sequence[Encoded]) -> list[Ranking]:
        """One pass over a batch: prompts with the ids of their candidates behind them."""
        width = max(one.length for one in batch)
        ids = torch.full((len(batch), width), self.encoder.pad)
        positions = torch.zeros((len(batch), width), dtype=torch.long)
        # Which tokens belong together: 0 the prompt, n the n-th candidate, -1 padding, which sees only padding.
        branch = torch.full((len(batch), width), -1)
        sources: list[int] = []
        learnt: list[int] = []
        for row, one in enumerate(batch):
            start = len(one.prompt)
            ids[row, :start] = torch.tensor(one.prompt)
            positions[row, :start] = torch.arange(start)
            branch[row, :start] = 0
            for number, target in enumerate(one.targets, 1):
                end = start + len(target) - 1
                ids[row, start:end] = torch.tensor(target[:-1])
                positions[row, start:end] = torch.arange(len(one.prompt), len(one.prompt) + len(target) - 1)
                branch[row, start:end] = number
                # The prompt's last token predicts the id's first one, each token of the id the next.
                sources += [row * width + len(one.prompt) - 1, *range(row * width + start, row * width + end)]
                learnt += target
                start = end
        model: Any = core(self.bundle.backbone.model)
        embeds = splice(model, ids.to(self.device), self._photos(batch))
        mask = _tree(branch.to(self.device), embeds.dtype)
        hidden = model.model.language_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions.to(self.device), use_cache=False
        ).last_hidden_state
        places = torch.tensor(sources, device=self.device)
        logits = model.lm_head(hidden.flatten(0, 1)[places]).float()
        labels = torch.tensor(learnt, device=self.device)
        tokens = -nn.functional.cross_entropy(logits, labels, reduction="none").double().cpu()
        pieces = iter(tokens.split([len(target) for one in batch for target in one.targets]))
        return [_ranking(one.candidates, [float(next(pieces).sum()) for _ in one.targets]) for one in batch]

    def _generate(self, one: Encoded) -> Ranking:
        """Greedy free text, and the first id in it."""
        (written,) = generate(
            self.bundle.backbone.model, self.encoder, [one.prompt], self._photos([one]), max_new_tokens=FREE_TOKENS
        )
        answer = self._read(written.text, one.candidates)
        none = (float(answer is None and prompts.NONE in written.text.lower())) if self.bundle.info.none else None
        if answer is None:
            return Ranking(ids=(), text=written.text, none=none)
        return Ranking(ids=(answer,), logprobs=(written.logprob,), text=written.text, none=none)

    def _read(self, text: str, candidates: Sequence[str]) -> str | None:
        """The first word of a free answer that is a candidate, another item, or looks like an id."""
        for word in re.findall(r"[A-Za-z0-9_-]+", text):
            if word in candidates or word in self.store or ID_SHAPE.fullmatch(word):
                return word
        return None

    def _photos(self, batch: Sequence[Encoded]) -> torch.Tensor | None:
        """[n, d_text] projected tokens for all image tokens of the batch, in reading order."""
        if self.bundle.info.tokens == "none":
            return None
        wanted = [
            (one.request.shown or {}).get(item, item)
            for one in batch
            if one.request.looks is None
            for item in one.candidates
        ]
        if not wanted:
            return None
        # An item of several lists is projected once.
        distinct = list(dict.fromkeys(wanted))
        tokens = project(self.bundle.backbone.model, self.store.tokens(distinct, self.most).to(self.device))
        counts = [self.store.count(item, self.most) for item in distinct]
        rows = dict(zip(distinct, tokens.split(counts), strict=True))
        return torch.cat([rows[item] for item in wanted])


def _tree(branch: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Additive attention mask [b, 1, length, length]: each token sees the prompt and its own branch, up to itself."""
    own = branch[:, :, None] == branch[:, None, :]
    prompt = (branch[:, None, :] == 0) & (branch[:, :, None] >= 0)
    causal = torch.ones(branch.shape[1], branch.shape[1], dtype=torch.bool, device=branch.device).tril()
    seen = (own | prompt) & causal
    mask = torch.zeros(seen.shape, dtype=dtype, device=branch.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


def _ranking(candidates: Sequence[str], logprobs: Sequence[float]) -> Ranking:
    """Sorted best first; equal ones keep the order of the list. One more than candidates is "none of these"."""
    order = sorted(range(len(candidates)), key=lambda place: -logprobs[place])
    ordered = torch.tensor([logprobs[place] for place in order], dtype=torch.float64)
    every = torch.tensor(logprobs, dtype=torch.float64)
    return Ranking(
        ids=tuple(candidates[place] for place in order),
        logprobs=tuple(ordered.tolist()),
        probabilities=tuple(ordered.softmax(0).tolist()),
        none=float(every.softmax(0)[-1]) if len(every) > len(candidates) else None,
    )
