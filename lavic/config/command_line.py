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


def read(schema: Schema, args: Sequence[str], description: str) -> tuple[list[str], bool, dict[Keys, Any]]:
    """What `--config` names, whether `--print-config` is there, and the value of every other key.

    Raises:
        ConfigError: An unknown flag, or a value that cannot be placed.
        SystemExit: 0, after `--help`.
    """
    parser = _parser(schema, description)
    normalized = [_with_dashes(arg) for arg in args]
    namespace, unrecognized = parser.parse_known_intermixed_args(normalized)
    for arg in unrecognized:
        raise ConfigError(_unrecognized_message(schema, normalized, arg))
    values = {keys: getattr(namespace, ".".join(keys)) for keys in schema.leaves if hasattr(namespace, ".".join(keys))}
    return (
        namespace.config,
        namespace.print_config,
        {keys: _parse_value(schema.flag(keys), schema.leaves[keys], value) for keys, value in values.items()},
    )


def _with_dashes(arg: str) -> str:
    name, equals, value = arg.partition("=")
    return f"{name.replace('_', '-')}{equals}{value}" if arg.startswith("--") else arg


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
    config_help = (
        "Yaml file with settings, or the name of a shipped one; flags override it. May be given several times."
    )
    parser.add_argument("--config", action="append", default=[], metavar="FILE|NAME", help=config_help)
    print_config_help = "Print the settings as a documented yaml file and exit."
    parser.add_argument("--print-config", action="store_true", default=False, help=print_config_help)
    for group_keys, cls in schema.groups.items():
        group = parser.add_argument_group(
            ".".join(group_keys) or "settings", inspect.getdoc(cls) if group_keys else None
        )
        for keys, leaf in schema.leaves.items():
            if keys[:-1] == group_keys:
                _add(group, schema, keys, leaf)
    return parser


def _add(group: argparse._ArgumentGroup, schema: Schema, keys: Keys, leaf: Leaf) -> None:
    flag, required = schema.flag(keys), keys not in schema.defaults
    default = "(required)" if required else f"(default: {_format_default(schema.defaults[keys])})"
    kwargs: dict[str, Any] = {"help": f"{leaf.doc} {default}".strip().replace("%", "%%")}
    if Positional in leaf.markers:
        nargs = "*" if leaf.syntax == "list" else "?"
        group.add_argument(".".join(keys), nargs=nargs, metavar=flag, **kwargs)
        return
    if leaf.syntax == "switch":
        prefix, dot, name = flag[2:].rpartition(".")
        group.add_argument(flag, f"--{prefix}{dot}no-{name}", dest=".".join(keys), action=_Switch, nargs=0, **kwargs)
        return
    if leaf.syntax == "list":
        kwargs |= {"nargs": "+" if required else "*", "action": "append"}
    group.add_argument(
        flag, dest=".".join(keys), metavar=_metavar(leaf.type) if leaf.syntax != "yaml" else "YAML", **kwargs
    )


def _unrecognized_message(schema: Schema, args: Sequence[str], unrecognized: str) -> str:
    help_hint = f"'lavic {schema.command} --help'"
    if unrecognized.startswith("-"):
        name = unrecognized.partition("=")[0]
        keys, renamed = schema.correction(name.lstrip("-"))
        if keys in schema.leaves:
            flag = schema.flag(keys)
            return (
                f"{name} was renamed: use {flag}"
                if renamed
                else f"unknown flag {name}; did you mean {flag}? See {help_hint}"
            )
        return f"unknown flag {name}; see {help_hint}"
    syntax_by_flag = {schema.flag(keys): leaf.syntax for keys, leaf in schema.leaves.items()}
    flags = [arg for arg in args[: args.index(unrecognized)] if arg.startswith("--")]
    syntax = syntax_by_flag.get(flags[-1]) if flags else None
    if syntax == "switch":
        return f"{flags[-1]} takes no value (got '{unrecognized}'): write {flags[-1]} or its --no- form"
    if syntax in ("value", "yaml"):
        return f"{flags[-1]} takes one value, got '{unrecognized}' too"
    return f"unexpected '{unrecognized}'; every value follows its flag. See {help_hint}"


def _parse_value(flag: str, leaf: Leaf, value: Any) -> Any:
    """What was typed for a key, as a value that pydantic can validate."""
    if leaf.syntax == "list" and Positional not in leaf.markers:
        if len(value) > 1:
            raise ConfigError(f"{flag} is given twice; write all its values after one {flag}")
        (value,) = value
    if leaf.optional and (value in _NONE or (isinstance(value, list) and len(value) == 1 and value[0] in _NONE)):
        return None
    if leaf.syntax == "yaml":
        try:
            return yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError):
            raise ConfigError(f"{flag} takes yaml, such as '{{key: value}}', got {value!r}") from None
    return (
        [_parse_choice(leaf.type, text) for text in value]
        if isinstance(value, list)
        else _parse_choice(leaf.type, value)
    )


def _parse_choice(annotation: Any, text: Any) -> Any:
    """A choice that is no text (`Literal[1, 2]`), which pydantic does not make from text."""
    return next(
        (choice for choice in typing.get_args(annotation) if not isinstance(choice, type) and str(choice) == text), text
    )


def _metavar(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) is typing.Literal:
        return f"{{{','.join(map(str, typing.get_args(annotation)))}}}"
    if members := [
        member
        for member in typing.get_args(annotation)
        if member is not Ellipsis and not isinstance(member, (str, int))
    ]:
        return "|".join(dict.fromkeys(map(_metavar, members)))
    return _METAVARS.get(getattr(annotation, "__name__", ""), "TEXT")


def _format_default(default: Any) -> str:
    if isinstance(default, (list, tuple)):
        return " ".join(map(str, default)) or "none"
    return "none" if default is None or default == "" else str(default)
