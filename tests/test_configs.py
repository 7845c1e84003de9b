"""Every yaml in configs/ is for a command and is understood by it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lavic.cli import COMMANDS, main

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


def test_there_are_configs():
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_is_understood(path, capsys):
    first = path.read_text("utf-8").partition("\n")[0]
    named = re.match(r"# lavic ([a-z]+(?: [a-z]+)?)", first)
    assert named, "the first line says which command the file is for: '# lavic COMMAND'"
    words = named[1].split()
    assert words[0] in COMMANDS
    code = main([*words, "--config", str(path), "--print-config"])
    said = capsys.readouterr()
    assert code == 0, said.err
    assert said.out.startswith("# lavic ")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_is_found_by_its_name(path, capsys):
    command = path.read_text("utf-8").split()[2]
    words = path.read_text("utf-8").partition("\n")[0].removeprefix("# lavic ").split()
    sub = words[:2] if command == "mini" else words[:1]
    assert main([*sub, "--config", path.stem, "--print-config"]) == 0
    capsys.readouterr()
