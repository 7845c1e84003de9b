"""The run of `lavic tune-retriever`: features by all ranks, then the heads by rank 0."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from lavic.config import flatten
from lavic.distributed.context import DistributedContext
from lavic.distributed.failure import show_error_first
from lavic.distributed.signals import StopRequest
from lavic.errors import DataError
from lavic.launch.training.retriever_data import RetrieverData
from lavic.storage.checksummed_json import digest_json
from lavic.tracking.tracker import Tracker
from lavic.train.run_folder import RESULT, RunFolder, write_on_rank_0

if TYPE_CHECKING:
    from lavic.launch.tune_retriever import TuneRetrieverSettings
    from lavic.model.two_tower.head import TwoTowerHead
    from lavic.train.retrieval.feature_cache import FeatureCache
    from lavic.train.retrieval.head_trainer import TrainedHead

log = logging.getLogger(__name__)

COMMAND = "tune-retriever"
_INPUT_KEYS = ("store", "train", "valid", "tokens_per_batch")
_PATIENCE_S = 7 * 24 * 3600.0
"""How long ranks wait for rank 0, which trains the heads alone."""


def run(settings: TuneRetrieverSettings, argv: Sequence[str] | None) -> int:
    """Runs the command; returns its exit code."""
    world = DistributedContext.from_env()
    if world.must_start(settings.nproc):
        from lavic.launch.ranks import local

        return local.run(COMMAND, list(argv or ()), settings.nproc)
    with StopRequest() as stop:
        data = RetrieverData.read(settings, verbose=world.is_main)
        with RunFolder(settings, command=COMMAND, world=world, free=_INPUT_KEYS) as folder:
            if folder.done:
                if world.is_main:
                    folder.check_inputs(data.digests(settings))
                    print(f"{settings.out}: already complete, {settings.out / RESULT}")
                return 0
            with (
                world.process_group(timeout_s=_PATIENCE_S),
                Tracker.open(settings.out, settings.tracking, main=world.is_main) as tracker,
                show_error_first(COMMAND),
            ):
                tracker.start(COMMAND, flatten(settings))
                RetrieverRun(settings, data, folder, tracker, world, stop).run()
    return 0


@dataclass(frozen=True)
class RetrieverRun:
    """One run, from its features to its bundle. Every rank has one."""

    settings: TuneRetrieverSettings
    data: RetrieverData
    folder: RunFolder
    tracker: Tracker
    world: DistributedContext
    stop: StopRequest

    def run(self) -> None:
        """Computes what is missing. Collective."""
        from lavic.model.loading import Backbone
        from lavic.model.lora import apply_adapter
        from lavic.model.two_tower.features import FeatureExtractor
        from lavic.train.retrieval.feature_cache import FeatureCache

        settings, data, world = self.settings, self.data, self.world
        self.stop.raise_if_requested(world)
        backbone = Backbone.load(settings.model, world.device(), vision=False)
        adapter = data.store.vision_adapter if settings.tokens == "items" else None
        if settings.tokens == "items":
            data.store.check_geometry(backbone.geometry)
        if adapter:
            apply_adapter(backbone, adapter, "vision")
        extractor = FeatureExtractor(
            backbone,
            tokens=settings.tokens,
            max_length=settings.max_length,
            tokens_per_batch=settings.tokens_per_batch,
        )
        digests = data.digests(settings)  # before the work: an input may change or be removed during it
        identity = self._identity(digests, backbone.fingerprint, backbone.encoder.version, str(backbone.model.dtype))
        cache = FeatureCache(self.folder.folder / "features", identity, main=world.is_main)
        world.barrier()
        rows = [*data.train, *data.valid]
        cache.compute("queries", len(rows), lambda part: extractor.queries([rows[n] for n in part]), world, self.stop)
        items = data.items
        cache.compute(
            "items",
            len(items),
            lambda part: extractor.items(data.store, [items[n] for n in part]),
            world,
            self.stop,
        )

        def train_and_save() -> None:
            from lavic.model.bundle import save_bundle

            trained = self._train(cache, identity)
            if trained is None:
                return
            save_bundle(
                self.folder.bundle,
                backbone,
                vision=adapter,
                tokens=settings.tokens,
                max_length=settings.max_length,
                revision=settings.model.revision,
            )
            self._finish(trained, digests)

        write_on_rank_0(self.folder.bundle, train_and_save, world)
        self.stop.raise_if_requested(world)

    def _identity(self, digests: Mapping[str, str], base: str, prompt_version: str, dtype: str) -> str:
        """Digest of what the features are made from; recorded with the run."""
        settings, data = self.settings, self.data
        if self.world.is_main:
            manifest = data.store.folder / "manifest.json"
            self.tracker.dataset("item store", digests["item store"], settings.store, manifest=manifest)
            for context, path in (("training", settings.train), ("validation", settings.valid)):
                self.tracker.dataset(f"{context} set", digests[f"{context} set"], path, context=context)
        made_from = {
            "item store": digests["item store"],
            "train": digests["training set"],
            "valid": digests["validation set"],
            "base": base,
            "prompt": prompt_version,
            "dtype": dtype,
            "tokens": settings.tokens,
            "max_length": settings.max_length,
            "items": digest_json({"ids": self.data.items}),
        }
        return digest_json(made_from)[:16]

    def _train(self, cache: FeatureCache, identity: str) -> TrainedHead | None:
        """Trains the heads that are missing; None after a request to stop, which keeps those that are done."""
        from lavic.model.two_tower.folds import FINAL, fold_of, submission_hashes
        from lavic.model.two_tower.head import load_head, read_metadata, save_head
        from lavic.model.two_tower.retriever import head_file
        from lavic.train.retrieval.head_trainer import Features, HeadTrainer, TrainedHead, recall_at
        from lavic.train.retrieval.pairs import Pairs

        settings, data = self.settings, self.data
        queries = cache.read("queries", len(data.train) + len(data.valid))
        features = Features(queries=queries[: len(data.train)], items=cache.read("items", len(data.items)))
        row_of_item = {id: row for row, id in enumerate(data.items)}
        pairs, valid = Pairs.of(data.train, row_of_item), Pairs.of(data.valid, row_of_item)
        submissions = submission_hashes(data.train)
        folds = [fold_of(row, submissions, settings.head.folds) for row in data.train]
        if settings.head.folds and len(set(folds)) < 2:
            raise DataError(f"{settings.train}: its conversations are in one fold: use more of them, or --head.folds 0")
        made_from = {"features": identity, "head": asdict(settings.head)}
        heads = self.folder.folder / "heads"
        heads.mkdir(exist_ok=True)
        sizes = {"dim": settings.head.dim, "hidden": settings.head.hidden}
        sizes |= {"query_features": features.queries.shape[1], "item_features": features.items.shape[1]}
        final: TrainedHead | None = None
        for fold in (FINAL, *range(settings.head.folds)):
            name, file = "" if fold == FINAL else f"fold-{fold}/", heads / head_file(fold)
            metadata = read_metadata(file)
            made_by = digest_json({**made_from, **({} if fold == FINAL else {"schedule": "of the final head"})})
            if metadata.get("made_by") == made_by:
                if fold == FINAL:
                    recall = {int(cutoff): value for cutoff, value in metadata["recall"].items()}
                    final = TrainedHead(head=load_head(file, **sizes), step=metadata["step"], recall=recall)
                continue

            def record(step: int, name: str = name, **numbers: float) -> None:
                self.tracker.log(step, **{f"{name}{key}": value for key, value in numbers.items()})

            def validate(head: TwoTowerHead) -> dict[int, float]:
                return recall_at(head, queries[len(data.train) :], features.items, valid)

            trainer = HeadTrainer(
                settings.head, features, device=self.world.device(), log=record, stop=lambda: self.stop.requested
            )
            trained = trainer.train(
                pairs if fold == FINAL else pairs.without([other == fold for other in folds]),
                seed=name,
                validate=validate if fold == FINAL else None,
                # as the final head, so that at the same step the learning rate is the same
                total_steps=settings.head.total_steps(len(pairs)),
                last_step=final.step if final else None,
            )
            if trained is None:
                return None
            save_head(
                trained.head,
                file,
                {"made_by": made_by, "step": trained.step, "recall": trained.recall},
            )
            if fold == FINAL:
                final = trained
                log.info("%s", _recall_text(trained))
        return final

    def _finish(self, trained: TrainedHead, digests: Mapping[str, str]) -> None:
        """Puts the heads into the bundle and ends the run. On rank 0."""
        from lavic.model.two_tower.folds import FINAL, submission_hashes
        from lavic.model.two_tower.retriever import head_file, save_retriever

        settings, bundle, head = self.settings, self.folder.bundle, self.settings.head
        info = save_retriever(
            bundle,
            {fold: self.folder.folder / "heads" / head_file(fold) for fold in (FINAL, *range(head.folds))},
            submission_hashes(self.data.train),
            dim=head.dim,
            hidden=head.hidden,
            max_length=settings.max_length,
        )
        self.tracker.tag({"retriever": info.digest[:16]})
        for name in ("config.yaml", "bundle"):
            self.tracker.artifact(self.folder.folder / name)
        recall = {f"recall_{cutoff}": value for cutoff, value in trained.recall.items()}
        result = {"command": COMMAND, "best_step": trained.step, "items": len(self.data.items), **recall}
        self.folder.finish(result, digests)
        next_command = shlex.join(["lavic", "retrieve", "--methods", "tokens", "--tokens.retriever", str(settings.out)])
        print(f"{bundle}: done, {_recall_text(trained)}; next: {next_command} --store {settings.store} ...")


def _recall_text(trained: TrainedHead) -> str:
    recall = ", ".join(f"recall@{cutoff} {value:.3f}" for cutoff, value in trained.recall.items())
    return f"{recall} after {trained.step} steps"
