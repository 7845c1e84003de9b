"""Settings classes, and the keys of one: path, type, default and documentation."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from typing import Annotated, Any, Literal, TypeVar, Union

import pydantic.dataclasses
from pydantic import ConfigDict
from typing_extensions import dataclass_transform

T = TypeVar("T")
Keys = tuple[str, ...]
"""The path of a key: ("fetch", "concurrency")."""

Seed = Annotated[int, pydantic.Field(ge=0, lt=2**32)]
"""A seed that every generator takes; numpy's takes 32 bits."""
Positional = "lavic.positional"
"""Marks a field that is given without its flag: `folder: Annotated[Path, Positional]`."""
Reference = "lavic.reference"
"""Marks a text field that may be `env:NAME` or `@FILE`, for what holds a password; `secrets.reveal` reads it."""

RENAMED = {
    "batch": "batch_size",
    "workers": "num_workers",
    "loop.batch": "loop.global_batch_size",
    "loop.clip": "loop.max_grad_norm",
    "loop.keep": "loop.save_total_limit",
    "loop.workers": "loop.num_workers",
    "loop.activations": "loop.activation_checkpointing",
    "loop.patience": "loop.hang_warn_minutes",
    "pretrain.batch": "pretrain.batch_size",
    "pretrain.read_steps": "pretrain.language_steps",
    "pretrain.read_lr": "pretrain.recall_lr",
    "pretrain.fetch_lr": "pretrain.lookup_lr",
    "pretrain.fetch_weight": "pretrain.lookup_weight",
    "pretrain.last_mastery": "pretrain.final_mastery",
    "pretrain.see_steps": "pretrain.vision_steps",
    "pretrain.see_lr": "pretrain.vision_lr",
    "pretrain.rehearse_every": "pretrain.text_lookup_every",
    "pretrain.compare_every": "pretrain.photo_lookup_every",
    "pretrain.compare_from": "pretrain.photo_lookup_start",
    "pretrain.compare_mastery": "pretrain.photo_lookup_mastery",
    "pretrain.compare_more": "pretrain.photo_lookup_extra_requests",
    "pretrain.compare_reach": "pretrain.photo_lookup_max_distance",
    "pretrain.compare_as_items": "pretrain.photo_lookup_as_items",
    "pretrain.compare_align": "pretrain.photo_lookup_alignment",
    "pretrain.near_ids": "pretrain.neighboring_ids",
}
"""Keys of older versions -> today's: a yaml file or a command line that has one is refused with the new name."""


def _count_bytes(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgtp])(i?)b?|b)?\s*", value, re.I)
    if match is None:
        raise ValueError("not a number of bytes, such as 50GiB or 2TB")
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** (" kmgtp".index(prefix.lower()) if prefix else 0))


ByteCount = Annotated[int, pydantic.BeforeValidator(_count_bytes), pydantic.Field(ge=1)]
"""A number of bytes, also as text: `50GiB` is 50 * 1024**3, `50GB` 50 * 1000**3."""


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field, pydantic.Field))
def settings(cls: type[T]) -> type[T]:
    """Makes `cls` a frozen, keyword-only, validated dataclass that refuses unknown fields.

    The string under a field is its documentation: `--help` and `--print-config` show it.
    """
    config = ConfigDict(extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False)
    settings_class: Any = pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=config)(cls)
    return settings_class


@dataclass(frozen=True)
class Leaf:
    """A key that holds a value, not further settings."""

    type: Any
    """Its annotation without `| None` and without bounds."""
    optional: bool
    """Whether it may be None."""
    markers: Sequence[Any]
    """`Positional`, `Reference`, bounds."""
    doc: str
    """The docstring under the field."""

    @property
    def syntax(self) -> Literal["switch", "value", "list", "yaml"]:
        """How it is written on a command line."""
        return "switch" if self.type is bool and not self.optional else _syntax_of(self.type)


class Schema:
    """The keys of a settings class.

    Attributes:
        leaves: Keys that hold values.
        groups: Keys that hold further settings, with their class; the class itself under `()`.
        defaults: Of the leaves that have one; the others are required.
    """

    def __init__(self, cls: type, command: str = "") -> None:
        self.cls, self.command = cls, command
        self.leaves: dict[Keys, Leaf] = {}
        self.groups: dict[Keys, type] = {}
        self.defaults: dict[Keys, Any] = {}
        self._add(cls, (), None)

    def _add(self, cls: Any, prefix: Keys, instance: Any) -> None:
        """Adds the keys of `cls` under `prefix`, with the defaults of `instance` where there is one."""
        self.groups[prefix] = cls
        for name, info in cls.__pydantic_fields__.items():
            keys = (*prefix, name)
            annotation, optional = _unwrap_optional(info.annotation)
            required = instance is None and info.is_required()
            default = info.get_default(call_default_factory=True) if instance is None else getattr(instance, name)
            if is_settings(annotation) and not optional:
                self._add(annotation, keys, None if required else default)
                continue
            self.leaves[keys] = Leaf(annotation, optional, info.metadata, (info.description or "").strip())
            if not required:
                self.defaults[keys] = default

    def flag(self, keys: Keys) -> str:
        """How a key is typed: `--fetch.allow-private`, or `FOLDER` where it is positional.

        A field such as `from_`, whose name is a word of Python without the underscore, is typed without it.
        """
        dotted = ".".join(keys).rstrip("_").replace("_", "-")
        return dotted.upper() if Positional in self.leaves[keys].markers else f"--{dotted}"

    def correction(self, unknown: str) -> tuple[Keys | None, bool]:
        """The key that is meant by an unknown one, if any, and whether that was its name in an older version."""
        unknown = unknown.replace("-", "_")
        renamed = tuple(RENAMED.get(unknown, "").split("."))
        if renamed in self.leaves:
            return renamed, True
        by_dotted_name = {".".join(keys): keys for keys in [*self.leaves, *self.groups] if keys}
        by_last_part = {name.rpartition(".")[2]: keys for name, keys in by_dotted_name.items()}
        for query, candidates in ((unknown, by_dotted_name), (unknown.rpartition(".")[2], by_last_part)):
            if matches := difflib.get_close_matches(query, candidates, 1, 0.6):
                return candidates[matches[0]], False
        return None, False


def is_settings(annotation: Any) -> bool:
    """Whether `annotation` is a class made by `settings`."""
    return isinstance(annotation, type) and is_dataclass(annotation) and hasattr(annotation, "__pydantic_fields__")


def _unwrap_optional(annotation: Any) -> tuple[Any, bool]:
    """A type without `| None` and without bounds, and whether it may be None."""
    optional = False
    if typing.get_origin(annotation) in (Union, types.UnionType):
        members = typing.get_args(annotation)
        other_members = tuple(member for member in members if member is not type(None))
        annotation, optional = Union[other_members], len(other_members) < len(members)  # noqa: UP007
    return (typing.get_args(annotation)[0] if typing.get_origin(annotation) is Annotated else annotation), optional


def _syntax_of(annotation: Any) -> Literal["value", "list", "yaml"]:
    origin = typing.get_origin(annotation) or annotation
    if origin in (list, tuple, set, frozenset, Sequence):
        return "yaml" if any(_syntax_of(part) == "yaml" for part in typing.get_args(annotation)) else "list"
    return "yaml" if origin in (dict, Mapping) or is_settings(annotation) else "value"
