"""Every yaml in configs/ is for a command and is understood by it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from lavic.cli import COMMANDS, main

FILES = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
RAY = [path for path in FILES if path.read_text("utf-8").startswith("# ray up\n")]
CONFIGS = [path for path in FILES if path not in RAY]


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


@pytest.mark.parametrize("path", RAY, ids=lambda path: path.stem)
def test_a_cluster_file_is_one_that_ray_up_takes(path):
    pytest.importorskip("ray")
    from ray.autoscaler._private.util import prepare_config, validate_config

    cluster = yaml.safe_load(path.read_text("utf-8"))
    validate_config(prepare_config(cluster))
    starts = cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"]
    assert all("RAY_AUTH_MODE=token" in line for line in starts if "ray start" in line)
    assert "~/.ray/auth_token" in cluster["file_mounts"]
