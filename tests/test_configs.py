"""Every yaml in configs/ is for a command and is understood by it."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import yaml
from pydantic import TypeAdapter

from lavic.cli import COMMANDS, command_module, main
from lavic.config import parse_values
from lavic.config.schema import Positional, Schema, is_settings
from lavic.config.yaml_file import YamlFile
from lavic.launch.pipeline.settings import Stage

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "configs").glob("*.yaml"))
RAY = [path for path in FILES if path.read_text("utf-8").startswith("# ray up\n")]
DEPLOYED = [path for path in FILES if path.read_text("utf-8").startswith("# serve deploy\n")]
CONFIGS = [path for path in FILES if path not in (*RAY, *DEPLOYED)]


def settings_classes() -> Iterator[type]:
    """Every settings class of the package."""
    for folder in ("lavic", "launch", "shards"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if "@settings\nclass" not in path.read_text("utf-8"):
                continue
            inner = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            module = importlib.import_module(inner if folder == "lavic" else f"lavic.{inner}")
            yield from (cls for cls in vars(module).values() if is_settings(cls) and cls.__module__ == module.__name__)


@pytest.mark.parametrize("cls", settings_classes(), ids=lambda cls: cls.__name__)
def test_every_number_has_bounds(cls):
    """What cannot be right (a rank of 0, a share of 1.5) is refused where it is read, with the flag's name."""
    unbounded = []
    for name, schema in TypeAdapter(cls).json_schema()["properties"].items():
        for kind in (schema, schema.get("items", {}), *schema.get("anyOf", ())):
            bounds = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"} & kind.keys()
            if kind.get("type") in ("integer", "number") and not bounds:
                unbounded.append(name)
    assert not unbounded


@pytest.mark.parametrize("cls", settings_classes(), ids=lambda cls: cls.__name__)
def test_a_list_that_needs_a_value_has_one(cls):
    """A list that is required or has values by default is refused when it is empty, unless it stands without a flag."""
    keys = Schema(cls)
    lists = {name: leaf for (name, *below), leaf in keys.leaves.items() if not below and leaf.syntax == "list"}
    with_flag = [name for name, leaf in lists.items() if Positional not in leaf.markers]
    needed = [name for name in with_flag if keys.defaults.get((name,), True)]
    schema = TypeAdapter(cls).json_schema()["properties"]
    assert not [name for name in needed if schema[name].get("minItems", 0) < 1]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("retrieve --methods", "--methods: tuple should have at least 1 item after validation, not 0"),
        ("retrieve --text.fields", "--text.fields: tuple should have at least 1 item"),
        ("serve --hosts shop.example.org http://shop.example.org", "--hosts: should be names such as shop.example.org"),
        ("serve --hosts shop.example.org:8000", "--hosts: should be names such as shop.example.org"),
        ("serve --cors https://shop.example.org/", "--cors: should be origins such as https://shop.example.org"),
        ("serve --cors shop.example.org", "--cors: should be origins such as https://shop.example.org"),
        ("register --name a/b", "--name: string should match pattern"),
        ("register --name ''", "--name: string should match pattern"),
        ("submit --stages", "--stages: tuple should have at least 1 item"),
        ("tune --lora.r 0", "--lora.r: input should be greater than 0, got '0'"),
        ("tune --lora.alpha 0", "--lora.alpha: input should be greater than 0"),
        ("tune --lora.dropout 1.5", "--lora.dropout: input should be less than 1, got '1.5'"),
        ("tune --lora.dropout -0.1", "--lora.dropout: input should be greater than or equal to 0"),
        ("tune --loop.lr nan", "--loop.lr: input should be a finite number"),
        ("tune --loop.lr inf", "--loop.lr: input should be a finite number"),
        ("tune --loop.seed -1", "--loop.seed: input should be greater than or equal to 0"),
        ("distill --loop.seed 4294967296", "--loop.seed: input should be less than 4294967296"),
        ("demo --seed -1", "--seed: input should be greater than or equal to 0"),
        ("evaluate --seed -1", "--seed: input should be greater than or equal to 0"),
        ("recommend --top 0", "--top: input should be greater than 0, got '0'"),
        ("recommend --top -1", "--top: input should be greater than 0, got '-1'"),
        ("mini pretrain --pretrain.mastery 1.5", "--pretrain.mastery: input should be less than or equal to 1"),
    ],
)
def test_a_number_that_cannot_be_right_is_refused_by_its_flag(words, expected, capsys):
    assert main([*shlex.split(words), "--print-config"]) == 2
    assert expected in capsys.readouterr().err


def test_there_are_configs():
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_is_understood(path, capsys):
    first = path.read_text("utf-8").partition("\n")[0]
    named = re.match(r"# lavic ([a-z-]+(?: [a-z]+)?)", first)
    assert named, "the first line says which command the file is for: '# lavic COMMAND'"
    words = named[1].split()
    assert words[0] in COMMANDS
    code = main([*words, "--config", str(path), "--print-config"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert captured.out.startswith("# lavic ")


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


@pytest.mark.parametrize("path", DEPLOYED, ids=lambda path: path.stem)
def test_an_application_file_is_one_that_serve_deploy_takes(path):
    schema = pytest.importorskip("ray.serve.schema")
    from lavic.recommend.serve_settings import ServeSettings, is_loopback

    values = yaml.safe_load(path.read_text("utf-8"))
    (application,) = schema.ServeDeploySchema.model_validate(values).applications
    module, _, name = application.import_path.partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    chosen = ServeSettings(**application.args)
    assert chosen.host == values["http_options"]["host"] and (chosen.token or is_loopback(chosen.host))


@pytest.mark.parametrize("command", get_args(Stage))
def test_settings_of_a_stage_are_those_that_it_prints(command, capsys):
    files = [path for path in CONFIGS if YamlFile.read(path).command == command]
    words = ["--config", str(files[0])] if files else []
    assert main([command, *words, "--print-config"]) == 0
    settings = command_module(command).SETTINGS
    assert parse_values(settings, words, command=command) == yaml.safe_load(capsys.readouterr().out)
