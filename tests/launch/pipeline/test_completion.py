"""Completion, progress and remaining time of a step, from the files in its folder."""

from __future__ import annotations

import io
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from lavic.data.descriptions import descriptions_path, write_descriptions
from lavic.data.manifest import Manifest, digest_manifest
from lavic.data.tar_shards import Sample
from lavic.launch.pipeline import pipeline_status
from lavic.launch.pipeline.dag import Step
from lavic.launch.pipeline.digest_cache import DigestCache
from lavic.launch.pipeline.progress import progress, remaining_seconds
from lavic.launch.pipeline.settings import Stage
from lavic.tracking.journal import Journal
from tests.crawled_sets import write_set


def is_complete(step: Step) -> bool:
    return pipeline_status.is_complete(step, DigestCache(step.output.parent))


def step(stage: Stage, output: Path) -> Step:
    folder = str(output)
    args: dict[Stage, tuple[str, ...]] = {
        "crawl": ("--items", "items.jsonl", "--out", folder),
        "verify": (folder.removesuffix(".verified.json"), "--receipt", folder),
        "describe": ("--shards", folder),
        "distill": ("--shards", "shards", "--valid", "valid", "--out", folder),
        "embed": ("--shards", "shards", "--out", folder),
        "tune-retriever": ("--store", "store", "--train", "train.jsonl", "--valid", "valid.jsonl", "--out", folder),
        "retrieve": ("--conversations", "test.jsonl", "--out", folder, "--index", f"{folder}/index"),
        "tune": ("--store", "store", "--train", "train.jsonl", "--valid", "valid.jsonl", "--out", folder),
        "evaluate": ("--bundle", "bundle", "--store", "store", "--test", "test.jsonl", "--out", folder),
    }
    return Step(name=stage, stage=stage, positional=args[stage], output=output)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    out = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(out, "JPEG")
    samples = [Sample.of(item_id=f"B{n}", n=0, jpg=out.getvalue(), title="x", width=16, height=16) for n in range(3)]
    return write_set(tmp_path / "train", samples, photos_per_shard=2).folder


def test_a_crawled_set_is_complete_with_all_its_shards(shards: Path) -> None:
    assert is_complete(step("crawl", shards))
    (shards / "photos-train-000001.tar").unlink()
    assert not is_complete(step("crawl", shards))
    assert not is_complete(step("crawl", shards.parent / "valid"))


def test_a_receipt_of_an_older_set_is_ignored(shards: Path) -> None:
    receipt = shards.parent / "train.verified.json"
    assert not is_complete(step("verify", receipt))
    receipt.write_text(json.dumps({"manifest": digest_manifest(shards)}))
    assert is_complete(step("verify", receipt))
    replace(Manifest.load(shards), plan="another").save()
    assert not is_complete(step("verify", receipt))
    receipt.write_text("{")
    assert not is_complete(step("verify", receipt))


def test_describe_is_complete_with_every_photo_of_every_shard(shards: Path) -> None:
    described = step("describe", shards)
    tars = sorted(shards.glob("*.tar"))

    def rows(*keys: str) -> list[dict[str, str]]:
        row = {"text": "red", "model": "m", "weights": "w", "prompt": "1", "views": "five"}
        return [{"key": key, **row} for key in keys]

    write_descriptions(tars[0], rows("B0_0"))
    write_descriptions(tars[1], rows("B2_0"))
    assert not is_complete(described), "a photo without a description"
    descriptions_path(tars[1]).unlink()
    write_descriptions(tars[0], rows("B0_0", "B1_0"))
    assert not is_complete(described) and progress(described) == "1 of 2 shards"
    write_descriptions(tars[1], rows("B2_0"))
    assert is_complete(described) and progress(described) == "2 of 2 shards"
    later = descriptions_path(tars[0]).stat().st_mtime + 10
    os.utime(tars[0], (later, later))
    assert is_complete(described), "packed again with the same photos"


@pytest.mark.parametrize(
    ("stage", "mark"),
    [("distill", "result.json"), ("embed", "manifest.json"), ("tune", "result.json"), ("evaluate", "results.json")],
)
def test_a_stage_is_complete_with_its_last_file(stage: Stage, mark: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    assert not is_complete(step(stage, tmp_path))
    (tmp_path / mark).write_text("{}")
    assert is_complete(step(stage, tmp_path))


def test_progress_reads_the_end_of_the_journal(tmp_path: Path) -> None:
    run = step("distill", tmp_path)
    assert progress(run) == ""
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.event("start")
    assert progress(run) == ""
    for number in range(2000):
        journal.log(number, loss=1 / (number + 1), text="x" * 50)
    journal.log(1999, valid_loss=0.25)
    journal.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2000, "lo')
    assert progress(run) == "step 1999, loss 0.0005, valid_loss 0.25"
    assert remaining_seconds(run) is None


def test_remaining_time_of_training_from_its_steps(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"time": 100.0, "event": "resume", "step": 0, "total": 1000}]
    rows += [{"time": 100.0 + n, "step": n, "loss": 1.0} for n in range(1, 11)]
    # stopped for an hour, which is not counted
    rows += [{"time": 3700.0, "event": "resume", "step": 10, "total": 1000}]
    rows += [{"time": 3700.0 + 2 * n, "step": 10 + n, "loss": 1.0} for n in range(1, 11)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = step("tune", tmp_path)
    assert progress(run) == "step 20 of 1000, loss 1"
    assert remaining_seconds(run) == 2 * 980


def test_remaining_time_of_embed_from_its_parts(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps({"shards": ["x"] * 10}))
    now = time.time()
    for number in range(4):
        part = tmp_path / f"part-{number}.json"
        part.touch()
        os.utime(part, (now - 300 + 100 * number,) * 2)
    remaining = remaining_seconds(step("embed", tmp_path))
    assert remaining is not None and 580 < remaining <= 600
    assert progress(step("embed", tmp_path)) == "4 of 10 parts"
