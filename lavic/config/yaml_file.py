"""Yaml as settings need it: read with line numbers and without surprises, written short."""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from lavic.errors import ConfigError
from lavic.storage.json_text import why
from lavic.storage.text_files import TextFileError, read_text


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
        """Reads `path`. Raises ConfigError (file:line) where it is no file, no yaml, no mapping, or repeats a key."""
        try:
            text = read_text(path)
        except TextFileError as error:
            raise ConfigError(str(error)) from None
        loader = _Loader(text)
        try:
            root = loader.get_single_node()
            lines: dict[tuple[str, ...], int] = {}
            if root is not None:
                _note_lines(root, (), lines, path)
            values = loader.construct_document(root) if root is not None else {}
        except ConfigError:
            raise
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark
            raise ConfigError(f"{path}:{mark.line + 1 if mark else 1}: not valid yaml: {error.problem}") from None
        except yaml.YAMLError as error:
            raise ConfigError(f"{path}: not valid yaml: {' '.join(str(error).split())}") from None
        except (ValueError, RecursionError) as error:  # a date such as 2024-13-45, a number of thousands of digits
            reason = "nested too deep" if isinstance(error, RecursionError) else why(error, text)
            raise ConfigError(f"{path}: not valid yaml: {reason}") from None
        finally:
            loader.dispose()
        if values is None:
            values = {}
        if not isinstance(values, dict):
            raise ConfigError(f"{path}:1: should be 'key: value' lines, is a {type(values).__name__}")
        named = re.match(r"#\s*lavic ((?:[a-z]+ ?)+)", text)
        return YamlFile(path, values, lines, named.group(1).strip() if named else "")


def find_config(name: str) -> Path:
    """The file that `--config NAME` means: a path, or the name of a file shipped in `lavic.configs` (`mini-distill`).

    Raises:
        ConfigError: neither is there; names the nearest shipped one.
    """
    path = Path(name)
    if path.is_file():
        return path
    try:
        shipped = {Path(entry.name).stem: Path(str(entry)) for entry in resources.files("lavic.configs").iterdir()}
    except ModuleNotFoundError:
        shipped = {}
    shipped = {stem: path for stem, path in shipped.items() if path.suffix == ".yaml"}
    if name in shipped:
        return shipped[name]
    if path.suffix or len(path.parts) > 1:
        raise ConfigError(f"--config {name}: no such file")
    near = difflib.get_close_matches(name, shipped, 3, 0.5)
    known = f"did you mean {' or '.join(near)}?" if near else f"shipped: {', '.join(sorted(shipped)) or 'none'}"
    raise ConfigError(f"--config {name}: neither a file nor a shipped config; {known}")


def to_yaml(values: dict[str, Any]) -> str:
    """Plain values as yaml text: keys in their order, lists of scalars on one line, long lines unbroken."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**20, default_flow_style=False)


class _Loader(yaml.SafeLoader):
    """Safe yaml in which 1e-4 is a number (yaml 1.1 reads it as text)."""


class _Dumper(yaml.SafeDumper):
    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.SequenceNode:
        short = all(not isinstance(value, (dict, list, tuple)) for value in sequence)
        return super().represent_sequence(tag, sequence, flow_style=short or flow_style)

    def represent_scalar(self, tag: str, value: Any, style: str | None = None) -> yaml.ScalarNode:
        # Characters that yaml takes for line ends survive only as escapes.
        odd = isinstance(value, str) and re.search("[\x85\u2028\u2029\ufeff]", value)
        return super().represent_scalar(tag, value, '"' if odd else style)

    def ignore_aliases(self, data: Any) -> bool:
        return True


# The writer too, so that text such as "0E0" is quoted.
for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


def _note_lines(node: yaml.Node, above: tuple[str, ...], lines: dict[tuple[str, ...], int], path: Path) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    seen: set[Hashable] = set()
    for key, value in node.value:
        keys, line = (*above, str(key.value)), key.start_mark.line + 1
        if key.value in seen:
            raise ConfigError(f"{path}:{line}: '{'.'.join(keys)}' is given twice")
        seen.add(key.value)
        lines[keys] = line
        _note_lines(value, keys, lines, path)
