"""The recommender: a conversation in, products out. One object for programs, the command line and the server."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lavic.distributed.context import DistributedContext
from lavic.errors import ConfigError, DataError, LavicError
from lavic.model.bundle import Bundle, BundleInfo
from lavic.model.item_store import ItemStore
from lavic.recommend.conversation_forms import ConversationForm, to_conversation
from lavic.recommend.job import Job
from lavic.recommend.ranking.ranker import Ranker
from lavic.recommend.ranking.request import EncodedRequest
from lavic.recommend.ranking.tournament import Tournament
from lavic.recommend.recommendation import CheckedQuery, Query, Recommendation, not_in_store

if TYPE_CHECKING:
    import torch

    from lavic.recommend.candidates import Candidates, CandidateSearch

LIST_SIZE = 10
"""Candidates of a list in the released data: assumed of bundles that do not record it."""
RETRIEVED = 50
"""Candidates that are retrieved for a conversation and ranked."""


class Recommender:
    """Recommends items of a store for conversations. One model in memory; safe to call from several threads.

    A list that is longer than those the bundle was tuned on is ranked in groups, see `ranking.tournament`.

    Args:
        ranker: The model and its item store.
        search: Finds candidates; None: every query must name its own.
        retrieved: Candidates retrieved for a query.
        list_size: Most candidates of one prompt; None: of the bundle's training lists.
        lock: Held while the model computes; recommenders that share a model share it.
    """

    def __init__(
        self,
        ranker: Ranker,
        search: CandidateSearch | None = None,
        *,
        retrieved: int = RETRIEVED,
        list_size: int | None = None,
        lock: threading.Lock | None = None,
    ) -> None:
        self.ranker, self.search, self.retrieved = ranker, search, retrieved
        self.store = ranker.store
        self.list_size = max(2, list_size or ranker.bundle.info.list_size or LIST_SIZE)
        self._lock = lock or threading.Lock()
        self._options: dict[str, Any] = {"retrieved": retrieved}
        """Arguments of `load`, for `reloaded`."""

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        store: str | Path,
        index: str | Path | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        base: str | None = None,
        tokens_per_item: int | None = None,
        retrieved: int = RETRIEVED,
        methods: Sequence[str] = (),
        weights: Sequence[float] = (),
        reuse: Recommender | None = None,
    ) -> Recommender:
        """Loads everything that recommending needs.

        Args:
            bundle: The bundle that `lavic tune` made: RUN/bundle.
            store: The item store that it was tuned on, from `lavic embed`.
            index: The retrieval index of the catalogue, from `lavic retrieve`.
            device: Of the model; None: the GPU if there is one.
            dtype: Of the weights. `auto`: bfloat16 on a GPU, float32 on a CPU.
            base: Folder or Hugging Face name of the base model, where it is not the recorded one.
            tokens_per_item: Item tokens per candidate, the first ones; None: as in tuning.
            retrieved: Candidates retrieved for a query that names none.
            methods: Of the index, to search by; by default all that take text.
            weights: Of each method's ranks in the fusion, in the order of `methods`; by default all count the same.
            reuse: A recommender whose loaded model is used if the bundle is the same.

        Raises:
            ConfigError: It is a stage-1 bundle, the base model is not found, or the index has no such method.
            DataError: A folder is not whole, or they do not belong together.
        """
        options: dict[str, Any] = {
            "device": device,
            "dtype": dtype,
            "base": base,
            "tokens_per_item": tokens_per_item,
            "retrieved": retrieved,
            "methods": methods,
            "weights": weights,
        }
        bundle, opened = Path(bundle), ItemStore.open(store, mapped=False)
        info = BundleInfo.read(bundle)
        info.check_store(opened)
        if info.language_adapter is None:
            raise ConfigError(f"--bundle {bundle}: a stage-1 bundle cannot recommend: run `lavic tune` first")
        search = _open_search(index, opened, methods, weights)
        shared = search is not None and search.needs_model
        lock = None
        if reuse is not None and reuse.ranker.bundle.info == info and not (shared and reuse.ranker.bundle.merged):
            info.check_adapters(bundle)
            model, lock = reuse.ranker.bundle, reuse._lock
        else:
            device = DistributedContext.from_env().device() if device is None else device
            model = Bundle.load(bundle, device, dtype=dtype, base=base, merge=not shared)
        if search is not None:
            search.load_encoders(model if shared else None)
        ranker = Ranker(model, opened, tokens_per_item=tokens_per_item)
        recommender = cls(ranker, search, retrieved=retrieved, lock=lock)
        recommender._options = options
        return recommender

    def reloaded(
        self, bundle: str | Path, store: str | Path, index: str | Path | None = None, **options: Any
    ) -> Recommender:
        """A recommender of what is in the folders now; this one is not changed, and its model is reused.

        Args:
            bundle, store, index: See `load`.
            options: Of `load`, where they are not those of this one.

        Raises:
            ConfigError, DataError: As `load`.
        """
        kept = self._options
        if index is None:  # nothing is searched
            kept = {name: value for name, value in kept.items() if name not in ("methods", "weights")}
        return Recommender.load(bundle, store, index, reuse=self, **{**kept, **options})

    def recommend(
        self,
        conversation: ConversationForm,
        candidates: Sequence[str] | None = None,
        k: int = 10,
        *,
        exclude: Collection[str] = (),
    ) -> Recommendation:
        """Recommends for one conversation.

        Args:
            conversation: Text, a list of turns, or chat messages (`role`, `content`).
            candidates: Item ids to rank; None: retrieved from the whole catalogue.
            k: Most items of the answer.
            exclude: Item ids that are not recommended.

        Raises:
            ConfigError: No candidates are given, and there is no retrieval index.
            DataError: The conversation cannot be read, or a candidate is not in the store.
        """
        query = Query(conversation=conversation, candidates=candidates, k=k, exclude=exclude)
        return self.recommend_batch([query])[0]

    def recommend_batch(self, queries: Sequence[Query | ConversationForm]) -> list[Recommendation]:
        """Recommends for many conversations, in order; several share one forward pass.

        Answers do not depend on the batch: in float32, probabilities agree to 1e-5.

        Raises:
            ConfigError, DataError: As `recommend`, of the first query that fails.
        """
        if isinstance(queries, str):
            raise DataError("queries: a text where a list of queries was expected; `recommend` takes one conversation")
        normalized = [query if isinstance(query, Query) else Query(conversation=query) for query in queries]
        answers = self.answer([self.check(query) for query in normalized])
        for answer in answers:
            if isinstance(answer, LavicError):
                raise answer
        return [answer for answer in answers if isinstance(answer, Recommendation)]

    def check(self, query: Query) -> CheckedQuery:
        """Reads a query's conversation and looks its candidates up; needs neither model nor lock.

        Raises:
            ConfigError: No candidates are given, and there is no retrieval index.
            DataError: The conversation cannot be read, or a candidate is not in the store.
        """
        if isinstance(query.k, bool) or not isinstance(query.k, Integral):
            raise DataError(f"k: {query.k!r:.80}; ask for a number of items")
        if query.k < 1:
            raise DataError(f"k: {query.k}; ask for one item at least")
        candidates = None if query.candidates is None else _ids(query.candidates, "candidates")
        exclude = frozenset(_ids(query.exclude, "exclude"))
        conversation = to_conversation(query.conversation, query.name)
        if candidates is None:
            if self.search is None:
                raise ConfigError(
                    "candidates: none given, and there is no retrieval index to find them with: name item ids, or make "
                    "an index with `lavic retrieve` and give it as --index"
                )
            return CheckedQuery(conversation, None, query.k, exclude)
        candidates = list(dict.fromkeys(candidates))
        if not candidates:
            raise DataError("candidates: an empty list; name item ids, or leave it out to search the whole catalogue")
        if missing := [item for item in candidates if item not in self.store]:
            raise DataError(f"candidates: {not_in_store(missing, self.store)}")
        return CheckedQuery(conversation, tuple(item for item in candidates if item not in exclude), query.k, exclude)

    def prompts(self, query: CheckedQuery) -> int:
        """About how many prompts a query takes: more than one if its list is ranked in groups."""
        count = self.retrieved if query.candidates is None else len(query.candidates)
        return 1 if count <= self.list_size else -(-count // (self.list_size - 1))

    def answer(self, queries: Sequence[CheckedQuery]) -> list[Recommendation | LavicError]:
        """Answers checked queries, in order. A query that cannot be answered has its error, the others their answers.

        Each round of all lists is one call of the ranker, which makes as few forward passes of it as fit.
        """
        with self._lock:
            jobs = self._start(queries)
            results: list[Recommendation | LavicError | None] = [None] * len(jobs)
            running = list(range(len(jobs)))
            while running := [row for row in running if results[row] is None and jobs[row].tournament.groups]:
                encoded: list[EncodedRequest] = []
                counts: dict[int, int] = {}
                for row in running:
                    try:
                        groups = jobs[row].encode(self.ranker)
                    except LavicError as error:
                        results[row] = error
                    else:
                        counts[row] = len(groups)
                        encoded += groups
                rankings = iter(self.ranker.rank_encoded(encoded))
                for row, count in counts.items():
                    jobs[row].tournament.advance([next(rankings) for _ in range(count)])
        return [result or job.result(self.store) for job, result in zip(jobs, results, strict=True)]

    def _start(self, queries: Sequence[CheckedQuery]) -> list[Job]:
        """Each query with its candidates and their scores."""
        searched = [query for query in queries if query.candidates is None]
        hits: Iterator[Candidates] = iter(())
        if self.search is not None:
            self.search.index.check_files()
            conversations = [q.conversation for q in searched]
            # As in the lists of `lavic retrieve`, with which the model was tuned.
            excluded = [q.exclude.union(q.conversation.context_items) for q in searched]
            hits = iter(self.search.search(conversations, self.retrieved, excluded))
        jobs = []
        for query in queries:
            if query.candidates is None:  # `check` refuses it where there is no index
                candidates = next(hits)
                ids, scores = candidates.ids, candidates.scores
            else:
                ids = query.candidates
                scores = self.search.score(query.conversation, ids) if self.search and ids else {}
            jobs.append(Job(query, Tournament(ids, self.list_size), scores))
        return jobs


def _ids(ids: Collection[str], part: str) -> list[str]:
    """Item ids of a query: a list, an array or a column of a table.

    Raises:
        DataError: They are something else.
    """
    items = list(ids) if isinstance(ids, Iterable) and not isinstance(ids, str) else None
    if items is None or not all(isinstance(item, str) for item in items):
        raise DataError(f"{part}: {ids!r:.80} is not a list of item ids as text")
    return items


def _open_search(
    index: str | Path | None, store: ItemStore, methods: Sequence[str], weights: Sequence[float]
) -> CandidateSearch | None:
    if index is None:
        if methods or weights:
            raise ConfigError("--methods, --weights: nothing is searched without --index")
        return None
    from lavic.recommend.candidates import CandidateSearch

    return CandidateSearch.open(Path(index), store, methods, weights)
