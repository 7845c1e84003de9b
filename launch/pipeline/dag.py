"""A pipeline as a graph of steps: the command that each runs, the steps that it needs, the folder that it fills.

OUT/pipeline.yaml      the settings, resolved
    shards/train       photos of the catalogue; shards/valid: those that validate stage 1
    runs/distill       stage 1
    store              item tokens
    runs/retriever     the retriever of item tokens
    retrieval          conversations with candidate lists; retrieval/index: what they are searched with
    runs/tune          stage 2
    evaluation         results and report
    logs               output of the jobs
    jobs.json          the last job of each step
    stages.json        settings and inputs that each step's result was made from
    stale              results that were replaced by newer ones
    metrics.jsonl      the pipeline's own journal: its MLflow run is the parent of the stages' runs
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lavic.config.cli_args import absolute, to_args
from lavic.config.yaml_file import find_config
from lavic.data.conversations import set_names
from lavic.errors import ConfigError
from lavic.launch.pipeline.settings import (
    BASE_MODEL,
    RETRIEVAL,
    STAGES,
    PipelineSettings,
    Stage,
    StageSettings,
    named_paths,
    named_test,
    stage_settings,
    stage_values,
)

_OPTIONAL = frozenset({"verify", "describe", *RETRIEVAL})
"""Stages without which the others read something else."""
_NOT_GIVEN = "not-given"
"""An input of a stage that is not run: its settings must still be valid, to ask whether its result is complete."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command of the pipeline: one job."""

    name: str
    """Unique in the pipeline: `crawl-train`."""
    stage: Stage
    """Its stage, which is also the name of its command."""
    positional: tuple[str, ...] = ()
    """Arguments without a flag."""
    filled_in: Mapping[str, Any] = field(default_factory=dict)
    """Settings that the pipeline fills in."""
    args: tuple[str, ...] = ()
    """All arguments after `lavic STAGE`."""
    needs: tuple[str, ...] = ()
    """Steps that must have ended before it starts."""
    output: Path
    """The folder, or for `verify` the receipt file, that it makes."""
    inputs: tuple[str, ...] = ()
    """Files and globs from outside the pipeline that must exist."""
    selected: bool = True
    """Whether its stage is one of the pipeline's. If not, its result must exist where another step needs it."""

    @property
    def output_args(self) -> tuple[str, ...]:
        """The arguments that the pipeline fills in: where the result is, independent of the user's settings."""
        return (*self.positional, *to_args(self.filled_in))


class Layout:
    """Absolute paths of a pipeline's files."""

    def __init__(self, out: Path) -> None:
        self.out = absolute(out)
        if match := re.search(r"[\\\n\r\0]", str(self.out)):
            raise ConfigError(
                f"--out {str(self.out)!r}: SLURM cannot write logs to a path with {match[0]!r}; choose another folder"
            )
        self.store = self.out / "store"
        self.runs = self.out / "runs"
        self.distill = self.runs / "distill"
        self.retriever = self.runs / "retriever"
        self.retrieval = self.out / "retrieval"
        self.tune = self.runs / "tune"
        self.evaluation = self.out / "evaluation"
        self.logs = self.out / "logs"
        self.stale = self.out / "stale"

    def shards(self, split: str) -> Path:
        """A set of photos."""
        return self.out / "shards" / split

    def receipt(self, split: str) -> Path:
        """The file that `lavic verify` writes when a set matches its manifest."""
        return self.out / "shards" / f"{split}.verified.json"


def plan_steps(pipeline: PipelineSettings, *, find_configs: bool = True) -> list[Step]:
    """The pipeline's steps, each after those it needs.

    With `find_configs` the stages' yaml files must exist, and the files that they name are listed as inputs.

    Raises:
        ConfigError: A setting that a selected stage needs is missing, or one is set that the pipeline fills in.
    """
    steps: list[Step] = []
    for step in _all_steps(pipeline, Layout(pipeline.out)):
        selected = step.stage in pipeline.stages
        if not selected and step.stage in _OPTIONAL:
            continue
        planned, chosen = {other.name for other in steps}, stage_settings(pipeline, step.stage)
        inputs = [file for file in step.inputs if "://" not in file]
        if find_configs:
            inputs += [str(absolute(path)) for keys, path in named_paths(step.stage, chosen) if keys != BASE_MODEL]
        args = (*step.positional, *_stage_args(step.stage, chosen, step.filled_in, find_configs=find_configs))
        needs = tuple(need for need in step.needs if need in planned)
        steps.append(replace(step, args=args, needs=needs, inputs=tuple(inputs), selected=selected))
    return _without_implied_needs(steps)


def _all_steps(pipeline: PipelineSettings, layout: Layout) -> Iterator[Step]:
    """The steps that a pipeline may have, without their arguments; each after those it needs.

    `needs` names optional steps first, then what remains without them.
    """
    splits = {"train": pipeline.photos.train, "valid": pipeline.photos.valid}
    previous: tuple[str, ...] = ()
    for split, photos in splits.items():
        if not photos.items:
            _require(pipeline, "crawl", f"photos.{split}.items")
        ids = {"ids": photos.ids} if photos.ids else {}
        # one crawl after the other: two at once would double the request rate that each host sees
        yield Step(
            name=f"crawl-{split}",
            stage="crawl",
            filled_in={"items": photos.items or (_NOT_GIVEN,), "out": layout.shards(split), "split": split, **ids},
            output=layout.shards(split),
            needs=previous,
            inputs=(*photos.items, *map(str, ids.values())),
        )
        previous = (f"crawl-{split}",)
    for split in splits:
        receipt = layout.receipt(split)
        yield Step(
            name=f"verify-{split}",
            stage="verify",
            filled_in={"receipt": receipt},
            output=receipt,
            needs=(f"crawl-{split}",),
            positional=(str(layout.shards(split)),),
        )
    for split, photos in splits.items():
        if not photos.described:
            yield Step(
                name=f"describe-{split}",
                stage="describe",
                filled_in={"shards": layout.shards(split)},
                output=layout.shards(split),
                needs=(f"verify-{split}", f"crawl-{split}"),
            )
    photo_steps = tuple(f"{stage}-{split}" for split in splits for stage in ("describe", "verify", "crawl"))
    train, valid = layout.shards("train"), layout.shards("valid")
    yield Step(
        name="distill",
        stage="distill",
        filled_in={"shards": train, "valid": valid, "out": layout.distill},
        output=layout.distill,
        needs=photo_steps,
    )
    yield Step(
        name="embed",
        stage="embed",
        filled_in={"shards": [train, valid], "adapter": layout.distill, "out": layout.store},
        output=layout.store,
        needs=("distill", *photo_steps),
    )
    yield from _conversation_steps(pipeline, layout)


def _conversation_steps(pipeline: PipelineSettings, layout: Layout) -> Iterator[Step]:
    """The steps that read conversations."""
    train = layout.shards("train")
    files = {"train": pipeline.conversations.train, "valid": pipeline.conversations.valid}
    provided = {key: file for key, file in files.items() if file}
    tests = [named_test(text) for text in pipeline.conversations.test]
    for stage in ("tune-retriever", "retrieve", "tune"):
        for key in files.keys() - provided.keys():
            _require(pipeline, stage, f"conversations.{key}")
    yield Step(
        name="tune-retriever",
        stage="tune-retriever",
        filled_in={"store": layout.store, **dict.fromkeys(files, _NOT_GIVEN), **provided, "out": layout.retriever},
        output=layout.retriever,
        needs=("embed",),
        inputs=tuple(map(str, provided.values())),
    )
    conversation_files = tuple(dict.fromkeys([*provided.values(), *(file for _, file in tests)]))
    retriever = {"tokens.retriever": layout.retriever} if "tune-retriever" in pipeline.stages else {}
    photos = (*pipeline.photos.train.items, *pipeline.photos.valid.items)
    if not photos:
        _require(pipeline, "retrieve", "photos.train.items")
    yield Step(
        name="retrieve",
        stage="retrieve",
        filled_in={
            "items": tuple(dict.fromkeys(photos)) or (_NOT_GIVEN,),
            "conversations": conversation_files or (_NOT_GIVEN,),
            "out": layout.retrieval,
            "index": layout.retrieval / "index",
            "store": layout.store,
            **retriever,
        },
        output=layout.retrieval,
        needs=("tune-retriever", "embed"),
        inputs=(*photos, *map(str, conversation_files)),
    )
    candidates_arg: dict[str, Any] = {}
    if "retrieve" in pipeline.stages:  # the same conversations, with the lists that it makes
        if len({*(names := set_names(conversation_files))}) < len(conversation_files):
            raise ConfigError("conversations: two files have the same name, and their folders too: rename one of them")
        with_lists = {
            file: layout.retrieval / f"{name}.jsonl" for file, name in zip(conversation_files, names, strict=True)
        }
        provided = {key: with_lists[file] for key, file in provided.items()}
        tests = [(name, with_lists[file]) for name, file in tests]
        candidates_arg = {"candidates": stage_values("retrieve", pipeline.retrieve).get("key", "candidates_fused")}
    external_files = () if candidates_arg else tuple(map(str, provided.values()))
    yield Step(
        name="tune",
        stage="tune",
        filled_in={
            "store": layout.store,
            **dict.fromkeys(files, _NOT_GIVEN),
            **provided,
            **candidates_arg,
            "out": layout.tune,
        },
        output=layout.tune,
        needs=("retrieve", "embed"),
        inputs=external_files,
    )
    if not tests:
        _require(pipeline, "evaluate", "conversations.test")
    yield Step(
        name="evaluate",
        stage="evaluate",
        filled_in={
            "bundle": layout.tune / "bundle",
            "store": layout.store,
            "test": [f"{name}={file}" if name else str(file) for name, file in tests] or [_NOT_GIVEN],
            "shards": [train],
            "runs": [layout.distill, layout.tune],
            **candidates_arg,
            "out": layout.evaluation,
        },
        output=layout.evaluation,
        needs=("tune", "retrieve", "embed"),
        inputs=() if candidates_arg else tuple(str(file) for _, file in tests),
    )


def _require(pipeline: PipelineSettings, stage: Stage, key: str) -> None:
    if stage in pipeline.stages:
        raise ConfigError(f"{key} is missing: `{stage}` reads these files; set it, or remove the stage from `stages`")


def select_steps(steps: Sequence[Step], pipeline: PipelineSettings) -> list[Step]:
    """The steps that `--only` and `--from` ask for.

    Raises:
        ConfigError: A stage is not in the pipeline.
    """
    flags = {"--only": pipeline.only, "--from": (pipeline.from_,) if pipeline.from_ else (), "--force": pipeline.force}
    for flag, stages in flags.items():
        for stage in stages:
            if stage not in pipeline.stages:
                raise ConfigError(f"{flag} {stage}: not in this pipeline's stages ({', '.join(pipeline.stages)})")
    selected = [step for step in steps if step.selected and (not pipeline.only or step.stage in pipeline.only)]
    if pipeline.from_:
        first = STAGES.index(pipeline.from_)
        selected = [step for step in selected if STAGES.index(step.stage) >= first]
    return selected


def _without_implied_needs(steps: Sequence[Step]) -> list[Step]:
    """The steps without needs that another need has itself."""
    ancestors: dict[str, set[str]] = {}
    for step in steps:
        ancestors[step.name] = {*step.needs, *(name for need in step.needs for name in ancestors[need])}

    def implied(need: str, step: Step) -> bool:
        return any(need in ancestors[other] for other in step.needs if other != need)

    return [replace(step, needs=tuple(need for need in step.needs if not implied(need, step))) for step in steps]


def _stage_args(
    stage: Stage, settings: StageSettings, filled_in: Mapping[str, Any], *, find_configs: bool
) -> list[str]:
    """A command's flags: its yaml file, what the pipeline fills in, the user's settings."""
    for key in settings.settings:
        if key.replace("-", "_") in filled_in:
            raise ConfigError(f"{stage}.settings.{key}: the pipeline fills that in; remove it")
    return [*config_args(settings, find_configs=find_configs), *to_args(filled_in), *to_args(settings.settings)]


def config_args(settings: StageSettings, *, find_configs: bool = True) -> list[str]:
    """The flag with a stage's yaml file, which must exist with `find_configs`."""
    if not settings.config:
        return []
    file = find_config(settings.config) if find_configs else Path(settings.config)
    return ["--config", str(absolute(file)) if Path(settings.config).is_file() else settings.config]
