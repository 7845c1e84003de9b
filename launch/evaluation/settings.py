"""The settings of `lavic evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from lavic.config import Seed, settings
from lavic.data.remote_shards import CacheSettings
from lavic.endpoint.settings import NO_EFFECT
from lavic.evaluation.chat import ChatSettings
from lavic.evaluation.model_arms.model_rankings import Decode
from lavic.evaluation.test_set import ClusterBy
from lavic.launch.evaluation.setup.arm_names import ArmName
from lavic.model.config import BaseModelSettings
from lavic.recommend.retrieval.catalog_rows import TextSettings
from lavic.recommend.retrieval.vectors.sentence_encoder import DenseSettings
from lavic.tracking.settings import TrackingSettings

FREE = (
    *("nproc", "dry_run", "overwrite", "tokens_per_batch", "tracking.", "model.", "cache."),
    *(f"chat.{name}" for name in NO_EFFECT),
)
"""Settings, or groups of them, that do not change the results."""


@settings
class EvaluateSettings:
    """Evaluate a tuned bundle beside its controls and baselines."""

    bundle: Path | None = None
    """The bundle that `lavic tune` made: RUN/bundle. Arms that use no model need none."""
    store: Path | None = None
    """The item store that it was tuned on, from `lavic embed`."""
    test: tuple[str, ...] = Field(min_length=1)
    """Conversation files, each FILE or NAME=FILE; the first is the main test set."""
    out: Path
    """Folder for results.json, predictions.jsonl and report.html."""
    compare: tuple[str, ...] = ()
    """Other bundles to compare with, each NAME=BUNDLE or NAME=BUNDLE@STORE, such as text_only=runs/titles/bundle."""
    run: tuple[str, ...] = ()
    """Rankings of other systems, each NAME=FILE: a TREC run, or rows in the LaViC format with `recommended_*` or
    `response_*`, of which FILE@KEY chooses one. NAME@SET=FILE: of another test set than the main one."""
    arms: tuple[ArmName, ...] = ()
    """The model of --bundle, its controls and baselines; by default lavic, shuffled, blank, noise, before_tuning,
    list_order and random, without a bundle list_order and random. `popularity` needs --train, `bm25`, `dense` and
    `chat` need --items, `chat` also --chat.url and --chat.model, `words` and `words_before_tuning` need --words or
    --shards with descriptions, `base_photos` needs --shards."""
    candidates: str = "candidates_st"
    """Key of the candidate list to rank."""
    top: PositiveInt | None = None
    """Rank only the first so many of each list, such as 10 of the 100 that `lavic retrieve` finds; by default all."""
    missing: Literal["refuse", "drop"] = "refuse"
    """A candidate that is not in the store is an error, or is dropped from its list and counted."""
    decode: Decode = "likelihood"
    """`likelihood` ranks the whole list by the probability of each ID; `generate` generates text and parses the ID from
    it, as the released scripts do, which gives one item and no ranking."""
    orders: PositiveInt = 1
    """Number of orders in which a model ranks each list, the file's and random ones; of several, results and report say
    how much the answers depend on the order."""
    average_orders: bool = False
    """Score the mean of a candidate's probabilities over these orders, instead of those in the file's order."""
    photo_context: PositiveInt | None = None
    """Maximum length of a prompt of the arm `base_photos`, tokens; by default, and at most, the base model's context. A
    list whose photos do not fit is ranked in groups, whose winners are ranked again."""
    tokens_per_item: PositiveInt | None = None
    """Number of item tokens per candidate, the first ones; by default as in tuning."""
    train: Path | None = None
    """Training conversations, for the popularity baseline."""
    items: tuple[str, ...] = ()
    """Catalogue files with the candidates' titles and texts, for the arms `bm25`, `dense` and `chat`."""
    text: TextSettings = TextSettings()
    """The candidates' texts, for these arms."""
    dense: DenseSettings = DenseSettings()
    """The sentence encoder of the baseline `dense`."""
    chat: ChatSettings = ChatSettings()
    """The model of the arm `chat`."""
    words: Path | None = None
    """Photos as text, for the `words` arms: a jsonl file of {"id", "look"}; by default the descriptions of --shards."""
    shards: tuple[Path, ...] = ()
    """Sets of shards with the candidates' photos, for the report's gallery, `base_photos` and the `words` arms."""
    cache: CacheSettings = CacheSettings()
    """Copies of shards, where `shards` are in an object store."""
    runs: tuple[str, ...] = ()
    """Run folders of stages 1 and 2, each RUN or NAME=RUN, for the report's validation curves."""
    gallery: NonNegativeInt = 24
    """Number of example conversations in the report."""
    title: str = "LaViC evaluation"
    """Heading of the report."""
    cluster: ClusterBy = "both"
    """Conversations that are resampled together for the intervals: those that share a submission or a target (both),
    only a submission, only a target, or none."""
    draws: PositiveInt = 10_000
    """Number of bootstrap resamples."""
    level: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Confidence level of the intervals."""
    seed: Seed = 0
    """Seed of shuffles, resamples and the gallery's sample."""
    limit: PositiveInt | None = None
    """Evaluate only the first conversations of each file, at most this many."""
    model: BaseModelSettings = BaseModelSettings()
    """The base model of --bundle."""
    tokens_per_batch: PositiveInt = 8192
    """Maximum tokens of a batch; memory and speed depend on it, results do not."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the weights. `auto`: bfloat16 on a GPU, float32 on a CPU."""
    nproc: PositiveInt = 1
    """Number of local processes; ignored under torchrun and srun."""
    overwrite: bool = False
    """Replace results of other settings in --out."""
    dry_run: bool = False
    """Check the inputs and print what would be ranked, without loading a model or writing."""
    tracking: TrackingSettings = TrackingSettings()
    """Where the results are recorded besides OUT."""
