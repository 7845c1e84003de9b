"""The command line of a settings class: tyro reads the words and lays out the help, values are checked elsewhere.

tyro is given a mirror of the class. For `--help` the mirror has the real types. For reading, every value stays the
words that were typed: a yaml file's and a command line's values then meet the same checks and get the same messages.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Annotated, Any

import tyro
import yaml

from lavic.config.schema import Keys, Leaf, Schema, at
from lavic.errors import ConfigError

_UNSET = ("\0unset",)
_NONE = ("None", "none", "null")


def name_of(keys: Keys, leaf: Leaf) -> str:
    """How a key is typed: `--fetch.allow-private`, or `FOLDER` for a positional one."""
    if leaf.positional:
        return keys[-1].upper()
    return "--" + _dotted(keys)


def _dotted(keys: Keys) -> str:
    """A key as it is typed; `from_`, which Python cannot call `from`, is `from`."""
    return ".".join(keys).rstrip("_").replace("_", "-")


def take_common(words: list[str], command: str) -> tuple[list[str], bool, list[str]]:
    """Takes what every command knows: (the `--config` names, whether `--print-config`, the words left)."""
    files: list[str] = []
    left: list[str] = []
    show = False
    rest = iter(words)
    for word in rest:
        if word == "--config":
            name = next(rest, "--")
            if name.startswith("--"):
                raise ConfigError(f"--config needs a file or a shipped config's name; see 'lavic {command} --help'")
            files.append(name)
        elif word.startswith("--config="):
            files.append(word.partition("=")[2])
        elif word == "--print-config":
            show = True
        else:
            left.append(word)
    return files, show, left


def read(schema: Schema, words: Sequence[str]) -> Iterator[tuple[Keys, Any]]:
    """Yields (keys, raw value) for every key that `words` set. Raises ConfigError for a flag that is not known."""
    _check_names(schema, words)
    mirror = _mirror(schema, (), typed=False)
    given: Any
    given, stray = tyro.cli(
        mirror, prog=f"lavic {schema.command}", args=list(words), return_unknown_args=True, add_help=False
    )
    if stray:
        raise ConfigError(_stray(schema, words, stray[0]))
    for keys, leaf in schema.leaves.items():
        value = given
        for key in keys:
            value = getattr(value, key)
        if leaf.shape == "switch":
            # tyro gives back the default where the switch was not typed; that must not cover a yaml file's value.
            if _typed(keys, words):
                yield keys, value
        elif value != _UNSET:
            yield keys, _value(name_of(keys, leaf), leaf, value)


def print_help(schema: Schema, description: str) -> None:
    """Prints the manual page of a command."""
    about = (description or schema.cls.__doc__ or "").strip()
    with suppress(SystemExit):
        tyro.cli(_mirror(schema, (), typed=True), prog=f"lavic {schema.command}", description=about, args=["--help"])


def _check_names(schema: Schema, words: Sequence[str]) -> None:
    known: dict[str, Leaf] = {}
    for keys, leaf in schema.leaves.items():
        if not leaf.positional:
            known[name_of(keys, leaf)] = leaf
        if leaf.shape == "switch":
            known[_negative(keys)] = leaf
    seen: set[str] = set()
    for word in words:
        if word == "--":
            continue
        if not word.startswith("-") or word == "-" or re.match(r"-\.?\d", word):
            continue
        name = word.partition("=")[0]
        flag = name.replace("_", "-")
        if flag in known:
            if flag in seen and known[flag].shape == "many":
                raise ConfigError(f"{name} is given twice; write all its values after one {name}")
            seen.add(flag)
            continue
        near = schema.nearest(name.lstrip("-"))
        hint = f"did you mean {name_of(tuple(near.split('.')), _ANY)}? See" if near else "see"
        raise ConfigError(f"unknown flag {name}; {hint} 'lavic {schema.command} --help'")


def _negative(keys: Keys) -> str:
    return "--" + ".".join([*keys[:-1], f"no-{keys[-1]}"]).replace("_", "-")


def _typed(keys: Keys, words: Sequence[str]) -> bool:
    names = ("--" + _dotted(keys), _negative(keys))
    return any(word.replace("_", "-") in names for word in words)


def _stray(schema: Schema, words: Sequence[str], stray: str) -> str:
    """Says why a word could not be placed."""
    place = words.index(stray) if stray in words else 0
    before = words[place - 1] if place else ""
    switches = {name_of(keys, leaf) for keys, leaf in schema.leaves.items() if leaf.shape == "switch"}
    if before.replace("_", "-") in switches:
        return f"{before} takes no value (got '{stray}'): write {before} or its --no- form"
    return f"unexpected '{stray}'; every value follows its flag. See 'lavic {schema.command} --help'"


def _value(flag: str, leaf: Leaf, words: tuple[str, ...]) -> Any:
    """The words typed for one key as a value that pydantic can check."""
    if leaf.optional and len(words) == 1 and words[0] in _NONE:
        return None
    if not words and (leaf.shape != "many" or leaf.required):
        raise ConfigError(f"{flag} needs a value")
    if leaf.shape == "many":
        return [_literal(leaf.type, word) for word in words]
    if len(words) != 1:
        raise ConfigError(f"{flag} takes one value, got {len(words)}: {' '.join(words)}")
    if leaf.shape == "yaml":
        try:
            return yaml.safe_load(words[0])
        except (yaml.YAMLError, ValueError, RecursionError):
            raise ConfigError(f"{flag} takes yaml, such as '{{key: value}}', got {words[0]!r}") from None
    return _literal(leaf.type, words[0])


def _literal(kind: Any, word: str) -> Any:
    """A choice that is not text (`Literal[1, 2]`), which pydantic does not make from text."""
    for member in typing.get_args(kind):
        if not isinstance(member, type) and str(member) == word:
            return member
    return word


_ANY = Leaf(type=str, shape="one", optional=False, required=False, positional=False, reference=False, doc="")


def _mirror(schema: Schema, above: Keys, *, typed: bool) -> type:
    """A plain dataclass with the keys under `above`, for tyro."""
    cls = schema.groups[above]
    fields: list[tuple[str, Any, Any]] = []
    for name in cls.__pydantic_fields__:  # type: ignore[attr-defined]
        keys = (*above, name)
        if keys in schema.groups:
            below: Any = _mirror(schema, keys, typed=typed)
            # Before 1.0.17 tyro does not find a docstring that was put on after the class was made.
            shown_below: Any = Annotated[below, tyro.conf.arg(help=below.__doc__ or None)]
            fields.append((name, shown_below, dataclasses.field(default_factory=below)))
            continue
        leaf = schema.leaves[keys]
        default = at(schema.defaults, keys)
        kind, shown = (_documented(leaf), default) if typed else (tuple[str, ...], _UNSET)
        if leaf.shape == "switch":
            kind, shown = (kind if typed else bool), bool(default)
        elif leaf.shape == "yaml" and typed:
            shown = repr(default)
        if leaf.positional:
            kind = Annotated[kind, tyro.conf.Positional, tyro.conf.arg(metavar=name.upper())]
        elif name.endswith("_"):
            kind = Annotated[kind, tyro.conf.arg(name=name.rstrip("_"))]
        if typed and leaf.required:
            fields.append((name, kind, dataclasses.field()))
        else:
            fields.append((name, kind, dataclasses.field(default_factory=lambda shown=shown: shown)))  # type: ignore[misc]
    if typed and not above:
        fields += _common()
    made = dataclasses.make_dataclass(cls.__name__, fields, kw_only=True)
    doc = cls.__doc__ or ""
    made.__doc__ = "" if doc.startswith(f"{cls.__name__}(") else doc
    return made


def _documented(leaf: Leaf) -> Any:
    """A leaf's type with its help, as tyro shows it."""
    doc = " ".join(leaf.doc.split())
    if leaf.shape == "yaml":
        return Annotated[str, tyro.conf.arg(help=doc, metavar="YAML")]
    kind = leaf.type | None if leaf.optional else leaf.type
    return Annotated[kind, tyro.conf.arg(help=doc)]


def _common() -> list[tuple[str, Any, Any]]:
    config = "Yaml file with settings, or the name of a shipped one; flags win over it. May be given several times."
    show = "Print the settings as a documented yaml file and leave."
    return [
        (
            "config",
            Annotated[str | None, tyro.conf.arg(help=config, metavar="FILE|NAME")],
            dataclasses.field(default=None),
        ),
        (
            "print_config",
            Annotated[bool, tyro.conf.arg(help=show), tyro.conf.FlagCreatePairsOff],
            dataclasses.field(default=False),
        ),
    ]
