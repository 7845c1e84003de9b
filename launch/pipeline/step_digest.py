"""The inputs of a step's result, to detect changes: settings, input files, results of other steps.

OUT/stages.json has the settings and inputs of each step's last job.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lavic.config import flatten
from lavic.data.catalog import find_files
from lavic.data.conversations import file_stem
from lavic.data.descriptions import descriptions_path
from lavic.data.manifest import NAME, Manifest
from lavic.endpoint.settings import NO_EFFECT
from lavic.errors import DataError, LavicError
from lavic.launch.pipeline.dag import Step
from lavic.launch.pipeline.digest_cache import DigestCache
from lavic.launch.pipeline.job_registry import read_json_file
from lavic.launch.pipeline.settings import Stage, stage_of
from lavic.model.config import BaseModelSettings, ModelSettings
from lavic.model.hub import fingerprint, resolve
from lavic.storage.atomic import atomic_write
from lavic.train.run_folder import FREE

FILE = "stages.json"

_IRRELEVANT = ("out", "tracking", "nproc", "ray", "dry_run", "cache")
"""Settings that change no command's result."""
_IRRELEVANT_IN: dict[Stage, tuple[str, ...]] = {
    "crawl": ("fetch", "extend", "executor", "max_rejected", "min_success"),
    "describe": ("batch_size", "page", "examples", *(f"endpoint.{name}" for name in NO_EFFECT)),
    "distill": FREE,
    "embed": ("batch_size", "num_workers"),
    "tune-retriever": ("tokens_per_batch", "model.chat_template"),
    "retrieve": (
        *("executor", "index_parts", "dense.batch_size", "tokens.tokens_per_batch"),
        *(f"endpoint.{name}" for name in NO_EFFECT),
    ),
    "tune": FREE,
    "evaluate": ("overwrite", "tokens_per_batch", *(f"chat.{name}" for name in NO_EFFECT)),
}
"""Settings that change how a command works and not its result."""
_PATHS: dict[Stage, tuple[str, ...]] = {
    "crawl": ("items", "ids"),
    "verify": ("folder", "receipt"),
    "describe": ("shards",),
    "distill": ("shards", "valid"),
    "embed": ("shards", "adapter"),
    "tune-retriever": ("store", "train", "valid"),
    "retrieve": ("items", "conversations", "index", "store", "tokens.retriever"),
    "tune": ("store", "train", "valid"),
    "evaluate": ("bundle", "store", "test", "shards", "runs"),
}
"""Settings that name files: the files' content is compared, not their paths."""
_READS: dict[Stage, tuple[Stage, ...]] = {
    "distill": ("crawl", "describe"),
    "embed": ("crawl", "distill"),
    "tune-retriever": ("embed",),
    "retrieve": ("embed", "tune-retriever"),
    "tune": ("embed", "retrieve"),
    "evaluate": ("embed", "retrieve", "tune"),
}
"""Stages whose results a stage reads. `verify` and `describe` compare their set with its manifest themselves."""


@dataclass(frozen=True, kw_only=True)
class StepInputs:
    """The inputs of a step's result."""

    settings: Mapping[str, Any]
    """Settings that affect the result, by dotted name."""
    inputs: Mapping[str, str]
    """Digests of files from outside the pipeline."""
    results: Mapping[str, str] = field(default_factory=dict)
    """Digests of the results of other steps, if they exist."""

    def differences(self, current: StepInputs) -> Iterator[str]:
        """The differences of other inputs from these, as lines."""
        for key in sorted(self.settings.keys() & current.settings.keys()):  # other versions have other keys
            if self.settings[key] != current.settings[key]:
                yield f"{key} was {self.settings[key]}, is {current.settings[key]}"
        added = Counter(current.inputs.values()) - Counter(self.inputs.values())
        for file, digest in current.inputs.items():
            if digest in added:
                yield f"{file} has changed" if file in self.inputs else f"{file} is new"
        removed = Counter(self.inputs.values()) - Counter(current.inputs.values())
        for file, digest in self.inputs.items():
            if digest in removed and file not in current.inputs:
                yield f"{file} is no longer read"
        for name in self.results.keys() & current.results.keys():
            if self.results[name] != current.results[name]:
                yield f"{name} has another result"


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """The recorded inputs of a step's result."""

    made: StepInputs
    accepted: StepInputs | None = None
    """Inputs that differ from `made`, for which the user keeps the result (`--keep`)."""

    def differences(self, current: StepInputs) -> list[str]:
        """How the result's inputs differ from the current ones; empty if they do not, or if the result is kept."""
        if self.accepted and not list(self.accepted.differences(current)):
            return []
        return list(self.made.differences(current))


def read_records(out: Path) -> dict[str, StepRecord]:
    """The records of a pipeline by step; none without a file.

    Raises:
        DataError: The file is broken.
    """

    def parse(body: Any) -> dict[str, StepRecord]:
        return {
            name: StepRecord(**{key: StepInputs(**inputs) for key, inputs in record.items() if inputs is not None})
            for name, record in body["steps"].items()
        }

    return read_json_file(out / FILE, parse, "remove it to accept all results as they are") or {}


def write_records(out: Path, records: Mapping[str, StepRecord]) -> None:
    """Writes the records of a pipeline."""
    body = {"steps": {name: asdict(record) for name, record in records.items()}}
    atomic_write(out / FILE, json.dumps(body, indent=1, default=str) + "\n")


def current_inputs(step: Step, settings: Any, cache: DigestCache, results: Mapping[str, str]) -> StepInputs:
    """The current inputs of a step; `results`: digests of the results of the steps that are done, by step."""
    skipped = (*_IRRELEVANT, *_IRRELEVANT_IN.get(step.stage, ()), *_PATHS[step.stage])
    values = flatten(settings)
    compared = {
        key: value
        for key, value in values.items()
        if not any(key == name or key.startswith(f"{name}.") for name in skipped)
    }
    if step.stage == "evaluate":  # the names of the test sets are in its results
        compared["test"] = [text.partition("=")[0] if "=" in text else file_stem(text) for text in values["test"]]
    files = [file for pattern in step.inputs for file in matching_files(pattern)]
    files += [Path(text) for value in compared.values() for text in _possible_paths(value) if Path(text).is_file()]
    inputs = {str(file): cache.digest(file) for file in dict.fromkeys(files)}
    if base := _base_model_fingerprint(settings):
        inputs["the base model"] = base
    return StepInputs(
        settings=compared,
        inputs=inputs,
        results={name: digest for name, digest in results.items() if reads_result_of(step, name)},
    )


def reads_result_of(step: Step, name: str) -> bool:
    """Whether a step reads the result of the step called `name`."""
    return stage_of(name) in _READS.get(step.stage, ())


def result_digest(step: Step, cache: DigestCache) -> str:
    """The digest of a step's result; "" if no other step compares it."""
    try:
        if step.stage == "crawl":
            shards = Manifest.load(step.output, check=False).shards
            return _combined(shard.sha256 for shard in shards)
        if step.stage == "describe":
            manifest = Manifest.load(step.output, check=False)
            return _combined(cache.digest(descriptions_path(manifest.path(shard))) for shard in manifest.shards)
    except DataError:
        return ""
    if step.stage in ("distill", "tune"):
        return cache.digest(step.output / "bundle" / "bundle.json")
    if step.stage == "tune-retriever":
        return cache.digest(step.output / "bundle" / "retriever" / "retriever.json")
    if step.stage == "retrieve":
        return _combined(cache.digest(file) for file in sorted(step.output.glob("*.jsonl")))
    return cache.digest(step.output / NAME) if step.stage == "embed" else ""


def matching_files(pattern: str) -> Sequence[Path]:
    """The files of a path or a glob, by the rules of `lavic crawl`; may be empty."""
    path = Path(pattern)
    if path.exists() and not path.is_dir():
        return [path]
    try:
        return [Path(file) for file in find_files([pattern])]
    except DataError:
        return []


def with_results(record: StepRecord, results: Mapping[str, str]) -> StepRecord:
    """A record with results of other steps, unless it has them already."""
    return replace(record, made=replace(record.made, results={**results, **record.made.results}))


def _base_model_fingerprint(settings: Any) -> str:
    """The fingerprint of a base model in a local folder; one from Hugging Face is identified by name and revision."""
    model = getattr(settings, "model", None)
    if isinstance(model, BaseModelSettings) and model.name:
        model = ModelSettings(name=model.name)
    if not isinstance(model, ModelSettings):
        return ""
    try:
        is_local = model.name == "mini" or Path(model.name).expanduser().is_dir()
        return fingerprint(resolve(model)) if is_local else ""
    except (LavicError, OSError):
        return ""


def _combined(digests: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()[:16]


def _possible_paths(value: Any) -> Iterator[str]:
    """Texts in a setting that may be paths."""
    for text in value if isinstance(value, (list, tuple)) else (value,):
        if isinstance(text, str) and text and "\0" not in text and len(text) < 4096:
            yield text
