"""What a settings class holds: its keys, their types, how they are typed on a command line, their defaults."""

from __future__ import annotations

import difflib
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

POSITIONAL = "lavic.positional"
REFERENCE = "lavic.reference"
MISSING: Any = type("Missing", (), {"__repr__": lambda _: "(not given)"})()
"""Stands for a value that was not given, where None is a value."""


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field, pydantic.Field))
def settings(cls: type[T]) -> type[T]:
    """Makes `cls` a frozen, keyword-only, checked dataclass that refuses fields it does not know.

    The string under a field is its documentation: `--help` and `--print-config` show it.
    """
    config = ConfigDict(extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False)
    made: Any = pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=config)(cls)
    return made


@dataclass(frozen=True)
class Leaf:
    """One key that holds a value, not further settings."""

    type: Any
    """Its annotation without `| None`."""
    shape: Literal["switch", "one", "many", "yaml"]
    """How it is written on a command line."""
    optional: bool
    """Whether it may be None."""
    required: bool
    """Whether it has no default."""
    positional: bool
    """Whether it is given without its flag."""
    reference: bool
    """Whether it may be `env:NAME` or `@FILE`, see `lavic.config.secrets`."""
    doc: str
    """What the string under the field says."""

    @property
    def is_number(self) -> bool:
        """Whether its value is a number: yaml's `yes` would count as 1."""
        kind = typing.get_args(self.type)[0] if typing.get_origin(self.type) is Annotated else self.type
        return kind in (int, float)


class Schema:
    """The keys of a settings class: `leaves` by path, `groups` (nested classes) by path, `defaults` as nested dicts."""

    def __init__(self, cls: type, command: str):
        self.cls, self.command = cls, command
        self.leaves: dict[Keys, Leaf] = {}
        self.groups: dict[Keys, type] = {}
        self.defaults = self._read(cls, (), None)

    def _read(self, cls: Any, above: Keys, instance: Any) -> dict[str, Any]:
        """Notes the keys of `cls` under `above`; returns its defaults, taken from `instance` where there is one."""
        self.groups[above] = cls
        defaults: dict[str, Any] = {}
        for name, info in cls.__pydantic_fields__.items():
            default = getattr(instance, name) if instance is not None else MISSING
            if default is MISSING and not info.is_required():
                default = info.get_default(call_default_factory=True)
            bare, optional = _without_none(info.annotation)
            if is_settings(bare) and not optional:
                defaults[name] = self._read(bare, (*above, name), None if default is MISSING else default)
                continue
            if default is not MISSING:
                defaults[name] = default
            self.leaves[(*above, name)] = Leaf(
                type=bare,
                shape=_shape(bare, optional, default),
                optional=optional,
                required=default is MISSING,
                positional=POSITIONAL in info.metadata,
                reference=REFERENCE in info.metadata,
                doc=(info.description or "").strip(),
            )
        return defaults

    def nearest(self, wrong: str) -> str | None:
        """The known dotted key most like `wrong`, or None."""
        names = [".".join(keys) for keys in [*self.leaves, *self.groups] if keys]
        wrong = wrong.replace("-", "_")
        ends = {name.rpartition(".")[2]: name for name in names}
        close = difflib.get_close_matches(wrong, names, 1, 0.6)
        if not close:
            close = [ends[end] for end in difflib.get_close_matches(wrong.rpartition(".")[2], list(ends), 1, 0.6)]
        return close[0] if close else None


def at(values: Any, keys: Keys, default: Any = None) -> Any:
    """What stands at a path in nested mappings, or `default`."""
    for key in keys:
        if not isinstance(values, Mapping) or key not in values:
            return default
        values = values[key]
    return values


def is_settings(kind: Any) -> bool:
    """Whether `kind` is a class made by `settings`."""
    return isinstance(kind, type) and is_dataclass(kind) and hasattr(kind, "__pydantic_fields__")


def _without_none(kind: Any) -> tuple[Any, bool]:
    """`X | None` -> (X, True); anything else -> (itself, False)."""
    if typing.get_origin(kind) not in (Union, types.UnionType):
        return kind, False
    members = typing.get_args(kind)
    rest = tuple(member for member in members if member is not type(None))
    return (Union[rest] if rest else kind), len(rest) < len(members)  # noqa: UP007


def _shape(kind: Any, optional: bool, default: Any) -> Literal["switch", "one", "many", "yaml"]:
    if kind is bool and not optional and default is not MISSING:
        return "switch"
    origin = typing.get_origin(kind) or kind
    if origin in (list, tuple, set, frozenset, Sequence):
        return "yaml" if any(_shape(part, False, None) == "yaml" for part in typing.get_args(kind)) else "many"
    if origin in (dict, Mapping) or is_settings(kind):
        return "yaml"
    return "one"
