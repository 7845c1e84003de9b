"""SIGKILL at random moments, of whatever runs: in the end the bytes are those of a run that nothing disturbed."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from lavic.cli import main
from lavic.data.manifest import NAME
from lavic.shards.http.fetch_settings import FetchSettings
from lavic.shards.image.normalize import PhotoSettings
from lavic.shards.pack.outcomes import read_ledger
from lavic.shards.pack.seal import read_seal
from lavic.shards.pack.shard_writer import pack_shard
from lavic.shards.plan.crawl_plan import Plan, load_plan, make_plan
from lavic.shards.plan.photo_tasks import PlanSettings
from lavic.storage.atomic import remove_partial_files
from lavic.storage.paths import file_sizes

pytestmark = pytest.mark.slow

SEED = int(os.environ.get("LAVIC_KILL_SEED", random.SystemRandom().randrange(10**6)))
QUICK = ["--fetch.allow-private", "--fetch.deadline", "60", "--fetch.retries", "3", "--fetch.backoff", "0.01"]
QUICK += ["--fetch.host-rate", "0"]
PATHS = [f"n/{n}.jpg" for n in range(240)]
PATHS[7::40] = ["status/404"] * 6
PATHS[11::30] = ["n/5.jpg"] * 8
PER_SHARD = 20


def digests(folder: Path) -> dict[str, object]:
    """What must be the same: tars and indexes by their digests, and the ledgers but for attempts and seconds."""
    names = [name for name in sorted(file_sizes(folder)) if name.endswith((".tar", ".idx"))]
    files: dict[str, object] = {name: sha256((folder / name).read_bytes()).hexdigest() for name in names}
    for path in sorted(folder.glob("*.ledger.jsonl")):
        for row in read_ledger(path.with_name(path.name.replace(".ledger.jsonl", ".tar"))):
            files[f"{path.name} {row.key}"] = (row.kind, row.reason, row.bytes, row.sha256, row.same_as)
    return files


def differences(files: dict[str, object], expected: dict[str, object]) -> list[tuple[str, object, object]]:
    """What is otherwise in two of these, and nothing of what is the same."""
    names = sorted({*files, *expected})
    return [(n, files.get(n), expected.get(n)) for n in names if files.get(n) != expected.get(n)]


def pack_all(folder: Path, started: Any) -> None:
    """What a worker does, shard after shard, without Ray around it."""
    plan = load_plan(folder)
    assert plan is not None
    remove_partial_files(folder)
    started.set()
    fetch = FetchSettings(allow_private=True, concurrency=4, deadline=60.0, host_rate=0)
    for number, digest in enumerate(plan.digests):
        if read_seal(plan.shard(number), digest, file_sizes(folder)) is None:
            pack_shard(plan.shard(number), digest, fetch, PhotoSettings())


def test_a_worker_killed_at_any_moment(tmp_path: Path, catalogue: Callable[..., Path], server: Any) -> None:
    print(f"LAVIC_KILL_SEED={SEED}")
    chance = random.Random(SEED)
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["lavic.shards.pack.shard_writer", "lavic.shards.plan.crawl_plan"])
    items = (str(catalogue(*PATHS)),)
    chosen = PlanSettings(set="t", split="train", photos_per_shard=PER_SHARD, photos="first", image_size="large")

    def start(plan: Plan) -> tuple[Any, Any]:
        started = processes.Event()
        worker = processes.Process(target=pack_all, args=(plan.folder, started))
        worker.start()
        assert started.wait(120)
        return worker, time.monotonic()

    undisturbed = make_plan(items, tmp_path / "undisturbed", chosen)
    worker, began = start(undisturbed)
    worker.join()
    shard_s = (time.monotonic() - began) / len(undisturbed.digests)
    assert worker.exitcode == 0
    expected, kills, runs = digests(undisturbed.folder), 0, 0
    server.delay = 0.002
    while kills < 26:
        runs += 1
        plan = make_plan(items, tmp_path / f"run{runs}", chosen)
        while True:
            worker, _ = start(plan)
            if kills < 26:
                worker.join(chance.uniform(0, 3 * shard_s))
            else:
                worker.join()
            if worker.exitcode is None:
                os.kill(worker.pid, signal.SIGKILL)
                worker.join()
                kills += 1
                continue
            assert worker.exitcode in (0, -signal.SIGKILL)
            if worker.exitcode == 0:
                break
        assert not differences(digests(plan.folder), expected), f"seed {SEED}, run {runs}"
    print(f"{kills} kills in {runs} runs")


def command(items: Path, out: Path) -> list[str]:
    words = ["crawl", "--items", str(items), "--out", str(out), "--photos-per-shard", str(PER_SHARD)]
    return [*words, "--fetch.concurrency", "4", "--executor", "ray", *QUICK]


def below(pid: int) -> Iterator[tuple[int, str]]:
    """(process, its command line) of everything that a process has started, directly or not."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents.setdefault(int(entry.read_text().rpartition(")")[2].split()[1]), []).append(int(entry.parent.name))
        except (OSError, ValueError):
            continue
    todo = [pid]
    while todo:
        for child in parents.get(todo.pop(), []):
            todo.append(child)
            try:
                yield child, (Path("/proc") / str(child) / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.ray
def test_workers_the_driver_and_everything_killed(tmp_path: Path, catalogue: Callable[..., Path], server: Any) -> None:
    print(f"LAVIC_KILL_SEED={SEED}")
    chance, items, out = random.Random(SEED), catalogue(*PATHS), tmp_path / "out"

    def start(to: Path) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-m", "lavic", *command(items, to), "--ray.cpus", "2"]
        return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=(tmp_path / "log").open("ab"))

    def seals() -> int:
        return len(list(out.glob("*.seal.json")))

    def await_requests(running: subprocess.Popen[bytes], more: int) -> None:
        enough, until = server.requests.total() + more, time.monotonic() + 240
        while server.requests.total() < enough and running.poll() is None and time.monotonic() < until:
            time.sleep(0.02)

    # Everything at once, then the driver alone, each somewhere in the first half.
    for everything in (True, False):
        server.delay = 0.15
        running = start(out)
        await_requests(running, chance.randrange(20, 80))
        assert running.poll() is None and not (out / NAME).exists(), (tmp_path / "log").read_text()
        for pid, _ in list(below(running.pid)) if everything else ():
            kill(pid)
        kill(running.pid)
        running.wait()
    # Then workers, one after the other, while the crawl goes on to its end.
    running, killed = start(out), 0
    while killed < 4 and running.poll() is None:
        await_requests(running, chance.randrange(4, 20))
        busy = [pid for pid, words in below(running.pid) if "ray::" in words and "_make_shard" in words]
        if busy:
            kill(chance.choice(busy))
            killed += 1
    server.delay = 0.0
    assert running.wait(400) == 0, (tmp_path / "log").read_text()
    assert killed, "no worker was found to kill"
    print(f"{killed} workers killed")

    undisturbed = start(tmp_path / "undisturbed")
    assert undisturbed.wait(400) == 0, (tmp_path / "log").read_text()
    assert not differences(digests(out), digests(tmp_path / "undisturbed"))
    assert (out / NAME).read_bytes() == (tmp_path / "undisturbed" / NAME).read_bytes()
    assert not list(out.rglob("*.part")) and main(["verify", str(out)]) == 0
    lines = (tmp_path / "log").read_text().splitlines()
    ours = re.compile(r"planned |[\d,]+ of \d+ shards are complete already|[\d,]+/[\d,]+ photos ")
    assert lines and not [line for line in lines if not ours.match(line)], "Ray's own words are not for the user"


@pytest.mark.ray
def test_a_machine_of_the_cluster_killed(tmp_path: Path, catalogue: Callable[..., Path], server: Any) -> None:
    import ray
    from ray.cluster_utils import Cluster

    items, out = catalogue(*PATHS), tmp_path / "out"
    sizes_of = {"object_store_memory": 100 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **sizes_of})
    try:
        second = cluster.add_node(num_cpus=2, object_store_memory=100 << 20)
        cluster.wait_for_nodes()
        server.delay = 0.1

        def lose_a_machine() -> None:
            until = time.monotonic() + 240
            while server.requests.total() < 60 and time.monotonic() < until:
                time.sleep(0.02)
            lost.append(len(list(out.glob("*.seal.json"))))
            cluster.remove_node(second, allow_graceful=False)
            server.delay = 0.0

        lost: list[int] = []
        watcher = threading.Thread(target=lose_a_machine)
        watcher.start()
        assert main([*command(items, out), "--ray.address", cluster.address]) == 0
        watcher.join()
        assert lost and lost[0] < len(PATHS) / PER_SHARD
        assert main([*command(items, tmp_path / "undisturbed"), "--ray.address", cluster.address]) == 0
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert not differences(digests(out), digests(tmp_path / "undisturbed"))
    assert main(["verify", str(out)]) == 0
