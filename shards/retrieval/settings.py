"""Settings of `lavic retrieve`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, StringConstraints, model_validator

from lavic.config import Seed, settings
from lavic.distributed.ray_session import RaySettings
from lavic.endpoint.settings import EndpointSettings
from lavic.recommend.retrieval.bm25.build import Bm25Settings
from lavic.recommend.retrieval.catalog_rows import TextSettings
from lavic.recommend.retrieval.vectors.approximate import ApproximateSettings
from lavic.recommend.retrieval.vectors.sentence_encoder import DenseSettings
from lavic.recommend.retrieval.vectors.two_tower import TokensSettings
from lavic.shards.cluster.executor import Executor, check_executor, uses_ray
from lavic.tracking.settings import TrackingSettings

MethodName = Literal["bm25", "dense", "endpoint", "tokens"]


@settings
class RetrieveSettings:
    """Find candidates in a whole catalogue for every conversation."""

    items: tuple[str, ...] = ()
    """The catalogue: files, globs and URIs, as for `lavic crawl`. An existing index can be used without them."""
    conversations: tuple[str, ...] = Field(min_length=1)
    """Conversation files in the LaViC format: paths and URIs."""
    out: Path
    """A file ending in .jsonl for one conversation file, or a folder."""
    index: Path
    """Folder of the index; made at first use, refused if it is of another catalogue or of other settings."""
    key: Annotated[str, StringConstraints(pattern=r"^candidates\w*$")] = "candidates_fused"
    """Key of the new list in every row; its scores are under `scores...`."""
    methods: tuple[MethodName, ...] = Field(default=("bm25",), min_length=1)
    """How to search; lists of several methods are fused by reciprocal rank."""
    weights: tuple[PositiveFloat, ...] = ()
    """Weight of each method's ranks in the fusion, in the order of `methods`; by default all count the same."""
    k: PositiveInt = 100
    """Items of a list, at most."""
    store: Path | None = None
    """An item store: only items that it holds are indexed."""
    exclude_mentioned: bool = True
    """Leave out the items that the conversation has already named (`context_items`)."""
    extend: bool = False
    """Add new items of a catalogue that has grown to the index."""
    text: TextSettings = TextSettings()
    """The items' texts."""
    bm25: Bm25Settings = Bm25Settings()
    """Search by words."""
    dense: DenseSettings = DenseSettings()
    """Search by meaning."""
    endpoint: EndpointSettings = EndpointSettings()
    """Search by embeddings of an OpenAI-compatible server."""
    approximate: ApproximateSettings = ApproximateSettings()
    """Approximate search among vectors, for large catalogues."""
    tokens: TokensSettings = TokensSettings()
    """Search by item tokens and titles, with a retriever of `lavic tune-retriever`; needs `store`."""
    max_characters: PositiveInt = 24_000
    """Maximum length of a text for the server; its model may allow fewer tokens. A query keeps its last turn."""
    level: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Confidence level of the intervals."""
    draws: PositiveInt = 10_000
    """Number of bootstrap resamples."""
    seed: Seed = 0
    """Seed of the resamples."""
    executor: Executor = "auto"
    """Where to embed and search: on Ray, or in this process. `auto`: on Ray if a cluster or workers are named."""
    index_parts: PositiveInt = 1
    """On Ray: workers map one of so many parts of the index, for one that is larger than a machine's memory. The result
    does not depend on it."""
    ray: RaySettings = RaySettings()
    """The Ray cluster."""
    tracking: TrackingSettings = TrackingSettings()
    """Where the results are recorded besides OUT."""

    @model_validator(mode="after")
    def _used(self) -> RetrieveSettings:
        check_executor(self.executor, self.ray)
        if not self.items and (self.extend or self.text != TextSettings()):
            name = "--extend" if self.extend else "--text.fields"
            raise ValueError(f"{name} is about the items of a catalogue: name it with --items")
        near = self.approximate
        if near.index is None and near != ApproximateSettings():
            raise ValueError("--approximate.recall, .k and .part-rows need --approximate.index")
        return self

    @property
    def needs_gpu(self) -> bool:
        """Whether a model may be loaded here: an index that is extended may have more methods."""
        return self.extend or not {"dense", "tokens"}.isdisjoint(self.methods)

    @property
    def uses_ray(self) -> bool:
        """Whether the work is done on Ray."""
        return uses_ray(self.executor, self.ray, large=bool(self.ray.workers))

    def for_workers(self) -> RetrieveSettings:
        """The same with absolute paths: workers run in other folders."""
        dense, tokens, endpoint = self.dense, self.tokens, self.endpoint
        if (folder := Path(dense.model).expanduser()).is_dir():
            dense = replace(dense, model=str(folder.absolute()))
        if tokens.retriever is not None:
            tokens = replace(tokens, retriever=tokens.retriever.absolute())
        if endpoint.cache is not None:
            endpoint = replace(endpoint, cache=endpoint.cache.absolute())
        store = self.store.absolute() if self.store else None
        return replace(self, index=self.index.absolute(), store=store, dense=dense, tokens=tokens, endpoint=endpoint)

    @property
    def folder(self) -> Path:
        """Where results and runs go: OUT, or a folder beside a file OUT."""
        return self.out.with_suffix(".retrieve") if self.is_file else self.out

    @property
    def is_file(self) -> bool:
        """Whether OUT is a file."""
        return self.out.suffix == ".jsonl" and not self.out.is_dir()
