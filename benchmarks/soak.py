"""A soak: many photos from hosts on which twelve faults wander about, then the same photos once the hosts are mended.

    python benchmarks/soak.py --json soak.json
    python benchmarks/soak.py --photos 600 --hosts 4

At any moment 2 % of the photos have each of the faults of `soak_server.py`, and every few seconds other photos have
them. The server remembers its last answer to each photo, and the ledgers must agree photo by photo: a photo that was
answered well is stored, and each fault has its own outcome. Reruns ask for photos that were never asked for. Then the
server is mended, `--retry` asks for all failures again, every photo must be stored, and `lavic verify` must agree. The
memory of the driver and of its workers is sampled every second. Exits with 1 if anything differs from this.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from urllib.request import urlopen

from photoserver import catalogue
from soak_server import FAULTS, SLOTS

RETRY = ("gone", "http_error", "truncated", "not_image", "too_slow", "connect", "too_big", "timeout", "throttled")
FETCH = ("--fetch.allow-private", "--fetch.host-rate", "0", "--fetch.deadline", "4", "--fetch.backoff", "0.1")
FETCH += ("--fetch.concurrency", "64")
"""Every shard waits some seconds for its slow drips, so shards are large and have many requests in flight."""
_MIB = 1 << 20
_RERUNS = 10
GROWTH = 1.15
"""Memory is flat where a process does not hold more than so many times as much in the last quarter of a crawl as in the
second."""


def main(argv: Sequence[str]) -> int:
    """Run it; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=50_000, help="photos (default 50000)")
    parser.add_argument("--hosts", type=int, default=100, help="addresses of the server, each a host (default 100)")
    parser.add_argument("--epoch", type=float, default=20.0, help="seconds between moves of the faults (default 20)")
    parser.add_argument("--executor", default="auto", help="lavic's --executor (default auto)")
    parser.add_argument("--work", type=Path, default=Path("soak"), help="folder for catalogue and set")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    arguments = parser.parse_args(argv)
    arguments.work.mkdir(parents=True, exist_ok=True)
    with serving(arguments.hosts, arguments.epoch) as port:
        found = soak(arguments, port)
    print(table(found))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if found["agrees"] else 1


def soak(arguments: argparse.Namespace, port: int) -> dict[str, object]:
    """Crawl the server while it is faulty, then mended."""
    out = arguments.work / "out"
    shutil.rmtree(out, ignore_errors=True)
    # Every host has its part of each fault.
    hosts = [(31 * n + n // SLOTS) % arguments.hosts + 1 for n in range(arguments.photos)]
    links = [f"http://127.0.0.{host}:{port}/p/{n}.jpg" for n, host in enumerate(hosts)]
    items = catalogue(arguments.work / "catalogue.jsonl", links)
    words = ["crawl", "--items", str(items), "--out", str(out), *FETCH, "--executor", arguments.executor]
    words += ["--photos-per-shard", str(max(50, min(2500, arguments.photos // 8)))]
    log = arguments.work / "log.txt"
    log.write_text("")
    faulty = crawl(words, log)
    runs, outcomes = 1, kinds(out)
    while "unasked" in Counter(outcomes.values()) and runs < _RERUNS:
        crawl(words, log)
        runs, outcomes = runs + 1, kinds(out)
    with urlopen(f"http://127.0.0.1:{port}/last") as answer:
        seen = json.load(answer)
    last = {int(number): fault for number, fault in seen["last"].items()}
    rows = {name: Counter[str]() for name in ("", *FAULTS)}
    wrong = []
    for number in range(arguments.photos):
        fault, kind = last.get(number), outcomes[number]
        if fault is None or kind != (FAULTS[fault] if fault else "ok"):
            wrong.append((number, fault, kind))
        if fault is not None:
            rows[fault][kind] += 1
    urlopen(f"http://127.0.0.1:{port}/mend").close()
    mended = crawl([*words, "--retry", *RETRY], log)
    after = Counter(kinds(out).values())
    verified = subprocess.run([sys.executable, "-m", "lavic", "verify", str(out)], capture_output=True, check=False)
    flat = {name: grown for name, grown in faulty["growth"].items() if grown > GROWTH}  # type: ignore[attr-defined]
    shutil.rmtree(out)
    return {
        "photos": arguments.photos,
        "hosts": arguments.hosts,
        "runs": runs,
        "answers": seen["answers"],
        "outcomes": rows,
        "otherwise": wrong[:20],
        "otherwise_count": len(wrong),
        "faulty": faulty,
        "mended": mended,
        "stored_in_the_end": after["ok"],
        "verified": verified.returncode == 0,
        "agrees": not wrong and after["ok"] == arguments.photos and verified.returncode == 0 and not flat,
    }


def crawl(words: Sequence[str], log: Path) -> dict[str, object]:
    """Run a crawl; returns its seconds and the memory of its processes over time.

    Raises:
        SystemExit: It failed.
    """
    with log.open("a") as out:
        began = time.monotonic()
        process = subprocess.Popen([sys.executable, "-m", "lavic", *words], stdout=out, stderr=out)
        memory = Memory(process.pid)
        memory.start()
        code = process.wait()
        memory.stop()
    if code:
        raise SystemExit(f"lavic {' '.join(words)} ended with {code}:\n{log.read_text()[-2000:]}")
    return {"seconds": time.monotonic() - began, "memory_mib": memory.rows, "growth": memory.growth()}


class Memory(threading.Thread):
    """Looks at the resident memory of a driver and its workers every second."""

    def __init__(self, driver: int) -> None:
        super().__init__(daemon=True)
        self._driver, self._over = driver, threading.Event()
        self.rows: list[tuple[float, float, float]] = []
        """Seconds since the start, MiB of the driver, MiB of the largest worker."""

    def run(self) -> None:
        began = time.monotonic()
        while not self._over.wait(1.0):
            workers = [resident(pid) for pid in workers_of(self._driver)]
            self.rows.append((time.monotonic() - began, resident(self._driver), max(workers, default=0.0)))

    def stop(self) -> None:
        self._over.set()
        self.join()

    def growth(self) -> dict[str, float]:
        """Mean of the last quarter over that of the second one; empty for a crawl too short to say."""
        rows = [row for row in self.rows if row[1] and row[2]]
        if len(rows) < 40:
            return {}
        quarter = len(rows) // 4
        return {
            name: mean(row[at] for row in rows[-quarter:]) / mean(row[at] for row in rows[quarter : 2 * quarter])
            for name, at in (("driver", 1), ("worker", 2))
        }


def workers_of(driver: int) -> list[int]:
    """Processes below a driver that make shards, Ray's or forked ones."""
    parents: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):  # noqa: PTH208
        if entry.isdigit():
            try:
                stat = Path(f"/proc/{entry}/stat").read_text()
            except OSError:
                continue
            parents.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry))
    found, todo = [], [(driver, "")]
    while todo:
        parent, parent_words = todo.pop()
        for pid in parents.get(parent, []):
            try:
                words = Path(f"/proc/{pid}/cmdline").read_text()
            except OSError:
                continue
            todo.append((pid, words))
            if "ray::Map" in words or ("forkserver" in words and "forkserver" in parent_words):
                found.append(pid)
    return found


def resident(pid: int) -> float:
    """MiB of a process; 0 where it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / _MIB
    except (OSError, IndexError):
        return 0.0


def kinds(out: Path) -> dict[int, str]:
    """The outcome of every photo, by its number."""
    found = {}
    for path in out.glob("*.ledger.jsonl"):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            found[int(row["item_id"][1:])] = row["kind"]
    return found


@contextmanager
def serving(hosts: int, epoch_s: float) -> Iterator[int]:
    """The server, in a process of its own; yields its port."""
    program = Path(__file__).resolve().parent / "soak_server.py"
    with subprocess.Popen(
        [sys.executable, str(program), str(hosts), str(epoch_s)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.stdin.close()
            process.terminate()


def table(found: dict[str, object]) -> str:
    """What was answered last and what the ledgers say, and memory at ten moments."""
    outcomes: dict[str, Counter[str]] = found["outcomes"]  # type: ignore[assignment]
    answers: dict[str, int] = found["answers"]  # type: ignore[assignment]
    faulty: dict[str, list[tuple[float, float, float]]] = found["faulty"]  # type: ignore[assignment]
    lines = ["", "| answered last | answers | photos | expected | in the ledger |", "|---|---|---|---|---|"]
    for fault, counts in outcomes.items():
        said = ", ".join(f"{kind} {count:,}" for kind, count in counts.most_common()) or "-"
        expected = FAULTS[fault] if fault else "ok"
        row = (fault or "the photo", f"{answers.get(fault, 0):,}", f"{sum(counts.values()):,}", expected, said)
        lines.append(f"| {' | '.join(row)} |")
    seconds = (faulty["seconds"], found["mended"]["seconds"])  # type: ignore[index]
    lines += [
        "",
        f"{found['otherwise_count']} of {found['photos']:,} photos ended otherwise than their last answer says; "
        f"{found['runs']} runs until all were asked, the first in {seconds[0]:.0f} s",
        f"once mended, {found['stored_in_the_end']:,} of {found['photos']:,} photos stored in {seconds[1]:.0f} s; "
        f"verify {'agrees' if found['verified'] else 'DISAGREES'}",
    ]
    rows = faulty["memory_mib"]
    if rows:
        shown = [rows[len(rows) * n // 10] for n in range(10)] + [rows[-1]] if len(rows) > 10 else rows
        lines += ["", "| s | " + " | ".join(f"{row[0]:.0f}" for row in shown) + " |", "|---" * (len(shown) + 1) + "|"]
        lines.append("| driver, MiB | " + " | ".join(f"{row[1]:.0f}" for row in shown) + " |")
        lines.append("| largest worker, MiB | " + " | ".join(f"{row[2]:.0f}" for row in shown) + " |")
    for name, grown in faulty["growth"].items():  # type: ignore[attr-defined]
        lines.append(f"{name}: {grown:.2f} times as much in the last quarter as in the second")
    lines.append(f"as expected: {'yes' if found['agrees'] else 'NO'}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
