"""Who may import whom: the house rules, read from every import statement there is."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "lavic": ROOT / "lavic",
    **{f"lavic.{name}": ROOT / name for name in ("shards", "launch", "configs", "slurm")},
}

BASE = {"errors", "storage", "config", "distributed"}
"""What everything may use."""

MAY = {
    "errors": set(),
    "storage": {"errors"},
    "config": {"errors", "storage"},
    "distributed": {"errors", "storage", "config"},
    "cli": BASE,
    "data": BASE,
    "tracking": BASE,
    "endpoint": BASE,
    "metrics": BASE | {"data"},
    "model": BASE | {"data", "tracking"},
    "mini": BASE | {"data", "model"},
    # Training takes any iterable: it knows the records and how files are written, not how shards are read.
    "train": BASE | {"tracking", "model", "data.schema"},
    "recommend": BASE | {"data", "tracking", "endpoint", "metrics", "model"},
    "evaluation": BASE | {"data", "tracking", "endpoint", "metrics", "model", "recommend"},
    "shards": BASE | {"cli", "data", "tracking", "endpoint", "metrics", "model", "mini", "recommend"},
    "launch": BASE
    | {"cli", "data", "tracking", "endpoint", "metrics", "model", "train", "recommend", "evaluation", "mini"},
    "configs": set(),
    "slurm": set(),
}
"""Part -> the parts, or single modules, that it may import besides itself."""

ONLY_IN = {
    "ray": {"lavic.shards", "lavic.distributed.ray_session", "lavic.recommend.serving"},
    "aiohttp": {"lavic.shards", "lavic.endpoint"},
    "fcntl": {"lavic.storage.file_lock"},
    "deepspeed": {"lavic.train.deepspeed"},
    "mlflow": {"lavic.tracking", "lavic.recommend.mlflow_model"},
}
"""Package -> the modules (or folders of them) that may import it."""

MOST_MODULES = 12
"""A folder that needs more holds something that is a package of its own."""


def modules() -> dict[str, Path]:
    paths: dict[str, Path] = {}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            inner = path.relative_to(folder).with_suffix("").parts
            paths[".".join([package, *(part for part in inner if part != "__init__")])] = path
    return paths


MODULES = modules()


def imports(name: str, *, types: bool = True) -> Iterator[tuple[str, int]]:
    """(imported name, line) for each import statement of a module, in functions too; `types`: those for types too."""
    tree = ast.parse(MODULES[name].read_text("utf-8"))
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if not types and id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
                for _ in range(node.level - 1):
                    package = package.rpartition(".")[0]
                base = f"{package}.{base}".rstrip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield (inner if inner in MODULES else base), node.lineno


def part_of(name: str) -> str | None:
    """The part a module belongs to; None for `lavic` itself, which holds the version alone."""
    inner = name.split(".")[1:]
    if inner[:1] == ["__main__"]:
        return "cli"
    return inner[0] if inner else None


@pytest.mark.parametrize("folder", sorted({path.parent for path in MODULES.values()}), ids=str)
def test_no_folder_holds_more_than_a_dozen_modules(folder):
    modules = sorted(path.name for path in folder.glob("*.py") if path.name != "__init__.py")
    assert len(modules) <= MOST_MODULES, modules


def test_the_rules_know_every_part():
    assert {part_of(name) for name in MODULES} - {None} <= set(MAY)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_nothing_is_imported_from_above(name):
    part = part_of(name)
    wrong = []
    for other, line in imports(name):
        other_part = part_of(other) if other in MODULES else None
        allowed = {other_part, other.removeprefix("lavic.")} & (MAY.get(part or "", set()) | {part})
        if part and other_part and not allowed:
            wrong.append(f"{MODULES[name].relative_to(ROOT)}:{line}: {part} may not import {other}")
        if other.split(".")[0] in {"shards", "launch", "configs", "slurm", "tests"}:
            wrong.append(f"{MODULES[name].relative_to(ROOT)}:{line}: {other} is lavic.{other} once installed")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_heavy_package_stays_where_it_belongs(name):
    for other, line in imports(name):
        for package, places in ONLY_IN.items():
            if other.split(".")[0] == package:
                inside = any(name == place or name.startswith(f"{place}.") for place in places)
                assert inside, (
                    f"{MODULES[name].relative_to(ROOT)}:{line}: {package} is imported in {sorted(places)} only"
                )


def test_only_the_command_table_names_modules_in_text():
    """An import by name hides from the rules above: only cli.py may."""
    for name, path in MODULES.items():
        if name == "lavic.cli":
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
                raise AssertionError(f"{path.relative_to(ROOT)}:{node.lineno}: importlib.import_module")


def test_no_import_goes_in_a_circle():
    graph = {
        name: {other for other, _ in imports(name, types=False) if other in MODULES} - {name, "lavic"}
        for name in MODULES
    }
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, "a circle: " + " -> ".join([*above[above.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*above, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


def test_the_library_imports_without_the_heavy_packages():
    heavy = ("torch", "ray", "mlflow", "deepspeed", "transformers", "peft", "aiohttp", "webdataset")
    code = (
        f"import sys\nfor name in {heavy}: sys.modules[name] = None\n"
        "import lavic, lavic.cli, lavic.config.loader, lavic.distributed.context, lavic.tracking.tracker, lavic.data\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
