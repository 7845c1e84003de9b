"""What a step's result is made from, so that a change of it is noticed: settings, input files, other steps' results.

OUT/stages.json holds the settings and inputs of each step, as its last job got them.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lavic.data.catalog import find_files
from lavic.data.descriptions import descriptions_path
from lavic.data.manifest import NAME, Manifest
from lavic.errors import DataError, LavicError
from lavic.launch.pipeline.dag import Step
from lavic.launch.pipeline.digest_cache import Digests
from lavic.launch.pipeline.settings import Stage
from lavic.model.config import ModelSettings
from lavic.model.hub import fingerprint, resolve
from lavic.storage.atomic import atomic_write
from lavic.train.run_folder import FREE

FILE = "stages.json"

_ANYWHERE = ("out", "tracking", "nproc", "ray", "dry_run", "cache")
"""Settings that change no command's result."""
_SAME: dict[Stage, tuple[str, ...]] = {
    "crawl": ("fetch", "extend", "executor", "max_rejected", "min_success"),
    "describe": ("batch_size",),
    "distill": FREE,
    "embed": ("batch_size", "num_workers"),
    "tune": FREE,
    "evaluate": ("overwrite", "tokens_per_batch"),
}
"""Settings that change how a command works and not what it makes."""
_FILLED: dict[Stage, tuple[str, ...]] = {
    "crawl": ("items", "ids"),
    "verify": ("folder", "receipt"),
    "describe": ("shards",),
    "distill": ("shards", "valid"),
    "embed": ("shards", "adapter"),
    "tune": ("store", "train", "valid"),
    "evaluate": ("bundle", "store", "test", "shards", "runs"),
}
"""Settings that name files: their content is compared, not where they stand."""
_USES: dict[Stage, tuple[Stage, ...]] = {
    "distill": ("crawl", "describe"),
    "embed": ("crawl", "distill"),
    "tune": ("embed",),
    "evaluate": ("embed", "tune"),
}
"""Stages whose results a stage reads. `verify` and `describe` compare their set with its manifest by themselves."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a step's result is, or would be, made from."""

    settings: Mapping[str, Any]
    """Those that change the result, on one level."""
    inputs: Mapping[str, str]
    """Digests of files from outside the pipeline."""
    results: Mapping[str, str] = field(default_factory=dict)
    """Digests of the results of other steps; without those that were not there to be read yet."""

    def differences(self, wanted: Recipe) -> Iterator[str]:
        """What of this recipe is not as in another one, in words."""
        for key in sorted(self.settings.keys() & wanted.settings.keys()):  # another version may have others
            if self.settings[key] != wanted.settings[key]:
                yield f"{key} was {self.settings[key]}, is {wanted.settings[key]}"
        more = Counter(wanted.inputs.values()) - Counter(self.inputs.values())
        for file, digest in wanted.inputs.items():
            if digest in more:
                yield f"{file} has changed" if file in self.inputs else f"{file} is new"
        fewer = Counter(self.inputs.values()) - Counter(wanted.inputs.values())
        yield from (
            f"{file} is read no more" for file, d in self.inputs.items() if d in fewer and file not in wanted.inputs
        )
        for name in self.results.keys() & wanted.results.keys():
            if self.results[name] != wanted.results[name]:
                yield f"{name} has another result"


@dataclass(frozen=True, kw_only=True)
class Record:
    """What is known of how a step's result was made."""

    made: Recipe
    accepted: Recipe | None = None
    """Differs from `made`, and the user wants the result kept nevertheless."""

    def differences(self, wanted: Recipe) -> list[str]:
        """Why the result is not what is wanted now; empty where it is, or is to be kept."""
        found = list(self.made.differences(wanted))
        return [] if self.accepted and not list(self.accepted.differences(wanted)) else found


def read_records(out: Path) -> dict[str, Record]:
    """The records of a pipeline by step; none where there are none.

    Raises:
        DataError: The file is broken.
    """
    path = out / FILE
    if not path.is_file():
        return {}
    try:
        body = json.loads(path.read_text("utf-8"))["steps"]
        return {
            name: Record(**{key: Recipe(**recipe) for key, recipe in record.items() if recipe is not None})
            for name, record in body.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: broken ({error}); remove it: what is done is then taken as it is") from None


def write_records(out: Path, records: Mapping[str, Record]) -> None:
    """Keeps the records of a pipeline."""
    body = {"steps": {name: asdict(record) for name, record in records.items()}}
    atomic_write(out / FILE, json.dumps(body, indent=1, default=str) + "\n")


def recipe(step: Step, known: Mapping[str, Any], digests: Digests, results: Mapping[str, str]) -> Recipe:
    """What a step would be made from now.

    Args:
        step: The step.
        known: Its settings, resolved.
        digests: Of files.
        results: Digests of the results of steps that are done, by step.
    """
    left_out = (*_ANYWHERE, *_SAME.get(step.stage, ()), *_FILLED[step.stage])
    settings = {
        key: value
        for key, value in _flat(known)
        if not any(key == name or key.startswith(f"{name}.") for name in left_out)
    }
    if step.stage == "evaluate":  # the names of the tests are in its results
        settings["test"] = [word.partition("=")[0] if "=" in word else Path(word).stem for word in known["test"]]
    files = [file for pattern in step.reads for file in matches(pattern)]
    files += [Path(word) for value in settings.values() for word in _words(value) if Path(word).is_file()]
    inputs = {str(file): digests.of(file) for file in dict.fromkeys(files)}
    if base := _base(known):
        inputs["the base model"] = base
    return Recipe(
        # as they come back from the file
        settings=json.loads(json.dumps(settings, default=str)),
        inputs=inputs,
        results={name: digest for name, digest in results.items() if uses(step, name)},
    )


def uses(step: Step, name: str) -> bool:
    """Whether a step reads the result of another."""
    return name.partition("-")[0] in _USES.get(step.stage, ())


def result_digest(step: Step, digests: Digests) -> str:
    """Of a step's whole result: equal ones are of no consequence to those who read it; "" where nobody does."""
    try:
        if step.stage == "crawl":
            shards = Manifest.load(step.place, check=False).shards
            return _combined(shard.sha256 for shard in shards)
        if step.stage == "describe":
            manifest = Manifest.load(step.place, check=False)
            return _combined(digests.of(descriptions_path(manifest.path(shard))) for shard in manifest.shards)
    except DataError:
        return ""
    if step.stage in ("distill", "tune"):
        return digests.of(step.place / "bundle" / "bundle.json")
    return digests.of(step.place / NAME) if step.stage == "embed" else ""


def matches(pattern: str) -> Sequence[Path]:
    """The files that a path or a glob names, as the crawl finds them; none where there are none."""
    path = Path(pattern)
    if path.exists() and not path.is_dir():
        return [path]
    try:
        return [Path(file) for file in find_files([pattern])]
    except DataError:
        return []


def with_results(record: Record, results: Mapping[str, str]) -> Record:
    """A record that also says which results of other steps were read, where it did not say so before."""
    return replace(record, made=replace(record.made, results={**results, **record.made.results}))


def _base(known: Mapping[str, Any]) -> str:
    """The fingerprint of a base model that lies here; one from Hugging Face is known by its name and revision."""
    if not isinstance(known.get("model"), Mapping):
        return ""
    try:
        model = ModelSettings(**known["model"])
        here = model.name == "mini" or Path(model.name).expanduser().is_dir()
        return fingerprint(resolve(model)) if here else ""
    except (LavicError, OSError, TypeError, ValueError):
        return ""


def _combined(digests: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()[:16]


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _words(value: Any) -> Iterator[str]:
    """The texts in a setting that could name a file."""
    for each in value if isinstance(value, (list, tuple)) else (value,):
        if isinstance(each, str) and each and "\0" not in each and len(each) < 4096:
            yield each
