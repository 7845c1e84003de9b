"""From a result back to what it was made from: conversations, bundles and their adapters, store, shards, commit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lavic.storage.checksummed_json import digest_json
from lavic.tracking.run_metadata import run_tags
from lavic.tracking.tracker import Tracker
from lavic.train.run_folder import digest_files

if TYPE_CHECKING:
    from lavic.launch.evaluation.settings import EvaluateSettings
    from lavic.launch.evaluation.setup.evaluation_setup import EvaluationSetup


def lineage(setup: EvaluationSetup) -> dict[str, Any]:
    """The part `lineage` of `results.json`. Digests are those that MLflow has of the runs that made the parts.

    Returns:
        `commit` of this package, where known; `conversations`, `runs` and `items`: files with digests; `bundles` by
        arm: folder, base model and the digests of its adapters; `stores` by folder: the digests of the store, of the
        vision adapter that made it and of its sets of shards.
    """
    tags = run_tags()
    bundles: dict[str, Any] = {}
    stores: dict[str, Any] = {}
    for arm in setup.arms:
        from lavic.model.bundle import BundleInfo

        info = BundleInfo.read(arm.bundle)
        bundles[arm.name] = {
            "folder": str(arm.bundle),
            "base": info.base,
            "base_fingerprint": info.fingerprint,
            "vision_adapter": info.vision_adapter,
            "language_adapter": info.language_adapter if arm.language else None,
        }
        manifest = arm.store.manifest
        stores[str(arm.store.folder)] = {
            "digest": digest_files([arm.store.folder / "manifest.json"]),
            "vision_adapter": manifest.vision_adapter,
            "shards": list(manifest.shards),
        }
    return {
        "commit": tags.get("mlflow.source.git.commit"),
        "changed": tags.get("git.changed") == "true",
        "conversations": {
            test_set.name: {"file": str(test_set.file), "sha256": test_set.sha256} for test_set in setup.test_sets
        },
        "bundles": bundles,
        "stores": stores,
        "runs": {name: {"file": str(run.file), "digest": digest_files([run.file])} for name, run in setup.runs.items()},
    }


def record_lineage(
    tracker: Tracker, chosen: EvaluateSettings, setup: EvaluationSetup, made_from: dict[str, Any]
) -> None:
    """Records the inputs with their digests, under the names that the runs which made them have."""
    for test_set in setup.test_sets:
        tracker.dataset(test_set.name, test_set.sha256, test_set.file, context="evaluation")
    if chosen.store is not None:
        manifest = chosen.store / "manifest.json"
        tracker.dataset("item store", digest_files([manifest]), chosen.store, manifest=manifest)
    if setup.target_counts is not None and chosen.train is not None:
        tracker.dataset("training set", digest_files([chosen.train]), chosen.train, context="popularity")
    for name, run in setup.runs.items():
        tracker.dataset(f"run {name}", made_from["runs"][name]["digest"], run.file, context="other system")
    tags = {"digest.lineage": digest_json(made_from)[:16]}
    main = made_from["bundles"].get(setup.main)
    if main is not None:
        adapters = {"vision": main["vision_adapter"], "language": main["language_adapter"]}
        tags |= {f"adapter.{kind}": digest for kind, digest in adapters.items() if digest}
        tags["digest.base model"] = main["base_fingerprint"]
    for store in made_from["stores"].values():
        tags["digest.item store"] = store["digest"]
        if store["shards"]:
            tags["digest.shards"] = ",".join(digest[:16] for digest in store["shards"])
        break  # the main bundle's
    tracker.tag(tags)
