"""`lavic submit` of `pipeline-mini` on the fake SLURM, its jobs, and the results that they would write."""

from __future__ import annotations

import io
import json
import zlib
from pathlib import Path

from PIL import Image

from lavic.cli import main
from lavic.data.descriptions import write_descriptions
from lavic.data.manifest import digest_manifest
from lavic.data.shard_dataset import ShardDataset
from lavic.data.tar_shards import Sample
from lavic.launch.pipeline.settings import PipelineSettings
from tests.crawled_sets import write_set

ORDER = ["crawl-train", "crawl-valid", "verify-train", "verify-valid", "describe-train"]
ORDER += ["distill", "embed", "tune", "evaluate"]


def pipeline(**settings) -> PipelineSettings:
    """Settings of a pipeline, with inputs that do not exist."""
    photos = {"train": {"items": ["a.json"]}, "valid": {"items": ["b.jsonl"], "described": True}}
    conversations = {"train": "t.jsonl", "valid": "v.jsonl", "test": ["e.jsonl"]}
    return PipelineSettings(**{"out": "out", "photos": photos, "conversations": conversations, **settings})


def submit(*args: str) -> int:
    return main(["submit", "--config", "pipeline-mini", "--tracking.no-mlflow", *args])


def jobs(cluster: Path) -> list[dict]:
    return json.loads((cluster / "bin" / "slurm.json").read_text())["jobs"]


def set_slurm(cluster: Path, **changes) -> None:
    file = cluster / "bin" / "slurm.json"
    state = json.loads(file.read_text()) if file.exists() else {"jobs": []}
    file.write_text(json.dumps(state | changes))


def end_job(cluster: Path, number: int, state: str, reason: str = "None") -> None:
    """Ends a job with a state; if it failed, cancels the jobs after it, as SLURM does."""
    queue = jobs(cluster)
    queue[number - 1] |= {"state": state, "reason": reason}
    if state != "COMPLETED":
        for job in queue[number:]:
            job |= {"state": "CANCELLED", "reason": "DependencyNeverSatisfied"}
    set_slurm(cluster, jobs=queue)


def status(out: Path | str = "pipeline-mini") -> dict[str, dict]:
    """The output of `lavic submit status`, by step."""
    import contextlib

    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        main(["submit", "status", str(out), "--json"])
    return {row["step"]: row for row in map(json.loads, text.getvalue().splitlines())}


def states(out: Path | str = "pipeline-mini") -> dict[str, str]:
    """The state of each step."""
    return {name: row["state"] for name, row in status(out).items()}


def make_photos(folder: Path, *ids: str) -> None:
    """A set of photos, verified and described."""
    samples = []
    for id in ids:
        data = io.BytesIO()
        Image.new("RGB", (16, 16), f"#{zlib.crc32(id.encode()) % 2**24:06x}").save(data, "JPEG")
        samples.append(Sample.of(item_id=id, n=0, jpg=data.getvalue(), title=id, width=16, height=16))
    write_set(folder, samples, photos_per_shard=2)
    data_set = ShardDataset(folder)
    folder.with_name(f"{folder.name}.verified.json").write_text(json.dumps({"manifest": digest_manifest(folder)}))
    row = {"text": "red", "model": "m", "weights": "w", "prompt": "1", "views": "five"}
    for number, shard in enumerate(data_set.manifest.shards):
        write_descriptions(folder / shard.name, [{"key": key, **row} for key in data_set.keys_of(number)])


def make_results(out: Path, *names: str) -> None:
    """Writes the results of steps."""
    for split in ("train", "valid"):
        if f"crawl-{split}" in names:
            make_photos(out / "shards" / split, *(f"{split.upper()}{n}" for n in range(3)))
    for name in ("distill", "tune"):
        if name in names:
            (out / "runs" / name / "bundle").mkdir(parents=True)
            (out / "runs" / name / "bundle" / "bundle.json").write_text(json.dumps({"adapter": name}))
            (out / "runs" / name / "result.json").write_text("{}")
    if "embed" in names:
        (out / "store").mkdir()
        (out / "store" / "manifest.json").write_text("{}")
    if "evaluate" in names:
        (out / "evaluation").mkdir()
        (out / "evaluation" / "results.json").write_text("{}")


def complete_jobs(cluster: Path, first: int = 1) -> None:
    """Ends every job from a number on as COMPLETED."""
    for number in range(first, len(jobs(cluster)) + 1):
        end_job(cluster, number, "COMPLETED")


def completed_pipeline(cluster: Path) -> Path:
    """Submits and completes the pipeline; returns its folder."""
    out = cluster / "pipeline-mini"
    assert submit() == 0
    make_results(out, *ORDER)
    complete_jobs(cluster)
    assert set(states().values()) == {"done"}
    return out


def submitted_steps(cluster: Path, first: int) -> list[str]:
    """Names of the steps that were submitted, from a job's number on."""
    names = [next(word for word in job["args"] if word.startswith("--job-name=")) for job in jobs(cluster)[first - 1 :]]
    return [name.removeprefix("--job-name=lavic-") for name in names]
