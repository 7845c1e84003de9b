"""The command lines in documents, scripts, configurations and docstrings are such that the commands take them."""

from __future__ import annotations

import ast
import contextlib
import functools
import io
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from lavic.cli import COMMANDS, main

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "slurm/README.md", "lavic/mini/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
SCRIPTS = [*sorted((ROOT / "benchmarks").glob("*.sh")), *sorted((ROOT / "slurm").glob("*.sbatch"))]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
PROGRAMS = [
    path for folder in ("benchmarks", "lavic", "launch", "shards") for path in sorted((ROOT / folder).rglob("*.py"))
]
PARTS = {
    "evaluate": ("compare",),
    "mini": ("catalog", "dump", "serve", "pretrain", "realshape"),
    "reddit": ("rebuild",),
    "submit": ("status", "logs", "cancel", "table"),
}
FLAG = re.compile(r"(?<![\w-])--[a-z](?:[a-z0-9.-]*[a-z0-9])?")
PLACEHOLDER = re.compile(r"[A-Z][A-Z_]*|.*[${<].*|\.\.\.")
"""A word that stands for another, as OUT, N, $folder, {category}."""
OTHER_FLAGS = {"--batch", "--comment", "--data-parallel-size", "--mem", "--requeue", "--signal", "--time"}
"""Flags of SLURM and vLLM that documents mention without a command."""
OTHER_PROGRAMS = re.compile(r"deepspeed|git|make|mlflow|pip|python|ray|sbatch|scancel|serve|srun|torchrun")


def command_lines(path: Path) -> list[list[str]]:
    """The words behind `lavic` of every command in a file."""
    text = path.read_text("utf-8")
    if path.suffix == ".py":
        strings = [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)]
        texts = [string for string in strings if isinstance(string, str) and "lavic " in string]
        return [words for each in texts for words in (*commands_in_lines(each), *commands_in_words(each))]
    if path.suffix == ".md":
        blocks = re.findall(r"^```\w*\n(.*?)^```|((?:^ {4}.*\n)+)", text, re.MULTILINE | re.DOTALL)
        prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
        lines = [words for pair in blocks for words in commands_in_lines("".join(pair))]
        return [*lines, *commands_in_words(prose)]
    comments = re.sub(r"^# ?", "", "\n".join(re.findall(r"^#(?!SBATCH).*$", text, re.MULTILINE)), flags=re.MULTILINE)
    code = re.sub(r"^\s*#.*$", "", text, flags=re.MULTILINE) if path.suffix == ".sh" else ""
    return [*commands_in_lines(code), *commands_in_lines(comments), *commands_in_words(comments)]


def commands_in_lines(text: str) -> Iterator[list[str]]:
    """Those of shell lines: with continued lines, arrays of words, and whatever stands before `lavic`."""
    text = re.sub(r"\\\n\s*", " ", text)
    arrays: dict[str, str] = dict(re.findall(r"^(\w+)=\((lavic [^)]*)\)", text, re.MULTILINE))
    text = re.sub(r'"\$\{(\w+)\[@\]\}"', lambda match: arrays.get(match[1], match[0]), text)
    text = re.sub(r"=\((lavic [^)]*)\)", lambda match: f" {' '.join(match[1].split())}", text)
    for line in text.splitlines():
        if line.startswith("usage:"):
            continue
        with contextlib.suppress(ValueError):  # prose with an apostrophe
            yield from commands_of(shlex.split(line, comments=True))


def commands_in_words(text: str) -> Iterator[list[str]]:
    """Those within a sentence, in backticks or quotes; also without `lavic`, as `tune --tokens none`."""
    for quoted in re.findall(r"(?<!`)`([^`]+)`(?!`)|'(lavic [^'\n]+)'", text):
        with contextlib.suppress(ValueError):
            words = shlex.split(" ".join("".join(quoted).split()), comments=True)
            if words and words[0] in COMMANDS and any(word.startswith("--") for word in words):
                yield words
            yield from commands_of(words)


def commands_of(words: Sequence[str]) -> Iterator[list[str]]:
    """Those of one line, without the command alone."""
    for number, word in enumerate(words):
        rest = [each.strip("[]") for each in words[number + 1 :]]
        end = next((n for n, each in enumerate(rest) if re.fullmatch(r"[|&;]+|\d?[<>].*|.*;", each)), len(rest))
        if re.fullmatch(r"(.*/)?lavic|.*\.sbatch", word) and rest[:1] and rest[0] in COMMANDS and end > 1:
            yield rest[:end]


def refusal(words: Sequence[str]) -> str:
    """Why a command does not take a line, whatever its placeholders stand for; empty where it does."""
    plain = [
        "ANY" if word == "..." else word
        for before, word in zip(["", *words], words, strict=False)
        if word != "..." or before.startswith("--")
    ]
    errors = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        code = main([*plain, "--print-config"])
    message = errors.getvalue()
    values = re.findall(r"(?:got|unexpected) (?:\[|\()?'([^']*)'", message)
    named = re.search(r"unknown flag (\S+);", message)
    takes_more = re.search(rf"error: {re.escape(words[-1])}: expected .*argument", message)  # "give --index"
    if code == 0 or takes_more or (values and all(map(PLACEHOLDER.fullmatch, values))):
        return ""
    return "" if named and re.search(r"\.[A-Z]+$", named[1]) else message


@functools.cache
def every_flag() -> frozenset[str]:
    """Of all commands."""
    flags = {"--version"}
    for command in COMMANDS:
        for words in ([command], *([command, part] for part in PARTS.get(command, ()))):
            text = io.StringIO()
            with contextlib.redirect_stdout(text):
                main([*words, "--help"])
            flags |= set(FLAG.findall(re.sub(r"-\n\s+", "-", text.getvalue())))
    return frozenset(flags)


FILES = [path for path in (*PAGES, *SCRIPTS, *CONFIGS, *PROGRAMS) if command_lines(path)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_line_is_one_that_the_command_takes(path):
    wrong = {" ".join(words): message for words in command_lines(path) if (message := refusal(words))}
    assert not wrong


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_flag_in_a_sentence_is_one_of_a_command(path):
    prose = re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    quoted = re.findall(r"(?<!`)`([^`]+)`(?!`)", prose)
    flags = {flag for text in quoted if not OTHER_PROGRAMS.match(text) for flag in FLAG.findall(text)}
    groups = {flag.partition(".")[0] for flag in every_flag()}  # `--photo` for all of `--photo.*`
    benchmarks = "".join(program.read_text("utf-8") for program in (ROOT / "benchmarks").glob("*.py"))
    unknown = flags - every_flag() - groups - OTHER_FLAGS - set(re.findall(r'"(--[a-z-]+)"', benchmarks))
    assert not unknown


def test_the_lines_that_are_tried_are_those_of_readers():
    """Of every kind of file, and of an array of words that a script goes on with."""
    readme, script = command_lines(ROOT / "README.md"), command_lines(ROOT / "benchmarks" / "fashion.sh")
    assert {"reddit", "crawl", "retrieve", "tune", "evaluate", "submit"} <= {words[0] for words in readme}
    assert any(words[:3] == ["crawl", "--config", "crawl-mini"] and "--items" in words for words in script)
    assert any(words[:2] == ["mini", "pretrain"] and "--pretrain.seed" in words for words in script)
    assert command_lines(ROOT / "slurm" / "gpu.sbatch")[0][:1] != ["preflight"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("lavic mini pretrain --shards S --pretrain.batch 16", "renamed: use --pretrain.batch-size"),
        ("lavic tune --stor store", "unknown flag --stor"),
        ("lavic tune --loop.lr fast", "--loop.lr: input should be a valid number"),
        ("lavic tune --config no-such-config", "no-such-config"),
        ("lavic evaluate --arms popular", "--arms"),
        ("x; step tune lavic tune ... --loop.lr $lr --loop.steps N --tokens none | tee log", ""),
    ],
)
def test_a_line_that_is_wrong_is_refused(line, expected):
    (words,) = commands_in_lines(line)
    message = refusal(words)
    assert expected in message if expected else not message
