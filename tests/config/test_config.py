"""Settings from defaults, yaml and the command line, and what every mistake says."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

import pydantic
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lavic.cli import main
from lavic.config import Positional, dump, flatten, load, parse, settings
from lavic.errors import ConfigError


@settings
class Deep:
    """The deepest."""

    depth: int = 1
    """How deep."""


@settings
class Fetch:
    """How photos are fetched."""

    concurrency: pydantic.PositiveInt = 32
    """Requests in flight."""
    allow_private: bool = False
    """Also fetch from private addresses."""
    deep: Deep = Deep(depth=5)


@settings
class Crawl:
    """A command's settings."""

    items: list[Path]
    """Item files."""
    out: Path
    """The folder to write."""
    fetch: Fetch = Fetch(concurrency=64)
    kind: Literal["a", "b"] = "a"
    level: Literal[0, 1] = 1
    limit: int | None = None
    """Stop after so many."""
    names: tuple[str, ...] = ()
    counts: list[pydantic.PositiveInt] = field(default_factory=list)
    """How many of each."""
    pair: tuple[int, int] = (3, 4)
    lr: float = 1e-4
    extra: dict[str, float] = field(default_factory=dict)
    many: int | Literal["all"] = 3
    progress: bool = True
    place: Annotated[Path, Positional] = Path()

    def __post_init__(self) -> None:
        if self.lr > 1:
            raise ValueError(f"lr: {self.lr} is above 1")


def read(*words: str) -> Crawl:
    return parse(Crawl, words, command="crawl", description="Fetches photos.")


def error(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read("--items", "a", "--out", "b", *words)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_flags_of_every_kind():
    words = "--items a b --out c --fetch.allow-private --fetch.deep.depth 2 --kind b --level 0 --limit 7 --names x y"
    more = ["--pair", "1", "2", "--lr", "1e-5", "--extra", "{a: 1}", "--many", "all", "--no-progress"]
    assert read("here", *words.split(), *more) == Crawl(
        items=[Path("a"), Path("b")],
        out=Path("c"),
        fetch=Fetch(concurrency=64, allow_private=True, deep=Deep(depth=2)),
        kind="b",
        level=0,
        limit=7,
        names=("x", "y"),
        pair=(1, 2),
        lr=1e-5,
        extra={"a": 1.0},
        many="all",
        progress=False,
        place=Path("here"),
    )


def test_spellings():
    assert read("--items=a", "--out=-", "--fetch.allow_private").out == Path("-")
    assert read("--items", "a", "--out", "b", "--limit", "none").limit is None
    assert read("--items", "a", "--out", "b", "--lr", "-3").lr == -3
    assert read("--items", "a", "--out", "b", "--names").names == ()
    assert read("--items", "a", "--out", "b", "here").place == Path("here")
    assert parse(Fetch, ["--no-allow-private"], command="fetch").allow_private is False
    assert read("--items", "a", "--out", "b", "--fetch.no-allow-private").fetch.allow_private is False


def test_nested_defaults_come_from_the_outer_class_and_survive_a_partial_change():
    assert read("--items", "a", "--out", "b", "--fetch.allow-private").fetch == Fetch(
        concurrency=64, allow_private=True, deep=Deep(depth=5)
    )


def test_yaml_gives_defaults_and_flags_win(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("# lavic crawl\nitems: [x]\nout: y\nlr: 1e-3\nprogress: false\nfetch:\n  concurrency: 3\n")
    assert read("--config", str(file), "--out", "z") == Crawl(
        items=["x"], out="z", lr=1e-3, progress=False, fetch=Fetch(concurrency=3, deep=Deep(depth=5))
    )
    assert read("--config", str(file), "--progress").progress is True
    second = tmp_path / "d.yaml"
    second.write_text("out: second\n")
    assert read("--config", str(file), f"--config={second}").out == Path("second")


def test_settings_are_frozen_and_strict():
    chosen = read("--items", "a", "--out", "b")
    with pytest.raises(pydantic.ValidationError):
        Fetch(concurency=3)  # type: ignore[call-arg]
    with pytest.raises(AttributeError):
        chosen.out = Path("c")  # type: ignore[misc]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--itmes", "a"], "unknown flag --itmes; did you mean --items?"),
        (["--fetch.concurency", "3"], "did you mean --fetch.concurrency?"),
        (["--concurrency", "3"], "did you mean --fetch.concurrency?"),
        (["--limit", "x"], "--limit: input should be a valid integer"),
        (["--limit"], "--limit: expected one argument; see 'lavic crawl --help'"),
        (["here", "--limit", "3", "4"], "--limit takes one value, got '4' too"),
        (["--items", "c"], "--items is given twice; write all its values after one --items"),
        (["--kind", "c"], "--kind: input should be 'a' or 'b', got 'c'"),
        (["--pair", "1"], "--pair: too few values"),
        (["--fetch.concurrency", "0"], "--fetch.concurrency: input should be greater than 0"),
        (["--extra", "{a: x}"], "--extra: input should be a valid number"),
        (["--extra", "{a: "], "--extra takes yaml"),
        (["--lr", "2"], "lr: 2.0 is above 1"),
        (["--config"], "--config: expected one argument"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml: no such file"),
        (["--config", "no-such-config"], "neither a file nor a shipped config"),
    ],
)
def test_a_wrong_flag_is_one_line_that_names_it(words, expected):
    assert expected in error(*words)


def test_a_switch_takes_no_value():
    with pytest.raises(ConfigError, match=r"--allow-private takes no value \(got 'true'\)"):
        parse(Fetch, ["--allow-private", "true"], command="fetch")
    with pytest.raises(ConfigError, match="unexpected 'stray'"):
        parse(Fetch, ["stray"], command="fetch")


def test_missing_flags_are_all_named():
    with pytest.raises(ConfigError, match=r"missing --items and --out; see 'lavic crawl --help'"):
        read()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "items: [a]\nfetch:\n  concurency: 3\n",
            "3: unknown key 'fetch.concurency'; did you mean 'fetch.concurrency'?",
        ),
        ("zzz: 1\n", "1: unknown key 'zzz'; known here: counts, extra, fetch"),
        ("fetch:\n  concurrency: many\n", "2: fetch.concurrency: input should be a valid integer"),
        ("names: no\n", "1: names: should be a list, as [a, b], got False"),
        ("names: [no]\n", "1: names: should be a text; write it in quotes, got [False]"),
        ("out: a\n\nfetch: 3\n", "3: fetch takes keys below it, not 3"),
        ("out: a\nout: b\n", "2: 'out' is given twice"),
        ("out: [a\nlr: 1\n", "2: not valid yaml"),
        ("- a\n", "1: should be 'key: value' lines"),
        ("# lavic tune\nout: a\nstore: b\n", "1: a config for 'lavic tune', not for 'lavic crawl'"),
    ],
)
def test_a_wrong_yaml_names_file_and_line(tmp_path, text, expected):
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read("--config", str(file), "--items", "a", "--out", "b")
    assert str(caught.value).startswith(f"{file}:{expected}")


@pytest.mark.parametrize(
    ("command", "old", "new"),
    [
        ("tune", "loop.batch", "loop.global_batch_size"),
        ("tune", "loop.clip", "loop.max_grad_norm"),
        ("distill", "loop.keep", "loop.save_total_limit"),
        ("distill", "loop.workers", "loop.num_workers"),
        ("tune", "loop.activations", "loop.activation_checkpointing"),
        ("tune", "loop.patience", "loop.hang_warn_minutes"),
        ("embed", "workers", "num_workers"),
        ("embed", "batch", "batch_size"),
        ("describe", "batch", "batch_size"),
    ],
)
def test_a_key_of_an_older_version_is_refused_with_its_new_name(tmp_path, capsys, command, old, new):
    file = tmp_path / "config.yaml"
    *group, key = old.split(".")
    file.write_text("".join(f"{name}:\n  " for name in group) + f"{key}: 1\n")
    assert main([command, "--config", str(file)]) == 2
    assert f"{file}:{len(group) + 1}: '{old}' was renamed: use '{new}'" in capsys.readouterr().err
    for words in ([f"--{old}", "1"], [f"--{old}=1"]):
        assert main([command, *words]) == 2
        assert f"--{old} was renamed: use --{new.replace('_', '-')}" in capsys.readouterr().err


def test_a_config_of_another_command_is_refused_though_its_keys_are_known(tmp_path):
    file = tmp_path / "distill.yaml"
    file.write_text("# lavic distill\nout: elsewhere\n")
    with pytest.raises(ConfigError, match=r"distill\.yaml:1: a config for 'lavic distill', not for"):
        read("--config", str(file), "--items", "a")


def test_dump_and_load_give_the_same_instance(tmp_path):
    chosen = read("--items", "a", "--out", "b", "--lr", "1e-9", "--extra", "{a: 1e-7}", "--names", "no", "1", "")
    file = tmp_path / "config.yaml"
    file.write_text(dump(chosen, command="crawl"))
    assert file.read_text().startswith("# lavic crawl\n")
    assert load(Crawl, file) == chosen
    assert read("--config", str(file)) == chosen


@example(names=["0E0", "1e-4", "null", "~"], lr=0.0)
@given(names=st.lists(st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]))), lr=st.floats(-1e9, 1))
@pytest.mark.slow
def test_any_text_and_number_survives_dump_and_load(tmp_path_factory, names, lr):
    chosen = Crawl(items=[Path("a")], out=Path("b"), names=tuple(names), lr=lr)
    file = tmp_path_factory.mktemp("dump") / "config.yaml"
    file.write_text(dump(chosen), "utf-8")
    assert load(Crawl, file) == chosen


@pytest.mark.parametrize("text", ["limit: yes", "limit: true", "lr: on", "fetch: {concurrency: false}"])
def test_a_truth_value_is_no_number(tmp_path, text):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    assert "should be a number, got " in error("--config", str(file))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("limit: " + "[" * 5000, "nested too deep"),
        ("limit: " + "9" * 5000, "too many digits"),
        ("limit: 2024-13-45", "month must be in"),
    ],
)
@pytest.mark.slow
def test_yaml_that_cannot_be_read_is_one_line(tmp_path, text, reason):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    message = error("--config", str(file))
    assert message.startswith(f"{file}: not valid yaml: ") and reason in message and "\n" not in message
    assert "takes yaml" in error("--extra", text.removeprefix("limit: "))


def test_flatten_names_every_leaf():
    flat = flatten(read("--items", "a", "--out", "b"))
    assert flat["fetch.deep.depth"] == 5
    assert flat["items"] == ["a"]
    assert len(flat) == 16


def test_print_config_is_a_file_that_config_takes(tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        read("--out", "b", "--limit", "3", "--print-config")
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("# lavic crawl\n")
    assert "# Requests in flight.\n  concurrency: 64" in text
    assert "# items:  (required)" in text
    file = tmp_path / "printed.yaml"
    file.write_text(text)
    assert read("--config", str(file), "--items", "a") == read("--out", "b", "--limit", "3", "--items", "a")


def test_print_config_refuses_wrong_values():
    assert "--limit: " in error("--limit", "x", "--print-config")


def test_help_is_a_manual(capsys):
    with pytest.raises(SystemExit) as left:
        read("--help")
    assert left.value.code == 0
    text = capsys.readouterr().out
    for part in (
        "Fetches photos.",
        "Item files.",
        "(required)",
        "--fetch.concurrency INT",
        "--counts [INT ...]",
        "--kind {a,b}",
        "--limit INT",
        "How photos are fetched.",
        "--config",
    ):
        assert part in text
