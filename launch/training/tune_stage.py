"""Stage 2 of `lavic tune`: LoRA on the language model."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavic.distributed.context import DistributedContext
from lavic.errors import ConfigError, DataError
from lavic.launch.training.hit_rate import HIT_RATE, HitRateScorer, listed_subset
from lavic.launch.training.stage import StageComponents, StageInput, TrainingRun, TrainingStage
from lavic.train.run_folder import RunFolder, digest_files

if TYPE_CHECKING:
    from lavic.data.schema import Conversation
    from lavic.launch.tune import TuneSettings
    from lavic.model.bundle import BundleInfo
    from lavic.model.item_store import ItemStore
    from lavic.model.loading import Backbone
    from lavic.train.recommendation.dataset import TuneDataset

TOKENS_PER_BATCH = 8192
"""Maximum number of tokens of a batch of lists that are ranked, where `loop.micro_tokens` does not say."""


class TuneStage(TrainingStage):
    """Stage 2: LoRA on the language model."""

    command = "tune"
    input_keys = ("store", "train", "valid")
    settings: TuneSettings

    def __init__(self, settings: TuneSettings, world: DistributedContext) -> None:
        """Opens the store and reads the conversations.

        Raises:
            DataError: The store is of another base model, or lacks an item.
            ConfigError: The hit rate is to select, and there is no list to measure it on.
        """
        from lavic.data.conversations import read_conversations
        from lavic.model import hub
        from lavic.model.item_store import ItemStore

        super().__init__(settings, world)
        self.store = ItemStore.open(settings.store)
        self.store.check_base(hub.fingerprint(hub.resolve(settings.model)))  # before 15 GB of the wrong model are read
        if settings.tokens == "items":
            self.store.check_adapter()
        rows = [
            read_conversations(file, candidates=settings.candidates, top=settings.top)
            for file in (settings.train, settings.valid)
        ]
        rows = [drop_empty_lists(part, settings.candidates, verbose=world.is_main) for part in rows]
        if settings.missing == "drop":
            rows = [drop_missing_items(part, self.store, settings.candidates, verbose=world.is_main) for part in rows]
        self.train, self.valid = rows
        self.ranked = listed_subset(self.valid, settings.candidates, settings.ranked_lists)
        if settings.select == "hit_rate" and not self.ranked:
            reason = (
                "--ranked-lists is 0" if not settings.ranked_lists else f"no list of {settings.valid} holds a target"
            )
            raise ConfigError(f"--select hit_rate: {reason}, so there is no hit rate to select by")

    @property
    def selecting_score(self) -> str | None:
        """The hit rate, where `select` says so."""
        return HIT_RATE if self.settings.select == "hit_rate" else None

    def inputs(self) -> Iterator[StageInput]:
        """The item store and the conversations."""
        manifest = self.store.folder / "manifest.json"
        yield StageInput(
            name="item store", path=self.settings.store, digest=digest_files([manifest]), manifest=manifest
        )
        for context, path in (("training", self.settings.train), ("validation", self.settings.valid)):
            yield StageInput(name=f"{context} set", path=path, digest=digest_files([path]), context=context)

    def load(self, run: TrainingRun) -> StageComponents:
        """The base model without its vision tower, the store's vision adapter merged in, and a language adapter."""
        import torch

        from lavic.model.loading import Backbone
        from lavic.model.lora import add_adapter, apply_adapter
        from lavic.train.input.shuffle_order import ShuffleOrder
        from lavic.train.recommendation.dataset import TuneDataset
        from lavic.train.recommendation.task import TuneTask

        settings = self.settings
        backbone = Backbone.load(settings.model, run.world.device(), vision=False)
        vision = self._vision()
        if settings.tokens == "items":
            self.store.check_geometry(backbone.geometry)
        if vision:
            apply_adapter(backbone, vision, "vision")

        def dataset(rows: Sequence[Conversation], shuffle: bool) -> TuneDataset:
            return TuneDataset(
                rows,
                self.store,
                backbone.encoder,
                candidates=settings.candidates,
                max_length=settings.max_length,
                tokens=settings.tokens,
                tokens_per_item=settings.tokens_per_item,
                none_share=settings.none_share,
                shuffle=shuffle,
                seed=settings.loop.seed,
            )

        train, valid = dataset(self.train, settings.shuffle), dataset(self.valid, False)
        if not len(train):
            raise DataError(f"{settings.train}: no conversation has a target")
        train.order = ShuffleOrder(len(train), settings.loop.seed)
        torch.manual_seed(settings.loop.seed)
        model = add_adapter(backbone, "language", settings.lora)
        task = TuneTask(model)
        scorer = self._scorer(backbone, run.world) if self.ranked else None
        return StageComponents(
            backbone=backbone, model=model, task=task, train=train, valid=valid, vision=vision, scorer=scorer
        )

    def _scorer(self, backbone: Backbone, world: DistributedContext) -> HitRateScorer:
        """Ranks the validation lists with the model in training."""
        from lavic.model.bundle import Bundle, BundleInfo
        from lavic.recommend.ranking.ranker import Ranker

        settings = self.settings
        # the adapter in training is in the backbone's layers: the ranker sees it as it is at the time
        info = BundleInfo.of(
            backbone, vision_adapter=self.store.manifest.vision_adapter, language_adapter=None, **self._shown()
        )
        bundle = Bundle(backbone, info)
        ranker = Ranker(bundle, self.store, tokens_per_batch=settings.loop.micro_tokens or TOKENS_PER_BATCH)
        return HitRateScorer(ranker, self.ranked, settings.candidates, world)

    def save_bundle(self, folder: Path, components: StageComponents) -> BundleInfo:
        """The bundle of both adapters."""
        from lavic.model.bundle import save_bundle

        return save_bundle(
            folder,
            components.backbone,
            vision=self._vision(),
            language=components.model,
            revision=self.settings.model.revision,
            weights=components.weights,
            **self._shown(),
        )

    def _shown(self) -> dict[str, Any]:
        """What a bundle records of how lists are shown."""
        settings = self.settings
        return {
            "tokens": settings.tokens,
            "max_length": settings.max_length,
            "tokens_per_item": max(settings.tokens_per_item, default=None),
            "none": settings.none_share > 0,
            "list_size": max(len(set(row.candidates[settings.candidates])) for row in self.train),
        }

    def completion_message(self, folder: RunFolder) -> str:
        """The next command."""
        command = shlex.join(["lavic", "evaluate", "--bundle", str(folder.bundle), "--store", str(self.settings.store)])
        return f"{folder.bundle}: done; next: {command} --test ..."

    def _vision(self) -> Path | None:
        """The vision adapter that made the store; None without item tokens."""
        return self.store.vision_adapter if self.settings.tokens == "items" else None


def drop_empty_lists(rows: Sequence[Conversation], key: str, *, verbose: bool) -> list[Conversation]:
    """The conversations whose list has an item: a search may find none, and a target alone teaches nothing.

    Raises:
        DataError: None is left.
    """
    kept = [row for row in rows if row.candidates[key]]
    file = rows[0].file
    if not kept:
        raise DataError(f"{file}: every list `{key}` is empty")
    if verbose and len(kept) < len(rows):
        print(f"{file}: {len(rows) - len(kept)} of {len(rows)} rows left out: their list `{key}` is empty")
    return kept


def drop_missing_items(
    rows: Sequence[Conversation], store: ItemStore, key: str, *, verbose: bool
) -> list[Conversation]:
    """The conversations that have a target in the store, without candidates and targets that it does not hold.

    Raises:
        DataError: None is left.
    """
    kept, dropped = [], 0
    for row in rows:
        targets = tuple(id for id in row.targets if id in store)
        stored_candidates = tuple(id for id in row.candidates[key] if id in store)
        dropped += len(row.candidates[key]) - len(stored_candidates)
        if targets and stored_candidates and len({*stored_candidates, *targets}) > 1:
            kept.append(replace(row, targets=targets, candidates={**row.candidates, key: stored_candidates}))
    file = rows[0].file
    if not kept:
        raise DataError(f"{file}: no conversation has a target and another candidate in {store.folder}")
    if verbose and (dropped or len(kept) < len(rows)):
        print(
            f"{file}: {len(rows) - len(kept)} of {len(rows)} rows and {dropped} candidates left out: not in the store"
        )
    return kept
