"""The crawl beside img2dataset and beside a plain loop: the same photos from nginx on this machine, in turns.

    python benchmarks/crawl.py --json crawl.json
    python benchmarks/crawl.py --photos 200 --small 100 --rounds 1

Four ways to fetch the same photos of about 48 KB: `lavic crawl` with `--photo.check decode` and `--photo.check header`,
img2dataset with its best settings for the machine's cores (no resize, bytes kept), and one request after another with
requests and Pillow. Every round runs all four and begins with another one. All are measured alike, from outside: photos
a second from the first photo to the last by the server's own log; CPU seconds and memory of the whole tree of
processes, the server's not among them; and the wall time of the whole command, its start counted.

Then a small crawl, of which the start is a large part: 2,000 photos by lavic and img2dataset, by whole wall time.

img2dataset asks for other versions of what lavic uses, so it lives in an environment of its own:

    python -m venv crawl-bench/img2dataset && crawl-bench/img2dataset/bin/pip install img2dataset==1.47.0

Without it its column is left out, and the run says so. Needs nginx (apt-get install nginx-light) and requests.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median

import meter
from photoserver import PhotoServer, Span, catalogue, make_photos, serving

HERE = Path(__file__).resolve().parent
BARS = {"ratio_decode": 1.5, "ratio_header": 3.0, "ratio_serial": 4.0}
SMALL_BAR = 1.0
"""At most so many times img2dataset's wall time for a small crawl."""
MEANING = {
    "ratio_decode": "lavic, decode / img2dataset",
    "ratio_header": "lavic, header / img2dataset",
    "ratio_serial": "lavic, decode / serial loop",
}
DECODE, HEADER, IMG2DATASET, SERIAL = "lavic, decode", "lavic, header", "img2dataset", "serial loop"
UNLIMITED = ("--fetch.host-rate", "0", "--fetch.host-connections", "0")
"""A server of one's own is not spared; robots.txt and opt-outs are heeded as always."""
_MIB = 1 << 20


@dataclass(frozen=True)
class Turn:
    """One tool's figures of one round."""

    span: Span
    used: meter.Used

    @property
    def figures(self) -> dict[str, float]:
        """By name."""
        steady = self.used.cpu_between(self.span.first, self.span.last)
        return {
            "photos_per_second": self.span.rate,
            "photos_per_cpu_second": self.span.photos / self.used.cpu,
            "steady_photos_per_cpu_second": self.span.photos / max(1e-9, steady),
            "peak_mib": self.used.peak / _MIB,
            "wall_seconds": self.used.wall,
            "cpu_seconds": self.used.cpu,
        }


@dataclass(frozen=True)
class Tool:
    """A way to fetch the photos."""

    name: str
    command: Callable[[Path], list[str]]
    """The command that writes into a folder."""
    count: Callable[[Path], int]
    """Photos that stand in that folder afterwards."""


def main(argv: Sequence[str]) -> int:
    """Measure; returns the exit code."""
    arguments = _arguments(argv)
    arguments.work.mkdir(parents=True, exist_ok=True)
    photos = arguments.work / "photos"
    make_photos(photos, max(arguments.photos, arguments.small))
    with serving(photos) as server:
        tools, missing = _tools(arguments, server, arguments.photos)
        turns = _rounds(tools, arguments.rounds, arguments.photos, server, arguments.work)
        tools, _ = _tools(arguments, server, arguments.small)
        tools = [tool for tool in tools if tool.name in (DECODE, IMG2DATASET)]
        small = _rounds(tools, arguments.rounds, arguments.small, server, arguments.work) if arguments.small else {}
    found = _summary(turns, arguments, missing) | _small(small, arguments)
    print(_table(found))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=60_000, help="photos in each turn (default 60000)")
    parser.add_argument("--small", type=int, default=2_000, help="photos of the small crawl (default 2000; 0: none)")
    parser.add_argument("--rounds", type=int, default=3, help="times that every tool runs (default 3)")
    parser.add_argument("--work", type=Path, default=Path("crawl-bench"), help="folder for photos and outputs")
    parser.add_argument(
        "--img2dataset",
        type=Path,
        help="the img2dataset command of its own environment (default: WORK/img2dataset/bin/img2dataset)",
    )
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--only", nargs="+", choices=(DECODE, HEADER, IMG2DATASET, SERIAL), help="run these alone")
    arguments = parser.parse_args(argv)
    if arguments.photos < 2 or arguments.rounds < 1:
        parser.error("--photos must be 2 or more and --rounds 1 or more")
    return arguments


def _tools(arguments: argparse.Namespace, server: PhotoServer, photos: int) -> tuple[list[Tool], dict[str, str]]:
    """The tools that are here, to fetch so many photos, and why the others are not."""
    work, cores = arguments.work, os.cpu_count() or 1
    urls = server.links(photos)
    items = catalogue(work / f"catalogue-{photos}.jsonl", urls)
    links = work / f"links-{photos}.txt"
    links.write_text("\n".join(urls) + "\n")
    other = arguments.img2dataset or work / "img2dataset" / "bin" / "img2dataset"
    found = [
        Tool(DECODE, lambda out: lavic(items, out, photos, "decode"), stored),
        Tool(HEADER, lambda out: lavic(items, out, photos, "header"), stored),
        Tool(IMG2DATASET, lambda out: _img2dataset(other, links, out, photos, cores), _succeeded),
        Tool(SERIAL, lambda out: [sys.executable, str(HERE / "serial_crawl.py"), str(links), str(out)], _files),
    ]
    missing = {}
    if not other.exists():
        missing[IMG2DATASET] = (
            f"no {other}; python -m venv {other.parent.parent} && {other.parent}/pip install img2dataset==1.47.0"
        )
    for name, why in missing.items():
        print(f"left out: {name}: {why}", flush=True)
    chosen = arguments.only or [tool.name for tool in found]
    return [tool for tool in found if tool.name not in missing and tool.name in chosen], missing


def lavic(items: Path, out: Path, photos: int, check: str) -> list[str]:
    """`lavic crawl` for a server that stands on this machine."""
    command = [sys.executable, "-m", "lavic", "crawl", "--items", str(items), "--out", str(out)]
    # As many shards for every worker, so that none waits for the other at the end.
    each = max(1, min(1000, -(-photos // (os.cpu_count() or 1))))
    return [*command, "--photos-per-shard", str(each), "--photo.check", check, "--fetch.allow-private", *UNLIMITED]


def _img2dataset(program: Path, links: Path, out: Path, photos: int, cores: int) -> list[str]:
    # Tried: 8 to 64 threads a process, one and two processes a core. EXIF and hash are left off, which spares it work
    # that lavic does. One shard for each process, up to its default size: at the end of a shard its threads wait.
    options = {
        "url_list": links,
        "output_folder": out,
        "output_format": "webdataset",
        "resize_mode": "no",
        "skip_reencode": True,
        "extract_exif": False,
        "compute_hash": None,
        "processes_count": cores,
        "thread_count": 32,
        "number_sample_per_shard": max(1, min(10_000, -(-photos // cores))),
    }
    return [str(program), *(f"--{name}={value}" for name, value in options.items())]


def _rounds(tools: Sequence[Tool], rounds: int, photos: int, server: PhotoServer, work: Path) -> dict[str, list[Turn]]:
    turns: dict[str, list[Turn]] = {tool.name: [] for tool in tools}
    for number in range(rounds):
        first = number % len(tools)
        for tool in [*tools[first:], *tools[:first]]:
            turn = _turn(tool, photos, server, work)
            turns[tool.name].append(turn)
            said = ", ".join(f"{name} {value:,.1f}" for name, value in turn.figures.items())
            print(f"round {number + 1}: {tool.name}: {said}", flush=True)
    return turns


def _turn(tool: Tool, photos: int, server: PhotoServer, work: Path) -> Turn:
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    used = meter.run(tool.command(out), work / "log.txt", {"OMP_NUM_THREADS": "1"})
    span = server.span()
    stored = tool.count(out)
    shutil.rmtree(out)
    # What is still on its way to the disk is not the next one's.
    os.sync()
    if (stored, span.photos, span.failed) != (photos, photos, 0):
        raise SystemExit(f"{tool.name}: {stored:,} of {photos:,} stored; the server counts {span}")
    return Turn(span, used)


def stored(out: Path) -> int:
    """Photos in a whole set."""
    return int(sum(shard["samples"] for shard in json.loads((out / "manifest.json").read_text())["shards"]))


def _succeeded(out: Path) -> int:
    return sum(json.loads(path.read_text())["successes"] for path in out.glob("*_stats.json"))


def _files(out: Path) -> int:
    return sum(1 for _ in out.glob("*.jpg"))


def _small(turns: dict[str, list[Turn]], arguments: argparse.Namespace) -> dict[str, object]:
    """Wall times of the small crawl, and the ratio of their medians."""
    walls = {tool: [turn.used.wall for turn in rows] for tool, rows in turns.items()}
    both = DECODE in walls and IMG2DATASET in walls
    ratio = median(walls[DECODE]) / median(walls[IMG2DATASET]) if both else None
    return {"small_photos": arguments.small, "small_wall_seconds": walls, "ratio_small": ratio, "bar_small": SMALL_BAR}


def _summary(turns: dict[str, list[Turn]], arguments: argparse.Namespace, missing: dict[str, str]) -> dict[str, object]:
    tools = {}
    for tool, rows in turns.items():
        figures = [row.figures for row in rows]
        tools[tool] = {
            name: {"median": median(row[name] for row in figures), "rounds": [row[name] for row in figures]}
            for name in figures[0]
        }
    rates = {tool: figures["photos_per_second"]["median"] for tool, figures in tools.items()}

    def ratio(one: str, other: str) -> float | None:
        return rates[one] / rates[other] if one in rates and other in rates else None

    return {
        "photos": arguments.photos,
        "rounds": arguments.rounds,
        "ratio_decode": ratio(DECODE, IMG2DATASET),
        "ratio_header": ratio(HEADER, IMG2DATASET),
        "ratio_serial": ratio(DECODE, SERIAL),
        "bars": BARS,
        "tools": tools,
        "left_out": missing,
        "machine": {"cores": os.cpu_count(), "processor": _processor(), "python": platform.python_version()},
        "versions": {name: version(name) for name in ("lavic", "ray", "aiohttp", "pillow", "requests")},
    }


def _table(found: dict[str, object]) -> str:
    tools: dict[str, dict[str, dict[str, float]]] = found["tools"]  # type: ignore[assignment]
    base = tools.get(IMG2DATASET)
    columns = {
        "photos_per_second": "photos/s",
        "photos_per_cpu_second": "photos per CPU second",
        "steady_photos_per_cpu_second": "the same, start-up left out",
        "peak_mib": "peak memory, MiB",
        "wall_seconds": "whole wall time, s",
    }
    lines = [
        "",
        f"{found['photos']:,} photos, medians of {found['rounds']} rounds; in brackets: ratio to img2dataset",
        "",
        "| | " + " | ".join(columns.values()) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for tool, figures in tools.items():
        cells = []
        for name in columns:
            value = figures[name]["median"]
            beside = f" ({value / base[name]['median']:.2f})" if base and tool != IMG2DATASET else ""
            cells.append(f"{value:,.0f}{beside}" if value >= 100 else f"{value:,.1f}{beside}")
        lines.append(f"| {tool} | " + " | ".join(cells) + " |")
    lines += ["", "| | ratio of photos/s | bar | |", "|---|---|---|---|"]
    for name, bar in BARS.items():
        value = found[name]
        words = ("-", "not measured") if value is None else (f"{value:.2f}", "met" if value >= bar else "MISSED")  # type: ignore[operator,str-bytes-safe]
        lines.append(f"| {MEANING[name]} | {words[0]} | {bar:g} | {words[1]} |")
    walls: dict[str, list[float]] = found["small_wall_seconds"]  # type: ignore[assignment]
    if walls:
        lines += ["", f"| {found['small_photos']:,} photos, whole wall time | median, s | rounds |", "|---|---|---|"]
        for tool, seconds in walls.items():
            lines.append(f"| {tool} | {median(seconds):.1f} | {', '.join(f'{value:.1f}' for value in seconds)} |")
        value = found["ratio_small"]
        words = ("-", "not measured") if value is None else (f"{value:.2f}", "met" if value <= SMALL_BAR else "MISSED")  # type: ignore[operator,str-bytes-safe]
        lines.append(f"| {DECODE} / {IMG2DATASET} (bar: at most {SMALL_BAR:g}) | {words[0]} | {words[1]} |")
    return "\n".join(lines)


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
