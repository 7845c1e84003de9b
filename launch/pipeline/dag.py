"""A pipeline as steps: the commands it consists of, what each needs, and the one folder that they fill.

OUT/pipeline.yaml      the settings, resolved
    shards/train       photos of the catalogue; shards/valid: those that validate stage 1
    runs/distill       stage 1
    store              item tokens
    runs/tune          stage 2
    evaluation         results and report
    logs               what the jobs say
    jobs.json          which job does what
    stages.json        the settings and inputs that each step was made from
    stale              results that were made again with others
    metrics.jsonl      the pipeline's own journal: its MLflow run is the parent of the stages'
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lavic.cli import settings_class
from lavic.config import parse_values
from lavic.config.loader import value_at
from lavic.config.schema import Keys, Schema
from lavic.config.yaml_file import find_config
from lavic.errors import ConfigError, LavicError
from lavic.launch.cli_args import absolute, absolute_pattern, typed
from lavic.launch.pipeline.settings import STAGES, PhotoSettings, PhotosSettings, PipelineSettings, Stage, StageSettings

_BASE = ("model", "name")
"""The setting that is a path where it names a folder."""
_ADDED = frozenset({"verify", "describe"})
"""Stages that a pipeline may be without: they make nothing that another one cannot start without."""


@dataclass(frozen=True)
class Step:
    """One command of the pipeline: one job."""

    name: str
    """Unique in the pipeline: `crawl-train`."""
    stage: Stage
    """The stage it belongs to, which is also its command's name."""
    words: tuple[str, ...]
    """What follows `lavic COMMAND`."""
    needs: tuple[str, ...]
    """Steps whose files it reads."""
    place: Path
    """The folder, or for `verify` the receipt, that it makes."""
    reads: tuple[str, ...] = ()
    """Files and globs from outside the pipeline that must be there."""
    chosen: bool = True
    """Whether its stage is one of the pipeline's; what another one makes must stand already."""


class Layout:
    """Where a pipeline's files stand; paths are absolute, since a job may run anywhere."""

    def __init__(self, out: Path) -> None:
        self.out = absolute(out)
        if bad := re.search(r"[\\\n\r\0]", str(self.out)):
            raise ConfigError(f"--out {str(self.out)!r}: SLURM cannot write logs below a name with {bad[0]!r}")
        self.store = self.out / "store"
        self.runs = self.out / "runs"
        self.distill = self.runs / "distill"
        self.tune = self.runs / "tune"
        self.evaluation = self.out / "evaluation"
        self.logs = self.out / "logs"
        self.stale = self.out / "stale"

    def shards(self, split: str) -> Path:
        """A set of photos."""
        return self.out / "shards" / split

    def receipt(self, split: str) -> Path:
        """What `lavic verify` leaves when a set is as its manifest says."""
        return self.out / "shards" / f"{split}.verified.json"


def plan(chosen: PipelineSettings, *, files: bool = True) -> list[Step]:
    """The pipeline's steps, each after those it needs.

    Args:
        chosen: The pipeline.
        files: Also see that the stages' configurations are there.

    Raises:
        ConfigError: A setting that one of the chosen stages needs is missing, or is the pipeline's own to fill in.
    """
    steps: list[Step] = []
    for draft in _drafts(chosen, Layout(chosen.out)):
        if draft.stage not in chosen.stages and draft.stage in _ADDED:
            continue
        there, of = {step.name for step in steps}, getattr(chosen, draft.stage)
        steps.append(
            Step(
                name=f"{draft.stage}-{draft.part}" if draft.part else draft.stage,
                stage=draft.stage,
                words=(*draft.lead, *_words(draft.stage, of, draft.own, files=files)),
                needs=tuple(need for need in draft.needs if need in there),
                place=draft.place,
                reads=(
                    *(str(file) for file in draft.reads if "://" not in str(file)),
                    *(str(absolute(path)) for keys, path in _paths(draft.stage, of) if files and keys != _BASE),
                ),
                chosen=draft.stage in chosen.stages,
            )
        )
    return _direct(steps)


@dataclass(frozen=True, kw_only=True)
class _Draft:
    """A step that any pipeline may have."""

    stage: Stage
    part: str = ""
    """The set of photos it is for."""
    own: dict[str, Any]
    """Settings that the pipeline fills in."""
    place: Path
    needs: tuple[str, ...] = ()
    lead: tuple[str, ...] = ()
    """Words without a flag."""
    reads: tuple[Path | str, ...] = ()


def _drafts(chosen: PipelineSettings, at: Layout) -> Iterator[_Draft]:
    """Every step, each after those it needs; of needs, those that may be left out are followed by theirs."""
    splits = {"train": chosen.photos.train, "valid": chosen.photos.valid}
    own: dict[str, Any]
    needs: tuple[str, ...]
    reads: tuple[Path | str, ...]
    before: tuple[str, ...] = ()
    for split, photos in splits.items():
        if not photos.items:
            _demand(chosen, "crawl", f"photos.{split}.items")
        items = tuple(absolute_pattern(item) for item in photos.items)
        ids = {"ids": absolute(photos.ids)} if photos.ids else {}
        own = {"items": items, "out": at.shards(split), "split": split, **ids}
        reads = (*items, *ids.values())
        # one after the other: two crawls at once would ask one host twice as often as was meant
        yield _Draft(stage="crawl", part=split, own=own, place=at.shards(split), needs=before, reads=reads)
        before = (f"crawl-{split}",)
    for split in splits:
        receipt, lead = at.receipt(split), (str(at.shards(split)),)
        needs = (f"crawl-{split}",)
        yield _Draft(stage="verify", part=split, own={"receipt": receipt}, place=receipt, needs=needs, lead=lead)
    for split, photos in splits.items():
        if not photos.described:
            own, needs = {"shards": at.shards(split)}, (f"verify-{split}", f"crawl-{split}")
            yield _Draft(stage="describe", part=split, own=own, place=at.shards(split), needs=needs)
    ready = tuple(f"{stage}-{split}" for split in splits for stage in ("describe", "verify", "crawl"))
    train, valid = at.shards("train"), at.shards("valid")
    own = {"shards": train, "valid": valid, "out": at.distill}
    yield _Draft(stage="distill", own=own, place=at.distill, needs=ready)
    own = {"shards": [train, valid], "adapter": at.distill, "out": at.store}
    yield _Draft(stage="embed", own=own, place=at.store, needs=("distill", *ready))
    talks = chosen.conversations
    given = {key: absolute(file) for key, file in (("train", talks.train), ("valid", talks.valid)) if file}
    for key in {"train", "valid"} - given.keys():
        _demand(chosen, "tune", f"conversations.{key}")
    own = {"store": at.store, **given, "out": at.tune}
    yield _Draft(stage="tune", own=own, place=at.tune, needs=("embed",), reads=tuple(given.values()))
    tests = [_test(word) for word in talks.test]
    if not tests:
        _demand(chosen, "evaluate", "conversations.test")
    own = {
        "bundle": at.tune / "bundle",
        "store": at.store,
        "test": [f"{name}={file}" if name else str(file) for name, file in tests],
        "shards": [train],
        "runs": [at.distill, at.tune],
        "out": at.evaluation,
    }
    needs = ("tune", "embed")
    yield _Draft(stage="evaluate", own=own, place=at.evaluation, needs=needs, reads=tuple(file for _, file in tests))


def _demand(chosen: PipelineSettings, stage: Stage, key: str) -> None:
    if stage in chosen.stages:
        raise ConfigError(f"{key} is missing: files that `{stage}` reads; name them or leave the stage out of `stages`")


def rooted(chosen: PipelineSettings) -> PipelineSettings:
    """The settings with paths that mean the same from any folder, also those of the stages and of their yaml files."""

    def file(path: Path | None) -> Path | None:
        return absolute(path) if path else None

    def photos(of: PhotoSettings) -> PhotoSettings:
        return replace(of, items=tuple(absolute_pattern(item) for item in of.items), ids=file(of.ids))

    talks = chosen.conversations
    tests = (_test(word) for word in talks.test)
    test = tuple(f"{name}={path}" if name else str(path) for name, path in tests)
    stages: dict[str, Any] = {stage: _rooted_stage(stage, getattr(chosen, stage)) for stage in STAGES}
    return replace(
        chosen,
        out=absolute(chosen.out),
        photos=PhotosSettings(train=photos(chosen.photos.train), valid=photos(chosen.photos.valid)),
        conversations=replace(talks, train=file(talks.train), valid=file(talks.valid), test=test),
        slurm=replace(chosen.slurm, scripts=file(chosen.slurm.scripts)),
        **stages,
    )


def _rooted_stage(stage: Stage, chosen: StageSettings) -> StageSettings:
    """A stage's settings, each relative path of them or of their yaml file replaced by an absolute one."""
    if chosen.config and Path(chosen.config).is_file():
        chosen = replace(chosen, config=str(absolute(Path(chosen.config))))
    given = {keys: str(absolute(path)) for keys, path in _paths(stage, chosen) if not path.is_absolute()}
    return replace(chosen, settings=_laid_over(chosen.settings, given)) if given else chosen


def _paths(stage: Stage, chosen: StageSettings) -> Iterator[tuple[Keys, Path]]:
    """The files and folders that a stage's settings or its yaml file name."""
    words = [*(["--config", chosen.config] if chosen.config else []), *typed(chosen.settings)]
    kind = settings_class(stage)
    try:
        given = parse_values(kind, words, command=stage)
    except LavicError:  # the step's check says what is wrong, and with which step
        return
    schema = Schema(kind, stage)
    for keys, leaf in schema.leaves.items():
        value = value_at(given, keys)
        is_base = keys == _BASE and value != "mini" and Path(str(value)).expanduser().is_dir()
        if value and (leaf.type is Path or is_base) and value != schema.defaults.get(keys):
            yield keys, Path(value)


def _laid_over(settings: Mapping[str, Any], paths: Mapping[Keys, str]) -> dict[str, Any]:
    """Settings with some values replaced or added."""
    nested: dict[str, Any] = {}
    for key, value in settings.items():
        under = {keys[1:]: path for keys, path in paths.items() if keys[0] == key.replace("-", "_") and keys[1:]}
        nested[key.replace("-", "_")] = _laid_over(value, under) if isinstance(value, Mapping) else value
    for keys, path in paths.items():
        here = nested
        for key in keys[:-1]:
            here = here.setdefault(key, {})
        here[keys[-1]] = path
    return nested


def choose(steps: Sequence[Step], chosen: PipelineSettings) -> list[Step]:
    """The steps that `--only` and `--from` leave.

    Raises:
        ConfigError: A stage that is not in the pipeline.
    """
    flags = {"--only": chosen.only, "--from": (chosen.from_,) if chosen.from_ else (), "--force": chosen.force}
    for flag, stages in flags.items():
        for stage in stages:
            if stage not in chosen.stages:
                raise ConfigError(f"{flag} {stage}: not in this pipeline's stages ({', '.join(chosen.stages)})")
    kept = [step for step in steps if step.chosen and (not chosen.only or step.stage in chosen.only)]
    if chosen.from_:
        first = STAGES.index(chosen.from_)
        kept = [step for step in kept if STAGES.index(step.stage) >= first]
    return kept


def _direct(steps: Sequence[Step]) -> list[Step]:
    """The steps without the needs that another need implies."""
    above: dict[str, set[str]] = {}
    for step in steps:
        above[step.name] = {*step.needs, *(far for need in step.needs for far in above[need])}
    return [
        replace(step, needs=tuple(n for n in step.needs if not any(n in above[m] for m in step.needs if m != n)))
        for step in steps
    ]


def _words(stage: Stage, chosen: StageSettings, own: dict[str, Any], *, files: bool) -> list[str]:
    """A command's words: its yaml, the user's settings, and what the pipeline fills in."""
    for key in chosen.settings:
        if key.replace("-", "_") in own:
            raise ConfigError(f"{stage}.settings.{key}: the pipeline fills that in; remove it")
    words: list[str] = []
    if chosen.config:
        file = find_config(chosen.config) if files else Path(chosen.config)
        words = ["--config", str(absolute(file)) if Path(chosen.config).is_file() else chosen.config]
    return [*words, *typed(own), *typed(chosen.settings)]


def _test(word: str) -> tuple[str, Path]:
    """NAME=FILE or FILE, as `lavic evaluate --test` reads it."""
    name, mark, file = word.partition("=")
    return (name, absolute(Path(file))) if mark and "/" not in name else ("", absolute(Path(word)))
