"""Arguments of `lavic reddit`, and the catalogue that it reads."""

from __future__ import annotations

from pathlib import Path

from tests.data.reddit.reddit_dumps import ITEMS, write_items, write_reviews


def reddit_argv(folder: Path, dumps: list[Path], out: Path, *options: str) -> list[str]:
    """The command's arguments, with catalogue and reviews of `write_catalogue(folder)`."""
    files = ["--dumps", *map(str, dumps)]
    files += ["--items", str(folder / "meta.jsonl"), "--reviews", str(folder / "r.jsonl.gz")]
    return ["reddit", *files, "--out", str(out), "--executor", "local", *options]


def write_catalogue(folder: Path) -> Path:
    """Writes a catalogue and reviews; returns the folder."""
    write_items(folder / "meta.jsonl")
    write_reviews(folder / "r.jsonl.gz", {"B1AAAAAAA1": ITEMS[0]})
    return folder
