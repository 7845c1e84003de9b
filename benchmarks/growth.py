"""How `lavic crawl` grows with the catalogue: time for each photo, and memory of the driver.

    python benchmarks/growth.py --json growth.json
    python benchmarks/growth.py --photos 500 1000 2000

Crawls of 5,000, 20,000 and 80,000 photos from nginx on this machine, one after another, `--rounds` times in turns.
Linear: from the first photo to the last by the server's log, the photos that one size has more than the one before cost
the same time each, within 10 % of the mean; what a crawl costs once, as the start of a second worker, is in neither.
Flat: the driver's memory at 80,000 photos is within 10 % of that at 5,000.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean, median

import meter
from crawl import lavic, stored
from photoserver import catalogue, make_photos, serving

BAR = 0.10
_MIB = 1 << 20


def main(argv: Sequence[str]) -> int:
    """Measure; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, nargs="+", default=[5_000, 20_000, 80_000], help="sizes of the crawls")
    parser.add_argument("--rounds", type=int, default=1, help="times that every size runs (default 1)")
    parser.add_argument("--check", choices=("decode", "header"), default="decode", help="lavic's --photo.check")
    parser.add_argument("--work", type=Path, default=Path("crawl-bench"), help="folder for photos and outputs")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    arguments = parser.parse_args(argv)
    sizes = sorted(arguments.photos)
    arguments.work.mkdir(parents=True, exist_ok=True)
    make_photos(arguments.work / "photos", sizes[-1])
    rows: dict[int, list[dict[str, float]]] = {size: [] for size in sizes}
    with serving(arguments.work / "photos") as server:
        links = server.links(sizes[-1])
        for number in range(arguments.rounds):
            for size in sizes if number % 2 == 0 else reversed(sizes):
                out, items = arguments.work / "out", arguments.work / "catalogue.jsonl"
                shutil.rmtree(out, ignore_errors=True)
                # Sizes that are compared run the same way.
                command = [*lavic(catalogue(items, links[:size]), out, size, arguments.check), "--executor", "ray"]
                used = meter.run(command, arguments.work / "log.txt", {"OMP_NUM_THREADS": "1"})
                span = server.span()
                if (found := stored(out)) != size:
                    raise SystemExit(f"{found:,} of {size:,} photos stored; see {arguments.work / 'log.txt'}")
                shutil.rmtree(out)
                os.sync()
                driver = [resident for _, resident in used.driver]
                rows[size].append(
                    {
                        "steady_seconds": span.last - span.first,
                        "microseconds_per_photo": 1e6 / span.rate,
                        "wall_seconds": used.wall,
                        "cpu_seconds": used.cpu,
                        "driver_mib": max(driver) / _MIB,
                        "driver_mib_at_half": driver[len(driver) // 2] / _MIB,
                        "tree_mib": used.peak / _MIB,
                    }
                )
                print(f"{size:,} photos: " + ", ".join(f"{k} {v:,.1f}" for k, v in rows[size][-1].items()), flush=True)
    found = _summary(rows, arguments.rounds, arguments.check)
    print(_table(found))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def _summary(rows: dict[int, list[dict[str, float]]], rounds: int, check: str) -> dict[str, object]:
    sizes = {size: {name: median(row[name] for row in turns) for name in turns[0]} for size, turns in rows.items()}
    further = [
        1e6 * (sizes[more]["steady_seconds"] - sizes[less]["steady_seconds"]) / (more - less)
        for less, more in pairwise(sizes)
    ]
    drivers = [figures["driver_mib"] for figures in sizes.values()]
    return {
        "rounds": rounds,
        "check": check,
        "microseconds_per_further_photo": further,
        "off_linear": max((abs(one / mean(further) - 1) for one in further), default=0.0),
        "driver_growth": drivers[-1] / drivers[0] - 1,
        "driver_growth_mib": drivers[-1] - drivers[0],
        "bar": BAR,
        "sizes": sizes,
    }


def _table(found: dict[str, object]) -> str:
    sizes: dict[int, dict[str, float]] = found["sizes"]  # type: ignore[assignment]
    lines = [
        "",
        "| photos | first to last, s | us a photo | whole wall time, s | CPU, s | driver, MiB | whole tree, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    names = ("steady_seconds", "microseconds_per_photo", "wall_seconds", "cpu_seconds", "driver_mib", "tree_mib")
    for size, figures in sizes.items():
        lines.append(f"| {size:,} | " + " | ".join(f"{figures[name]:,.1f}" for name in names) + " |")
    further: list[float] = found["microseconds_per_further_photo"]  # type: ignore[assignment]
    lines += ["", f"each further photo, from a size to the next: {', '.join(f'{one:,.0f} us' for one in further)}"]
    for name, what in {"off_linear": "off linear, at most", "driver_growth": "driver's memory, last to first"}.items():
        value: float = found[name]  # type: ignore[assignment]
        lines += ["", f"{what}: {value:+.1%} (bar {BAR:.0%}: {'met' if value <= BAR else 'MISSED'})"]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
