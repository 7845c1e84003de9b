"""`lavic submit` on a real SLURM of two nodes: the whole miniature pipeline, called twice, and a stage that fails."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from lavic.data.conversations import read_conversations
from lavic.data.manifest import digest_manifest
from lavic.mini.catalog import CatalogueSize, write_catalogue
from lavic.mini.photo_server import PhotoServer
from lavic.mini.reddit_dump import TEST_FROM, VALID_FROM
from tests.slurm.slurm_jobs import Slurm, wait_for

pytestmark = [pytest.mark.slurm, pytest.mark.ray]

SIZE = CatalogueSize(
    train_items=150,
    heldout_items=40,
    combination_items=40,
    train_conversations=64,
    valid_conversations=8,
    test_conversations=8,
)
NASTY = "mini/it's $(touch pwned) `touch pwned`; *.jsonl"
"""A catalogue's name that a shell would act on."""
FEW = "{loop: {steps: 4, save_every: 2, eval_every: 0}}"


@dataclass(frozen=True)
class Site:
    """Where somebody sits who submits pipelines."""

    slurm: Slurm
    folder: Path
    watched: list[str] = field(default_factory=list)
    """What `lavic submit status --watch` printed while the first pipeline ran, split at each change."""

    @property
    def env(self) -> dict[str, str]:
        venv = {"LAVIC_VENV": sys.prefix, "LAVIC_PYTHON": sys.executable, "LAVIC_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
        return {**self.slurm.env, **venv, "LAVIC_PREFLIGHT": "0"}

    def lavic(self, *args: str) -> subprocess.CompletedProcess[str]:
        """`lavic ARGS` in the folder."""
        args = (sys.executable, "-m", "lavic", *args)
        return subprocess.run(args, env=self.env, cwd=self.folder, capture_output=True, text=True, timeout=240)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Runs `lavic submit status --watch` beside the block, which ends when the pipeline has ended."""
        args = (sys.executable, "-m", "lavic", "submit", "status", "a run", "--watch")
        with subprocess.Popen(args, env=self.env, cwd=self.folder, stdout=subprocess.PIPE, text=True) as process:
            try:
                yield
                printed, _ = process.communicate(timeout=120)
            finally:
                process.kill()
        assert process.returncode == 0, printed
        self.watched.extend(re.split(r"^\d{4}-\d\d-\d\d [\d:]+\n", printed, flags=re.M))

    def submit(self, *args: str) -> subprocess.CompletedProcess[str]:
        """`lavic submit` of the miniature with few steps."""
        few = ("--distill.settings", FEW, "--tune.settings", FEW, "--tracking.uri", f"sqlite:///{self.folder}/m.db")
        return self.lavic(
            "submit", "--config", "pipeline-mini", "--out", "a run", "--photos.valid.items", NASTY, *few, *args
        )

    def status(self) -> dict[str, dict[str, str]]:
        """The output of `lavic submit status`, by step."""
        done = self.lavic("submit", "status", "a run", "--json")
        return {row["step"]: row for row in map(json.loads, done.stdout.splitlines())}

    def ended(self) -> bool:
        """Whether no job of ours is left."""
        return not self.slurm.run("squeue", "--noheader").stdout.strip()

    @property
    def logs(self) -> str:
        """The ends of all logs."""
        files = sorted((self.folder / "a run" / "logs").glob("*.log"))
        return "\n".join(f"== {file.name}\n{file.read_text(errors='replace')[-1500:]}" for file in files)


@pytest.fixture(scope="module")
def site(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A synthetic catalogue whose photos are served, and the pipeline run on it once."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "mini" / "images").mkdir(parents=True)
    with PhotoServer(folder / "mini" / "images") as server:
        write_catalogue(folder / "mini", base_url=server.url, size=SIZE, seed=0)
        (folder / "mini" / "item2meta_valid.jsonl").rename(folder / NASTY)
        site = Site(slurm, folder)
        done = site.submit()
        assert done.returncode == 0, done.stderr
        with site.watching():
            try:
                wait_for(site.ended, 900, "the pipeline", every=0.5)
            except TimeoutError as error:
                raise TimeoutError(f"{error}\n{site.logs}") from None
        yield site


def test_the_whole_pipeline_runs_and_a_second_call_finds_it_done(site: Site) -> None:
    steps = site.status()
    assert {row["state"] for row in steps.values()} == {"done"}, site.logs
    assert [row["slurm"] for row in steps.values()] == ["COMPLETED"] * 9
    assert re.fullmatch(r"hit rate \d\.\d+", steps["evaluate"]["progress"])
    assert (site.folder / "a run" / "evaluation" / "report.html").is_file()

    again = site.submit()
    assert again.returncode == 0, again.stderr
    assert re.findall(r"^\S+ +done$", again.stdout, re.M) and again.stdout.count(" done") == 9
    assert "nothing to submit" in again.stdout and site.ended()
    assert not list(site.folder.rglob("pwned"))


def test_the_status_is_watched_until_every_job_has_ended(site: Site) -> None:
    assert len(site.watched) > 2, "a pipeline takes longer than two queries of the status"
    states = [re.findall(r"^(\S+)  +(\w+)", table, re.M)[1:] for table in site.watched]
    assert all(len(steps) == 9 for steps in states), site.watched
    assert {"running", "waiting"} <= {state for steps in states for _, state in steps}
    assert {state for _, state in states[-1]} == {"done"}
    assert re.search(r"^crawl-train +done +\d+ +\d+:\d\d", site.watched[-1], re.M)


def test_the_stages_stand_under_one_run_in_mlflow(site: Site) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{site.folder}/m.db")
    experiment = client.get_experiment_by_name("lavic-mini")
    assert experiment is not None
    runs = {run.data.tags["mlflow.runName"]: run for run in client.search_runs([experiment.experiment_id])}
    parent = runs.pop(f"{site.folder.name}/a run")
    assert parent.info.status == "FINISHED"
    assert {"crawl-train", "crawl-valid", "distill", "tune", "evaluate"} <= runs.keys()
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {parent.info.run_id}


def test_a_result_leads_back_to_shards_store_adapters_conversations_and_commit(site: Site) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{site.folder}/m.db")
    experiment = client.get_experiment_by_name("lavic-mini")
    assert experiment is not None

    def find(**tags: str) -> Any:
        clauses = [f"tags.`{name.replace('__', ' ').replace('_', '.')}` = '{value}'" for name, value in tags.items()]
        (run,) = client.search_runs([experiment.experiment_id], " and ".join(clauses))
        return run

    out = site.folder / "a run"
    evaluation = find(lavic_command="evaluate")
    tags = evaluation.data.tags
    tune = find(lavic_command="tune", adapter_language=tags["adapter.language"])
    distill = find(lavic_command="distill", adapter_vision=tags["adapter.vision"])
    assert (tune.data.tags["mlflow.runName"], distill.data.tags["mlflow.runName"]) == ("tune", "distill")
    digests = {entry.dataset.name: entry.dataset.digest for entry in evaluation.inputs.dataset_inputs}
    read = {entry.dataset.name: entry.dataset.digest for entry in tune.inputs.dataset_inputs}
    assert digests["item store"] == read["item store"] == tags["digest.item store"]
    test = hashlib.sha256((site.folder / "mini" / "test.jsonl").read_bytes()).hexdigest()
    assert test.startswith(digests["held_out_items"])
    shards = [digest_manifest(out / "shards" / split)[:16] for split in ("train", "valid")]
    assert tags["digest.shards"] == ",".join(shards)
    results = json.loads((out / "evaluation" / "results.json").read_text())["lineage"]
    assert results["bundles"]["lavic"]["language_adapter"] == tags["adapter.language"]
    assert results["conversations"]["held_out_items"]["sha256"] == test
    assert results["commit"] == tags.get("mlflow.source.git.commit")


def test_a_sweep_of_three_categories_is_two_arrays_and_one_table(site: Site) -> None:
    """Stage 1 and the store are there: stage 2 and evaluation run once for each category, as tasks of arrays."""
    for part in ("shards", "store"):
        shutil.copytree(site.folder / "a run" / part, site.folder / "swept" / part)
    shutil.copytree(site.folder / "a run" / "runs" / "distill", site.folder / "swept" / "runs" / "distill")
    for number, category in enumerate(("mugs", "shoes", "bags")):
        (site.folder / "mini" / category).mkdir()
        for name in ("train", "valid", "test"):
            rows = (site.folder / "mini" / f"{name}.jsonl").read_text().splitlines(keepends=True)
            (site.folder / "mini" / category / f"{name}.jsonl").write_text("".join(rows[number::3]))
    words = ["--out", "swept", "--tracking.no-mlflow", "--sweep.categories", "mugs", "shoes", "bags"]
    words += ["--sweep.candidates", "candidates_st", "--conversations.test", "mini/{category}/test.jsonl"]
    words += [f"--conversations.{name}=mini/{{category}}/{name}.jsonl" for name in ("train", "valid")]
    words += ["--evaluate.settings", "{draws: 200, arms: [lavic, list_order, random]}", "--tune.nodes", "1"]
    done = site.submit(*words)
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"^tune +array (\d+) of 3 tasks\nevaluate +array \d+ of 3 tasks, each after its task of \1$", done.stdout, re.M
    )
    try:
        wait_for(site.ended, 600, "the sweep", every=0.5)
    finally:
        logs = [file.read_text(errors="replace")[-1500:] for file in (site.folder / "swept" / "logs").glob("*.log")]
    rows = [json.loads(line) for line in site.lavic("submit", "status", "swept", "--json").stdout.splitlines()]
    cells = {row["step"]: row["state"] for row in rows if "cell" in row}
    assert cells == {
        f"{stage}-{name}-st-0": "done" for stage in ("tune", "evaluate") for name in ("mugs", "shoes", "bags")
    }, logs

    again = site.submit(*words)
    assert "no cell to submit" in again.stdout and site.ended()
    assert site.lavic("submit", "table", "swept").returncode == 0
    table = json.loads((site.folder / "swept" / "table.json").read_text())
    assert not table["missing"]
    values = {(row["category"], row["arm"]): row for row in table["rows"]}
    for arm in ("lavic", "list_order", "random"):
        parts = [values[category, arm] for category in ("mugs", "shoes", "bags")]
        total = sum(part["conversations"] for part in parts)
        hits = sum(part["metrics"]["hit_rate"]["value"] * part["conversations"] for part in parts)
        assert values["all", arm]["conversations"] == total == 8
        assert values["all", arm]["metrics"]["hit_rate"]["value"] == pytest.approx(hits / total)


def test_from_a_reddit_dump_to_an_answer_over_http(site: Site) -> None:
    """Conversations are made from a dump, candidates searched for in the whole catalogue; the result is served."""
    for part in ("shards", "store"):
        shutil.copytree(site.folder / "a run" / part, site.folder / "raw" / part)
    shutil.copytree(site.folder / "a run" / "runs" / "distill", site.folder / "raw" / "runs" / "distill")
    dump = site.lavic("mini", "dump", "--catalog", "mini", "--out", "dumps")
    assert dump.returncode == 0, dump.stderr
    days = ("--split.valid-from", VALID_FROM, "--split.test-from", TEST_FROM)
    reddit = site.lavic(
        *("reddit", "--dumps", "dumps/*.zst", "--items", "mini/meta_Mini.jsonl"),
        *("--out", "conversations", "--executor", "local", *days),
    )
    assert reddit.returncode == 0, reddit.stderr
    files = {name: f"conversations/{name}.jsonl" for name in ("train", "valid", "test")}
    done = site.submit(
        *("--out", "raw", "--stages", "tune-retriever", "retrieve", "tune", "evaluate"),
        *(word for name, file in files.items() for word in (f"--conversations.{name}", file)),
        *("--tune-retriever.settings", "{head: {epochs: 1}}", "--tune.nodes", "1"),
        *("--evaluate.settings", "{draws: 200, arms: [lavic, list_order, random]}"),
    )
    assert done.returncode == 0, done.stderr
    wait_for(site.ended, 600, "the pipeline", every=0.5)
    states = [json.loads(line) for line in site.lavic("submit", "status", "raw", "--json").stdout.splitlines()]
    logs = [file.read_text(errors="replace")[-1500:] for file in (site.folder / "raw" / "logs").glob("*.log")]
    assert [row["state"] for row in states] == ["done"] * 4, logs
    rows = read_conversations(site.folder / "raw" / "retrieval" / "test.jsonl", candidates="candidates_fused")
    assert len(rows) == SIZE.test_conversations
    assert all(len(row.candidates["candidates_fused"]) == 10 for row in rows)

    raw = site.folder / "raw"
    words = [sys.executable, "-m", "lavic", "serve", "--port", "0", "--bundle", str(raw / "runs" / "tune" / "bundle")]
    words += ["--store", str(raw / "store"), "--index", str(raw / "retrieval" / "index")]
    words += ["--shards", str(raw / "shards" / "train")]
    with subprocess.Popen(words, env=site.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        try:
            assert server.stdout is not None
            lines: list[str] = []
            while not (match := re.search(r"http://127\.0\.0\.1:\d+", lines[-1] if lines else "")):
                lines.append(server.stdout.readline())
                assert lines[-1], "".join(lines)
            with httpx.Client(base_url=match[0], timeout=120) as client:
                answer = client.post("/v1/recommend", json={"conversation": "a red mug, please", "k": 3}).json()
                assert len(answer["items"]) == 3, answer
                assert all(item["title"] for item in answer["items"])
                assert client.get(answer["items"][0]["photo"]).headers["content-type"] == "image/jpeg"
        finally:
            server.terminate()
            server.communicate(timeout=60)


def test_after_a_stage_that_fails_the_later_ones_are_cancelled_and_status_says_why(site: Site) -> None:
    result = site.folder / "a run" / "runs" / "tune" / "result.json"
    for file in (result, site.folder / "a run" / "evaluation" / "results.json"):
        file.unlink()
    (site.folder / "bad.jsonl").write_text('{"context": 3}\n')
    done = site.submit("--conversations.train", "bad.jsonl")
    assert done.returncode == 0, done.stderr
    wait_for(site.ended, 300, "the jobs' end", every=0.5)
    steps = site.status()
    assert [steps[name]["state"] for name in ("embed", "tune", "evaluate")] == ["done", "failed", "cancelled"], (
        site.logs
    )
    assert re.match(r"lavic tune: error: .*bad\.jsonl:1", steps["tune"]["why"])
    assert steps["evaluate"]["why"] == f"tune failed: {steps['tune']['why']}"
    assert (steps["tune"]["slurm"], steps["evaluate"]["slurm"]) == ("FAILED", "CANCELLED")
    shown = site.lavic("submit", "status", "a run")
    assert shown.returncode == 1 and f"tune: failed (exit code 2): {steps['tune']['why']}" in shown.stdout
