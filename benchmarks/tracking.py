"""Does the record cost training anything? Step time with MLflow off, on, dead and slow.

    lavic demo --out demo
    python benchmarks/tracking.py demo --json tracking.json

Runs `lavic tune` on the demo's store again and again: without MLflow and without looks at the node; with both, into a
sqlite store; with a server that does not listen; with one that answers each request after seconds. The ways take turns,
so that a machine that slows down slows all of them. A step's time is taken from the journal, without the first steps.
The target is 2 %. Run it on an idle machine with two cores or more.
"""

from __future__ import annotations

import argparse
import hashlib
import http.server
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

BAR = 0.02
WARM = 20
"""Steps that do not count."""


class Slow(http.server.BaseHTTPRequestHandler):
    """Takes everything, late, and answers as an MLflow server with one experiment and one run would."""

    delay = 3.0
    place = ""
    """Where artifacts go, as an address."""
    answers = 0
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        time.sleep(self.delay)
        type(self).answers += 1
        info = {"run_id": "1" * 32, "experiment_id": "1", "status": "RUNNING", "lifecycle_stage": "active"}
        info["artifact_uri"] = self.place
        experiment = {"experiment_id": "1", "name": "lavic", "lifecycle_stage": "active"}
        body = json.dumps({"experiment": experiment, "run": {"info": info, "data": {}}}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        with suppress(ConnectionError):  # the run was over before the answer
            self.end_headers()
            self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        """Is quiet."""


@contextmanager
def servers(folder: Path) -> Iterator[dict[str, list[str]]]:
    """The ways to track, as words for `lavic tune`."""
    Slow.place = (folder / "artifacts").as_uri()
    slow = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=slow.serve_forever, daemon=True).start()
    with socket.socket() as dead:
        dead.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        on = ["--tracking.mlflow", "--tracking.uri"]
        yield {
            "off": ["--tracking.system-every", "0"],
            "sqlite": [*on, f"sqlite:///{folder}/mlflow.db"],
            "dead": [*on, f"http://127.0.0.1:{dead.getsockname()[1]}"],
            "slow": [*on, f"http://127.0.0.1:{slow.server_address[1]}"],
        }
    slow.shutdown()


def run(demo: Path, out: Path, steps: int, batch: int, words: list[str]) -> tuple[float, str]:
    """One run: seconds of a step, and a digest of the adapter it made."""
    catalog = demo / "catalog"
    inputs = ["--store", demo / "store", "--train", catalog / "train.jsonl", "--valid", catalog / "valid.jsonl"]
    loop = [
        "--loop.steps",
        str(steps),
        "--loop.save-every",
        "100000",
        "--loop.log-every",
        "1",
        "--loop.eval-every",
        "0",
        "--loop.global-batch-size",
        str(batch),
    ]
    line = [sys.executable, "-m", "lavic", "tune", "--config", "tune-mini", *map(str, inputs), "--out", str(out)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "LAVIC_DEVICE": "cpu"}
    done = subprocess.run([*line, *loop, *words], env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    times = {record["step"]: record["time"] for record in records if "loss" in record}
    (adapter,) = out.glob("bundle/language_adapter/*.safetensors")
    span = times[steps] - times[WARM]
    return span / (steps - WARM), hashlib.sha256(adapter.read_bytes()).hexdigest()


def main() -> int:
    """Measures; returns 1 where a way costs more than the bar or changes the adapter."""
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("demo", type=Path, help="folder of a finished `lavic demo`")
    reader.add_argument("--steps", type=int, default=200)
    reader.add_argument("--batch", type=int, default=8, help="samples of a step: the fewer, the more the record weighs")
    reader.add_argument("--rounds", type=int, default=8)
    reader.add_argument("--json", type=Path)
    chosen = reader.parse_args()
    seconds: dict[str, list[float]] = {}
    adapters = set()
    with tempfile.TemporaryDirectory() as place, servers(Path(place)) as ways:
        for number in range(chosen.rounds):
            # each round begins with another way: none is always the first, when the machine comes from something else
            turn = number % len(ways)
            for name, words in [*ways.items()][turn:] + [*ways.items()][:turn]:
                each, adapter = run(chosen.demo, Path(place) / f"{name}-{number}", chosen.steps, chosen.batch, words)
                seconds.setdefault(name, []).append(each)
                adapters.add(adapter)
                print(f"round {number + 1} {name:<7}{1000 * each:9.2f} ms a step", flush=True)
    # each round's ways ran within a minute or two of each other: their ratio, not their means, leaves drift out
    cost = {
        name: statistics.median(a / b for a, b in zip(seconds[name], seconds["off"], strict=True)) - 1
        for name in seconds
        if name != "off"
    }
    found = {
        "seconds_per_step": {name: statistics.median(each) for name, each in seconds.items()},
        "rounds": seconds,
        "cost": cost,
        "bar": BAR,
        "same_adapter": len(adapters) == 1,
        "slow_server_answered": Slow.answers,
        "steps": chosen.steps,
        "cores": len(os.sched_getaffinity(0)),
    }
    for name, share in cost.items():
        print(f"{name:<7}{share:+8.2%} of a step's time")
    print("the adapters are " + ("the same to the last byte" if found["same_adapter"] else "NOT the same"))
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=2) + "\n")
    return int(not found["same_adapter"] or max(cost.values()) > BAR)


if __name__ == "__main__":
    raise SystemExit(main())
