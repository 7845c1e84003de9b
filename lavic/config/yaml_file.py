"""Yaml as settings need it: read with line numbers and without surprises, written short."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from lavic.errors import ConfigError
from lavic.storage.json_text import json_error
from lavic.storage.text_files import read_text


@dataclass(frozen=True)
class YamlFile:
    """A yaml file whose top level is a mapping."""

    path: Path
    values: dict[str, Any]
    """The mapping as plain Python values."""
    lines: dict[tuple[str, ...], int]
    """The line of every key, by its path from the top."""
    command: str
    """The command that the first line names (`# lavic crawl`), or ""."""

    @staticmethod
    def read(path: Path) -> YamlFile:
        """Reads `path`.

        Raises:
            ConfigError: It is no yaml, no mapping, or repeats a key; with file:line.
            DataError: It cannot be read, or is not text.
        """
        text = read_text(path)
        loader = _Loader(text)
        try:
            root = loader.get_single_node()
            keys_and_lines = list(_key_lines(root))
            values = (loader.construct_document(root) if root is not None else None) or {}
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            mark = getattr(error, "problem_mark", None)
            location = f"{path}:{mark.line + 1}" if mark else f"{path}"
            raise ConfigError(f"{location}: not valid yaml: {_reason(error, text)}") from None
        finally:
            loader.dispose()
        if not isinstance(values, dict):
            raise ConfigError(f"{path}:1: should be 'key: value' lines, is a {type(values).__name__}")
        lines: dict[tuple[str, ...], int] = {}
        for keys, line in keys_and_lines:
            if keys in lines:
                raise ConfigError(f"{path}:{line}: '{'.'.join(keys)}' is given twice")
            lines[keys] = line
        header = re.match(r"#\s*lavic ((?:[a-z]+(?:-[a-z]+)* ?)+)", text)
        return YamlFile(path, values, lines, header.group(1).strip() if header else "")


def find_config(name: str) -> Path:
    """The file that `--config NAME` means: a path, or the name of a file shipped in `lavic.configs` (`mini-distill`).

    Raises:
        ConfigError: There is neither; names the nearest shipped one.
    """
    path = Path(name)
    if path.is_file():
        return path
    files = (Path(str(entry)) for entry in resources.files("lavic.configs").iterdir())
    shipped = {file.stem: file for file in files if file.suffix == ".yaml"}
    if name in shipped:
        return shipped[name]
    if path.suffix or len(path.parts) > 1:
        raise ConfigError(f"--config {name}: no such file")
    similar = difflib.get_close_matches(name, shipped, 3, 0.5)
    hint = f"did you mean {' or '.join(similar)}?" if similar else f"shipped: {', '.join(sorted(shipped))}"
    raise ConfigError(f"--config {name}: neither a file nor a shipped config; {hint}")


def to_yaml(values: dict[str, Any]) -> str:
    """Plain values as yaml text: keys in their order, lists of scalars on one line, long lines unbroken."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**20, default_flow_style=False)


class _Loader(yaml.SafeLoader):
    """Safe yaml in which 1e-4 is a number (yaml 1.1 reads it as text)."""


class _Dumper(yaml.SafeDumper):
    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.SequenceNode:
        is_flat = all(not isinstance(value, (dict, list, tuple)) for value in sequence)
        return super().represent_sequence(tag, sequence, flow_style=is_flat or flow_style)

    def represent_scalar(self, tag: str, value: Any, style: str | None = None) -> yaml.ScalarNode:
        # Characters that yaml takes for line ends survive only as escapes.
        needs_escapes = isinstance(value, str) and re.search("[\x85\u2028\u2029\ufeff]", value)
        return super().represent_scalar(tag, value, '"' if needs_escapes else style)

    def ignore_aliases(self, data: Any) -> bool:
        return True


# The writer too, so that text such as "0E0" is quoted.
for _yaml_class in (_Loader, _Dumper):
    _yaml_class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


def _key_lines(node: yaml.Node | None, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            keys = (*prefix, str(key.value))
            yield keys, key.start_mark.line + 1
            yield from _key_lines(value, keys)


def _reason(error: Exception, text: str) -> str:
    if isinstance(error, RecursionError):
        return "nested too deep"
    if isinstance(error, yaml.MarkedYAMLError):
        return error.problem or "unreadable"
    # A ValueError: a date such as 2024-13-45, a number of thousands of digits.
    return " ".join(str(error).split()) if isinstance(error, yaml.YAMLError) else json_error(error, text)
