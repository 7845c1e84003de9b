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

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from lavic.config.schema import MISSING, POSITIONAL, REFERENCE, Keys, Schema, Seed, at, settings
from lavic.config.secrets import holds_secret, redact_all
from lavic.config.yaml_file import YamlFile, find_config, to_yaml
from lavic.errors import ConfigError

__all__ = ["Positional", "Reference", "Seed", "dump", "flatten", "load", "parse", "settings"]

T = TypeVar("T")

Positional = POSITIONAL
"""Marks a field that is given without its flag: `folder: Annotated[Path, Positional]`."""

Reference = REFERENCE
"""Marks a text field that may be `env:NAME` or `@FILE`, for what holds a password; `secrets.reveal` reads it."""


def parse(cls: type[T], argv: Sequence[str] | None, *, command: str, description: str = "") -> T:
    """Fills `cls` from its defaults, then every `--config`, then the flags.

    Args:
        cls: a class made by `settings`.
        argv: the words after the command's name; None means none.
        command: the command's name without `lavic`, for messages and help ("mini pretrain").
        description: what `--help` says above the flags; the docstring of `cls` when empty.

    Raises:
        ConfigError: a key, flag or value that cannot be right, naming the flag or file:line and the nearest known key.
        SystemExit: 0, after `--help` or `--print-config`.
    """
    from lavic.config import command_line  # and tyro: what only reads settings does not need it

    words = list(argv or ())
    schema = Schema(cls, command)
    if any(word in ("-h", "--help") for word in words):
        command_line.print_help(schema, description)
        raise SystemExit(0)
    layers, show = _read(schema, words)
    if show:
        layers.check(cls, partly=True)
        print(layers.show(), end="")
        raise SystemExit(0)
    return layers.build(cls)


def read(cls: type, argv: Sequence[str] | None, *, command: str) -> dict[str, Any]:
    """The settings that `parse` would give, as plain values; required ones that are not given are absent.

    Args:
        cls: As for `parse`.
        argv: As for `parse`.
        command: As for `parse`.

    Raises:
        ConfigError: As `parse`.
    """
    layers, _ = _read(Schema(cls, command), list(argv or ()))
    layers.check(cls, partly=True)
    return _plain(layers.values)


def load(cls: type[T], path: str | Path) -> T:
    """Reads the settings that `dump` wrote, refusing unknown keys. Raises ConfigError with file:line."""
    layers = Layers(Schema(cls, ""))
    layers.add_yaml(Path(path))
    return layers.build(cls)


def dump(chosen: Any, *, command: str = "") -> str:
    """The yaml text of an instance, every key in it; `load` gives an equal one. `command` becomes the first line.

    Secrets are left out: a setting that needs one is `env:NAME` or `@FILE`, and is read from there again.
    """
    text = to_yaml(redact_all(TypeAdapter(type(chosen)).dump_python(chosen, mode="json")))
    return f"# lavic {command}\n{text}" if command else text


def flatten(chosen: Any) -> dict[str, Any]:
    """An instance as one level of plain values, {"fetch.concurrency": 32}, without secrets: to compare and to log."""
    schema = Schema(type(chosen), "")
    plain = redact_all(TypeAdapter(type(chosen)).dump_python(chosen, mode="json"))
    return {".".join(keys): at(plain, keys) for keys in schema.leaves}


def _read(schema: Schema, words: list[str]) -> tuple[Layers, bool]:
    """The layers of a command line, and whether it asks for `--print-config`."""
    from lavic.config import command_line

    files, show, words = command_line.take_common(words, schema.command)
    layers = Layers(schema)
    for name in files:
        layers.add_yaml(find_config(name))
    for keys, value in command_line.read(schema, words):
        layers.add(keys, value, command_line.name_of(keys, schema.leaves[keys]))
    layers.refuse_secrets()
    return layers, show


_PLAINLY = {
    "missing": "too few values",
    "string_type": "should be a text; write it in quotes",
    "tuple_type": "should be a list, as [a, b]",
}
"""What is wrong with a value, where pydantic says it in Python's words."""


class Layers:
    """Values laid over one another, each remembered with where it came from."""

    def __init__(self, schema: Schema):
        self.schema = schema
        self.values: dict[str, Any] = _copy(schema.defaults)
        self.origin: dict[Keys, str] = {}

    def add(self, keys: Keys, value: Any, origin: str) -> None:
        """Lays one value over what is there."""
        here = self.values
        for key in keys[:-1]:
            here = here[key]
        here[keys[-1]] = value
        self.origin[keys] = origin

    def add_yaml(self, path: Path) -> None:
        """Lays a yaml file's keys over what is there.

        Raises:
            ConfigError: The file is for another command, or has an unknown key; names the nearest.
        """
        file = YamlFile.read(path)
        if file.command and self.schema.command and file.command != self.schema.command:
            raise ConfigError(
                f"{path}:1: a config for 'lavic {file.command}', not for 'lavic {self.schema.command}'; --config takes "
                "one of that command"
            )
        for keys, value, line in self._leaves_of(file):
            origin = f"{path}:{line}: {'.'.join(keys)}"
            if isinstance(value, bool) and self.schema.leaves[keys].is_number:
                raise ConfigError(f"{origin}: should be a number, got {str(value).lower()}")
            self.add(keys, value, origin)

    def refuse_secrets(self) -> None:
        """Raises ConfigError for a value that holds a password or a token, without showing it."""
        for keys, origin in self.origin.items():
            if not holds_secret(at(self.values, keys), keys[-1]):
                continue
            if self.schema.leaves[keys].reference:
                how = "put it into a variable or a file of your own and write env:NAME or @FILE"
            else:
                how = "keep it in the environment, which jobs inherit, or in a file of the program that needs it"
            raise ConfigError(
                f"{origin}: holds a password, token or key; settings are recorded and others can read a command "
                f"line: {how}"
            )

    def _leaves_of(self, file: YamlFile) -> Iterator[tuple[Keys, Any, int]]:
        def walk(value: Mapping[str, Any], above: Keys) -> Iterator[tuple[Keys, Any, int]]:
            for name, below in value.items():
                keys = (*above, str(name))
                line = file.lines.get(keys, 1)
                if keys in self.schema.leaves:
                    yield keys, below, line
                elif keys not in self.schema.groups:
                    raise ConfigError(self._unknown(file, keys, line))
                elif isinstance(below, Mapping):
                    yield from walk(below, keys)
                elif below is not None:
                    raise ConfigError(f"{file.path}:{line}: {'.'.join(keys)} takes keys below it, not {below!r}")

        yield from walk(file.values, ())

    def _unknown(self, file: YamlFile, keys: Keys, line: int) -> str:
        wrong = ".".join(keys)
        text = f"{file.path}:{line}: unknown key '{wrong}'"
        near = self.schema.nearest(wrong)
        return f"{text}; did you mean '{near}'?" if near else f"{text}; known here: {self._known(keys[:-1])}"

    def _known(self, above: Keys) -> str:
        every = [*self.schema.leaves, *self.schema.groups]
        return ", ".join(sorted({keys[-1] for keys in every if keys and keys[:-1] == above}))

    def build(self, cls: type[T]) -> T:
        """The checked instance. Raises ConfigError with one line for all that is wrong."""
        made = self.check(cls)
        assert made is not None
        return made

    def check(self, cls: type[T], *, partly: bool = False) -> T | None:
        """The checked instance, or None where keys are missing and `partly` allows it. Raises as `build` does."""
        try:
            return TypeAdapter(cls).validate_python(self.values)
        except ValidationError as error:
            missing, wrong = self._explain(error)
        if missing and not partly:
            see = f"; see 'lavic {self.schema.command} --help'" if self.schema.command else ""
            wrong.append(f"missing {' and '.join(missing)}{see}")
        if wrong:
            raise ConfigError("; ".join(wrong[:3]) + (f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""))
        return None

    def _explain(self, error: ValidationError) -> tuple[list[str], list[str]]:
        """The flags that are missing, and a line for each value that is wrong."""
        from lavic.config import command_line

        missing: list[str] = []
        wrong: dict[Keys, str] = {}
        for problem in error.errors(include_url=False):
            keys = self._known_part(tuple(str(part) for part in problem["loc"]))
            if problem["type"] == "missing" and keys == problem["loc"]:
                missing.append(command_line.name_of(keys, self.schema.leaves[keys]))
                continue
            message = _PLAINLY.get(problem["type"], problem["msg"])
            message = message.removeprefix("Value error, ").removeprefix("Assertion failed, ")
            if keys in self.schema.leaves:
                # One value can fail each member of a union: the first says enough.
                message = f"{message[:1].lower()}{message[1:]}, got {at(self.values, keys)!r}"
                message = f"{self.origin.get(keys) or '.'.join(keys)}: {message}"
            wrong.setdefault(keys, message)
        return missing, list(wrong.values())

    def _known_part(self, keys: Keys) -> Keys:
        while keys and keys not in self.schema.leaves and keys not in self.schema.groups:
            keys = keys[:-1]
        return keys

    def show(self) -> str:
        """The values so far as a documented yaml file: what is required and not given stands as a comment."""
        plain: dict[str, Any] = _plain(self.values)
        text = [f"# lavic {self.schema.command}"]
        last: Keys = ()
        for keys, leaf in self.schema.leaves.items():
            for depth in range(len(keys) - 1):
                if keys[: depth + 1] != last[: depth + 1]:
                    text += ["", f"{'  ' * depth}{keys[depth]}:"]
            last, indent = keys[:-1], "  " * (len(keys) - 1)
            text += [f"{indent}# {line}".rstrip() for line in leaf.doc.splitlines()]
            here = at(plain, keys, MISSING)
            entry = f"# {keys[-1]}:  (required)" if here is MISSING else to_yaml({keys[-1]: here}).rstrip("\n")
            text += [f"{indent}{line}" for line in entry.splitlines()]
        return "\n".join(text) + "\n"


def _walk(value: Any, change: Callable[[Any], Any]) -> Any:
    return {key: _walk(below, change) for key, below in value.items()} if isinstance(value, dict) else change(value)


def _copy(values: dict[str, Any]) -> dict[str, Any]:
    copied: dict[str, Any] = _walk(values, lambda value: value)
    return copied


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Values of any settings type as what yaml can hold."""
    plain: dict[str, Any] = _walk(values, lambda value: TypeAdapter(Any).dump_python(value, mode="json"))
    return plain
