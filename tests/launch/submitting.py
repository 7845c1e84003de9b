"""`lavic submit` of the miniature on the stand-ins for SLURM's programs, and what has come of its jobs."""

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
from tests.crawled_sets import write_set

ORDER = ["crawl-train", "crawl-valid", "verify-train", "verify-valid", "describe-train"]
ORDER += ["distill", "embed", "tune", "evaluate"]


def submit(*words: str) -> int:
    return main(["submit", "--config", "pipeline-mini", "--tracking.no-mlflow", *words])


def jobs(cluster: Path) -> list[dict]:
    return json.loads((cluster / "bin" / "book.json").read_text())["jobs"]


def book(cluster: Path, **changes) -> None:
    file = cluster / "bin" / "book.json"
    now = json.loads(file.read_text()) if file.exists() else {"jobs": []}
    file.write_text(json.dumps(now | changes))


def end(cluster: Path, number: int, state: str, reason: str = "None") -> None:
    """What SLURM would do: a job ends so, and if not well those after it are cancelled."""
    now = jobs(cluster)
    now[number - 1] |= {"state": state, "reason": reason}
    if state != "COMPLETED":
        for job in now[number:]:
            job |= {"state": "CANCELLED", "reason": "DependencyNeverSatisfied"}
    book(cluster, jobs=now)


def status(out: Path | str = "pipeline-mini") -> dict[str, dict]:
    """What `lavic submit status` says, by step."""
    import contextlib

    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        main(["submit", "status", str(out), "--json"])
    return {row["step"]: row for row in map(json.loads, text.getvalue().splitlines())}


def states(out: Path | str = "pipeline-mini") -> dict[str, str]:
    """The state of each step."""
    return {name: row["state"] for name, row in status(out).items()}


def photos(folder: Path, *ids: str) -> None:
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


def make(out: Path, *names: str) -> None:
    """What the jobs of these steps would leave."""
    for split in ("train", "valid"):
        if f"crawl-{split}" in names:
            photos(out / "shards" / split, *(f"{split.upper()}{n}" for n in range(3)))
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


def finish(cluster: Path, first: int = 1) -> None:
    """Every job from a number on has ended well."""
    for number in range(first, len(jobs(cluster)) + 1):
        end(cluster, number, "COMPLETED")


def all_done(cluster: Path) -> Path:
    """The pipeline, submitted and done; its folder."""
    out = cluster / "pipeline-mini"
    assert submit() == 0
    make(out, *ORDER)
    finish(cluster)
    assert set(states().values()) == {"done"}
    return out


def queued(cluster: Path, first: int) -> list[str]:
    """Names of the steps that were submitted from a job's number on."""
    names = [
        next(word for word in job["words"] if word.startswith("--job-name=")) for job in jobs(cluster)[first - 1 :]
    ]
    return [name.removeprefix("--job-name=lavic-") for name in names]
