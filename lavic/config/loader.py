"""Settings: one frozen dataclass per component, filled from its defaults, then yaml files, then the command line.

    @settings
    class FetchSettings:
        '''How photos are fetched.'''

        concurrency: int = 32
        '''Requests in flight.'''

    chosen = parse(FetchSettings, argv, command="crawl", description="Fetch a catalogue's photos.")

Fields may be scalars, `Path`, `Literal`, `X | None`, lists and tuples of these (`--items a b`), switches (`--flag`,
`--no-flag`), other settings (`--fetch.concurrency 8`) and dictionaries (one yaml word: `--extra '{a: 1}'`). A field
that may hold an `s3://` address is a `str`, since `Path` would fold its slashes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from lavic.config import command_line
from lavic.config.schema import Keys, Reference, Schema
from lavic.config.secrets import holds_secret, redact_all
from lavic.config.yaml_file import YamlFile, find_config, to_yaml
from lavic.errors import ConfigError

T = TypeVar("T")

_MESSAGES = {
    "missing": "too few values",
    "string_type": "should be a text; write it in quotes",
    "tuple_type": "should be a list, as [a, b]",
}
"""Error type of pydantic -> what a reader of yaml understands."""


def parse(cls: type[T], argv: Sequence[str] | None, *, command: str, description: str = "") -> T:
    """Fills `cls` from its defaults, then every `--config`, then the flags.

    Args:
        cls: A class made by `settings`.
        argv: The words after the command's name; None means none.
        command: The command's name without `lavic`, for messages and help ("mini pretrain").
        description: What `--help` says above the flags; the docstring of `cls` when empty.

    Raises:
        ConfigError: An unknown key or flag, or an invalid value: names the flag or file:line and the nearest known key.
        SystemExit: 0, after `--help` or `--print-config`.
    """
    layers, print_config = _read(cls, argv, command, description)
    if print_config:
        layers.build(partial=True)
        print(layers.documented_yaml(), end="")
        raise SystemExit(0)
    return cast(T, layers.build())


def parse_values(cls: type, argv: Sequence[str] | None, *, command: str) -> dict[str, Any]:
    """As `parse`, but returns plain values, nested; required keys that are not given are absent."""
    layers, _ = _read(cls, argv, command)
    layers.build(partial=True)
    return layers.plain_values()


def load(cls: type[T], path: str | Path) -> T:
    """Reads the settings that `dump` wrote, refusing unknown keys. Raises ConfigError with file:line."""
    layers = _Layers(Schema(cls))
    layers.add_yaml(Path(path))
    return cast(T, layers.build())


def dump(instance: Any, *, command: str = "") -> str:
    """The yaml text of an instance, every key in it; `load` gives an equal one. `command` becomes the first line.

    Secrets are left out: a setting that needs one is `env:NAME` or `@FILE`, and is read from there again.
    """
    text = to_yaml(redact_all(TypeAdapter(type(instance)).dump_python(instance, mode="json")))
    return f"# lavic {command}\n{text}" if command else text


def flatten(instance: Any) -> dict[str, Any]:
    """An instance as one level of plain values, {"fetch.concurrency": 32}, without secrets: to compare and to log."""
    values = redact_all(TypeAdapter(type(instance)).dump_python(instance, mode="json"))
    return {".".join(keys): value_at(values, keys) for keys in Schema(type(instance)).leaves}


def value_at(values: Any, keys: Keys) -> Any:
    """The value at a path in nested mappings; None where there is none."""
    for key in keys:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def _read(cls: type, argv: Sequence[str] | None, command: str, description: str = "") -> tuple[_Layers, bool]:
    layers = _Layers(Schema(cls, command))
    files, print_config, values = command_line.read(layers.schema, list(argv or ()), description)
    for name in files:
        layers.add_yaml(find_config(name))
    for keys, value in values.items():
        layers.add(keys, value, layers.schema.flag(keys))
    layers.refuse_secrets()
    return layers, print_config


class _Layers:
    """Values by key, the latest of each, and where it came from."""

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self.values: dict[Keys, Any] = dict(schema.defaults)
        self.origin: dict[Keys, str] = {}

    def add(self, keys: Keys, value: Any, origin: str) -> None:
        self.values[keys], self.origin[keys] = value, origin

    def add_yaml(self, path: Path) -> None:
        """Raises ConfigError for a file of another command, and for an unknown key."""
        file, command = YamlFile.read(path), self.schema.command
        if file.command and command and file.command != command:
            raise ConfigError(
                f"{path}:1: a config for 'lavic {file.command}', not for 'lavic {command}'; --config takes one of "
                "that command"
            )
        self._add_mapping(file, file.values, ())

    def _add_mapping(self, file: YamlFile, values: Mapping[str, Any], prefix: Keys) -> None:
        for name, value in values.items():
            keys = (*prefix, str(name))
            location, dotted = f"{file.path}:{file.lines.get(keys, 1)}", ".".join(keys)
            if leaf := self.schema.leaves.get(keys):
                if isinstance(value, bool) and leaf.type in (int, float):  # yaml's `yes` would count as 1
                    raise ConfigError(f"{location}: {dotted}: should be a number, got {str(value).lower()}")
                self.add(keys, value, f"{location}: {dotted}")
            elif keys not in self.schema.groups:
                raise ConfigError(f"{location}: {self._unknown(keys)}")
            elif isinstance(value, Mapping):
                self._add_mapping(file, value, keys)
            elif value is not None:
                raise ConfigError(f"{location}: {dotted} takes keys below it, not {value!r}")

    def _unknown(self, keys: Keys) -> str:
        unknown = ".".join(keys)
        suggestion, renamed = self.schema.correction(unknown)
        if renamed and suggestion:
            return f"'{unknown}' was renamed: use '{'.'.join(suggestion)}'"
        all_keys = [*self.schema.leaves, *self.schema.groups]
        known = ", ".join(sorted({known[-1] for known in all_keys if known and known[:-1] == keys[:-1]}))
        return f"unknown key '{unknown}'; " + (
            f"did you mean '{'.'.join(suggestion)}'?" if suggestion else f"known here: {known}"
        )

    def refuse_secrets(self) -> None:
        """Raises ConfigError for a value that holds a password or a token, without showing it."""
        for keys, origin in self.origin.items():
            if not holds_secret(self.values[keys], keys[-1]):
                continue
            if Reference in self.schema.leaves[keys].markers:
                remedy = "put it into a variable or a file of your own and write env:NAME or @FILE"
            else:
                remedy = "keep it in the environment, which jobs inherit, or in a file of the program that needs it"
            raise ConfigError(
                f"{origin}: holds a password, token or key; settings are recorded and others can read a command "
                f"line: {remedy}"
            )

    def build(self, *, partial: bool = False) -> Any:
        """The validated instance; with `partial` None where keys are missing. Raises ConfigError, one line."""
        try:
            return TypeAdapter(self.schema.cls).validate_python(self._nested(self.values))
        except ValidationError as error:
            problems = error.errors(include_url=False)
        missing: list[str] = []
        messages: dict[Keys, str] = {}
        for problem in problems:
            keys = tuple(map(str, problem["loc"]))
            if problem["type"] == "missing" and keys in self.schema.leaves:
                missing.append(self.schema.flag(keys))
                continue
            while keys and keys not in self.schema.leaves and keys not in self.schema.groups:
                keys = keys[:-1]  # an element of a list, a member of a union: the first that fails says enough
            message = _MESSAGES.get(problem["type"], problem["msg"])
            message = message.removeprefix("Value error, ").removeprefix("Assertion failed, ")
            if keys in self.schema.leaves:
                message = f"{message[:1].lower()}{message[1:]}, got {self.values[keys]!r}"
                message = f"{self.origin.get(keys) or '.'.join(keys)}: {message}"
            messages.setdefault(keys, message)
        lines = list(messages.values())
        if missing and not partial:
            help_hint = f"; see 'lavic {self.schema.command} --help'" if self.schema.command else ""
            lines.append(f"missing {' and '.join(missing)}{help_hint}")
        if lines:
            raise ConfigError("; ".join(lines[:3]) + (f" (and {len(lines) - 3} more)" if len(lines) > 3 else ""))
        return None

    def _nested(self, values: Mapping[Keys, Any]) -> dict[str, Any]:
        nested: dict[Keys, dict[str, Any]] = {prefix: {} for prefix in self.schema.groups}
        for keys in [*self.schema.leaves, *self.schema.groups]:
            if keys in values or (keys in nested and keys):
                nested[keys[:-1]][keys[-1]] = nested[keys] if keys in nested else values[keys]
        return nested[()]

    def plain_values(self) -> dict[str, Any]:
        """The values so far, nested, as what yaml can hold."""
        values: dict[str, Any] = TypeAdapter(Any).dump_python(self._nested(self.values), mode="json")
        return values

    def documented_yaml(self) -> str:
        """The values so far as a documented yaml file; required keys without a value stand as comments."""
        values = self.plain_values()
        text = [f"# lavic {self.schema.command}"]
        last: Keys = ()
        for keys, leaf in self.schema.leaves.items():
            for depth in range(len(keys) - 1):
                if keys[: depth + 1] != last[: depth + 1]:
                    text += ["", f"{'  ' * depth}{keys[depth]}:"]
            last = keys[:-1]
            entry = to_yaml({keys[-1]: value_at(values, keys)}) if keys in self.values else f"# {keys[-1]}:  (required)"
            lines = [*(f"# {line}".rstrip() for line in leaf.doc.splitlines()), *entry.splitlines()]
            text += [f"{'  ' * len(last)}{line}" for line in lines]
        return "\n".join(text) + "\n"
