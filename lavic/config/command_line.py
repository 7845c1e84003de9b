"""The command line of a settings class, by argparse."""

from __future__ import annotations

import argparse
import inspect
import typing
from collections.abc import Sequence
from typing import Any, NoReturn

import yaml

from lavic.config.schema import Keys, Leaf, Positional, Schema
from lavic.errors import ConfigError

_NONE = ("None", "none", "null")
_METAVARS = {"int": "INT", "float": "FLOAT", "Path": "PATH", "bool": "{True,False}"}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message.removeprefix('argument ')}; see '{self.prog} --help'")

    def print_help(self, file: Any = None) -> None:
        print(self.format_help(), end="", file=file)  # argparse would ignore a full disk


class _Switch(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, option_string == self.option_strings[0])


def read(schema: Schema, words: Sequence[str], description: str) -> tuple[list[str], bool, dict[Keys, Any]]:
    """What `--config` names, whether `--print-config` is there, and the value of every other key.

    Raises:
        ConfigError: An unknown flag, or a value that cannot be placed.
        SystemExit: 0, after `--help`.
    """
    parser = _parser(schema, description)
    plain = [_with_dashes(word) for word in words]
    namespace, unplaced = parser.parse_known_intermixed_args(plain)
    for word in unplaced:
        raise ConfigError(_why_unplaced(schema, plain, word))
    values = {keys: getattr(namespace, ".".join(keys)) for keys in schema.leaves if hasattr(namespace, ".".join(keys))}
    return (
        namespace.config,
        namespace.print_config,
        {keys: _value(schema.flag(keys), schema.leaves[keys], value) for keys, value in values.items()},
    )


def _with_dashes(word: str) -> str:
    name, equals, value = word.partition("=")
    return f"{name.replace('_', '-')}{equals}{value}" if word.startswith("--") else word


def _parser(schema: Schema, description: str) -> _Parser:
    positional = "".join(f" {schema.flag(keys)}" for keys, leaf in schema.leaves.items() if Positional in leaf.markers)
    parser = _Parser(
        prog=f"lavic {schema.command}",
        usage=f"%(prog)s{positional} [--config FILE|NAME] [--key value ...]",
        description=(description or inspect.getdoc(schema.cls) or "").strip().replace("%", "%%"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    files = "Yaml file with settings, or the name of a shipped one; flags override it. May be given several times."
    parser.add_argument("--config", action="append", default=[], metavar="FILE|NAME", help=files)
    show = "Print the settings as a documented yaml file and exit."
    parser.add_argument("--print-config", action="store_true", default=False, help=show)
    for above, cls in schema.groups.items():
        group = parser.add_argument_group(".".join(above) or "settings", inspect.getdoc(cls) if above else None)
        for keys, leaf in schema.leaves.items():
            if keys[:-1] == above:
                _add(group, schema, keys, leaf)
    return parser


def _add(group: argparse._ArgumentGroup, schema: Schema, keys: Keys, leaf: Leaf) -> None:
    flag, required = schema.flag(keys), keys not in schema.defaults
    default = "(required)" if required else f"(default: {_shown(schema.defaults[keys])})"
    more: dict[str, Any] = {"help": f"{leaf.doc} {default}".strip().replace("%", "%%")}
    if Positional in leaf.markers:
        nargs = "*" if leaf.form == "list" else "?"
        group.add_argument(".".join(keys), nargs=nargs, metavar=flag, **more)
        return
    if leaf.form == "switch":
        head, dot, name = flag[2:].rpartition(".")
        group.add_argument(flag, f"--{head}{dot}no-{name}", dest=".".join(keys), action=_Switch, nargs=0, **more)
        return
    if leaf.form == "list":
        more |= {"nargs": "+" if required else "*", "action": "append"}
    group.add_argument(
        flag, dest=".".join(keys), metavar=_metavar(leaf.type) if leaf.form != "yaml" else "YAML", **more
    )


def _why_unplaced(schema: Schema, words: Sequence[str], word: str) -> str:
    see = f"'lavic {schema.command} --help'"
    if word.startswith("-"):
        name = word.partition("=")[0]
        keys, renamed = schema.correction(name.lstrip("-"))
        if keys in schema.leaves:
            flag = schema.flag(keys)
            return (
                f"{name} was renamed: use {flag}" if renamed else f"unknown flag {name}; did you mean {flag}? See {see}"
            )
        return f"unknown flag {name}; see {see}"
    forms = {schema.flag(keys): leaf.form for keys, leaf in schema.leaves.items()}
    flags = [before for before in words[: words.index(word)] if before.startswith("--")]
    form = forms.get(flags[-1]) if flags else None
    if form == "switch":
        return f"{flags[-1]} takes no value (got '{word}'): write {flags[-1]} or its --no- form"
    if form in ("value", "yaml"):
        return f"{flags[-1]} takes one value, got '{word}' too"
    return f"unexpected '{word}'; every value follows its flag. See {see}"


def _value(flag: str, leaf: Leaf, value: Any) -> Any:
    """What was typed for a key, as a value that pydantic can validate."""
    if leaf.form == "list" and Positional not in leaf.markers:
        if len(value) > 1:
            raise ConfigError(f"{flag} is given twice; write all its values after one {flag}")
        (value,) = value
    if leaf.optional and (value in _NONE or (isinstance(value, list) and len(value) == 1 and value[0] in _NONE)):
        return None
    if leaf.form == "yaml":
        try:
            return yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError):
            raise ConfigError(f"{flag} takes yaml, such as '{{key: value}}', got {value!r}") from None
    return [_literal(leaf.type, word) for word in value] if isinstance(value, list) else _literal(leaf.type, value)


def _literal(kind: Any, word: Any) -> Any:
    """A choice that is no text (`Literal[1, 2]`), which pydantic does not make from text."""
    return next((each for each in typing.get_args(kind) if not isinstance(each, type) and str(each) == word), word)


def _metavar(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Annotated:
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is typing.Literal:
        return f"{{{','.join(map(str, typing.get_args(kind)))}}}"
    if members := [part for part in typing.get_args(kind) if part is not Ellipsis and not isinstance(part, (str, int))]:
        return "|".join(dict.fromkeys(map(_metavar, members)))
    return _METAVARS.get(getattr(kind, "__name__", ""), "TEXT")


def _shown(default: Any) -> str:
    if isinstance(default, (list, tuple)):
        return " ".join(map(str, default)) or "none"
    return "none" if default is None or default == "" else str(default)
