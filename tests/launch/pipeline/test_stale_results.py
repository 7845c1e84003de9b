"""Stale results: what a pipeline runs again after a change of settings or inputs, and what it keeps."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from lavic.config import load
from lavic.launch.pipeline.dag import Step
from lavic.launch.pipeline.settings import PipelineSettings
from lavic.launch.pipeline.stale_results import updates_in_place
from lavic.shards.crawl_settings import CrawlSettings
from tests.launch.mini_pipeline import (
    ORDER,
    complete_jobs,
    completed_pipeline,
    end_job,
    jobs,
    make_photos,
    make_results,
    set_slurm,
    states,
    status,
    submit,
    submitted_steps,
)

OTHER_LR = ("--tune.settings", "{loop: {lr: 0.5}}")


def test_a_changed_setting_runs_a_stage_and_its_dependents_again(cluster, capsys):
    out = completed_pipeline(cluster)
    assert submit(*OTHER_LR) == 0
    assert submitted_steps(cluster, 10) == ["tune", "evaluate"]
    text = capsys.readouterr().out
    assert "loop.lr was " in text and ", is 0.5" in text
    assert (out / "stale" / "tune-1" / "result.json").is_file() and not (out / "runs" / "tune").exists()
    assert (out / "stale" / "evaluate-1" / "results.json").is_file()
    assert states()["tune"] == "waiting"
    make_results(out, "tune", "evaluate")
    complete_jobs(cluster, 10)
    assert set(states().values()) == {"done"}
    assert submit(*OTHER_LR) == 0
    assert len(jobs(cluster)) == 11
    # back to the old settings: the result is now of the new ones
    assert submit() == 0
    assert submitted_steps(cluster, 12) == ["tune", "evaluate"] and (out / "stale" / "tune-2").is_dir()


def test_settings_without_effect_on_results_run_nothing_again(cluster):
    completed_pipeline(cluster)
    args = [
        "--tune.settings",
        "{loop: {save_every: 7, num_workers: 1}}",
        "--tune.nodes",
        "1",
        "--tune.time",
        "02:00:00",
    ]
    args += ["--crawl.settings", "{fetch: {concurrency: 3}}", "--embed.settings", "{batch_size: 2}"]
    assert submit(*args, "--tracking.experiment", "another") == 0
    assert len(jobs(cluster)) == len(ORDER)


def test_changed_content_of_an_input_is_noticed_but_not_a_new_mtime(cluster, capsys):
    completed_pipeline(cluster)
    file = cluster / "mini" / "train.jsonl"
    os.utime(file, (1, 1))
    assert set(states().values()) == {"done"}
    file.write_text("{}\n")
    rows = status()
    assert [name for name, row in rows.items() if row["state"] == "stale"] == ["tune", "evaluate"]
    assert rows["tune"]["why"] == f"{file} has changed" and rows["evaluate"]["why"] == "tune is stale"
    assert submit() == 0
    assert submitted_steps(cluster, 10) == ["tune", "evaluate"]
    assert "has changed" in capsys.readouterr().out


def test_settings_of_another_version_run_nothing_again(cluster):
    out = completed_pipeline(cluster)
    file = out / "stages.json"
    body = json.loads(file.read_text())
    settings = body["steps"]["tune"]["made"]["settings"]
    del settings["shuffle"]
    settings["gone"] = 1
    file.write_text(json.dumps(body))
    assert set(states().values()) == {"done"}


def test_keep_accepts_existing_results(cluster, capsys):
    out = completed_pipeline(cluster)
    before = (out / "pipeline.yaml").read_text()
    assert submit(*OTHER_LR, "--keep") == 0
    assert len(jobs(cluster)) == len(ORDER)
    assert "tune            done, kept as it is (loop.lr was" in capsys.readouterr().out
    assert (out / "pipeline.yaml").read_text() == before, "no job ran with these settings"
    assert set(states().values()) == {"done"}
    assert submit(*OTHER_LR) == 0
    assert len(jobs(cluster)) == len(ORDER), "accepted results stay accepted"
    assert submit("--tune.settings", "{loop: {lr: 0.25}}") == 0
    assert submitted_steps(cluster, 10) == ["tune", "evaluate"]


def test_settings_of_unselected_stages_are_not_recorded(cluster):
    out = completed_pipeline(cluster)
    assert submit("--distill.settings", "{loop: {lr: 0.5}}", *OTHER_LR, "--only", "distill") == 0
    assert submitted_steps(cluster, 10) == ["distill"]
    assert status()["embed"]["why"] == "distill is being run again"
    recorded = load(PipelineSettings, out / "pipeline.yaml")
    assert recorded.distill.settings == {"loop": {"lr": 0.5}}
    make_results(out, "distill")
    (out / "runs" / "distill" / "bundle" / "bundle.json").write_text('{"adapter": "another"}')
    complete_jobs(cluster, 10)
    assert states() | {"distill": "done", "embed": "stale", "tune": "stale", "evaluate": "stale"} == states()
    assert status()["embed"]["why"] == "distill has another result"


def test_a_grown_set_makes_its_readers_stale(cluster):
    """A set that was extended and described by hand."""
    out = completed_pipeline(cluster)
    make_photos(out / "shards" / "train", "TRAIN0", "TRAIN1", "TRAIN2", "TRAIN9")
    rows = status()
    assert [name for name, row in rows.items() if row["state"] == "stale"] == ["distill", "embed", "tune", "evaluate"]
    assert "crawl-train has another result" in rows["distill"]["why"]


def test_a_retry_updates_the_set_and_another_catalogue_is_crawled_again(cluster):
    out = completed_pipeline(cluster)
    assert submit("--crawl.settings", "{retry: [timeout]}") == 0
    retried = ["crawl-train", "crawl-valid", "verify-train", "verify-valid", "describe-train"]
    assert submitted_steps(cluster, 10) == retried, "training waits for new photos"
    assert (out / "shards" / "train" / "manifest.json").is_file() and not (out / "stale").exists()
    complete_jobs(cluster, 10)
    assert submit("--crawl.settings", "{retry: [timeout]}") == 0
    assert len(jobs(cluster)) == 14

    (cluster / "mini" / "item2meta_train.json").write_text("{}")
    already = len(jobs(cluster))
    assert submit("--crawl.settings", "{retry: [timeout]}") == 0
    resubmitted = submitted_steps(cluster, already + 1)
    assert resubmitted == ["crawl-train", "verify-train", "describe-train", "distill", "embed", "tune", "evaluate"]
    assert (out / "stale" / "crawl-train-1" / "manifest.json").is_file()
    assert (out / "shards" / "valid" / "manifest.json").is_file()


@pytest.mark.parametrize(
    ("settings", "differences", "in_place"),
    [
        ({}, ["retry was [], is ['timeout']"], True),
        ({}, ["refresh was False, is True"], True),
        ({}, ["retry was [], is ['timeout']", "photos was first, is all"], False),
        ({"extend": True}, ["/c/items.jsonl has changed"], True),
        ({"extend": False}, ["/c/items.jsonl has changed"], False),
    ],
)
def test_a_crawl_updates_its_set_in_place_if_possible(settings, differences, in_place):
    step = Step(name="crawl-train", stage="crawl", output=Path("shards"))
    crawl_settings = CrawlSettings(items=("items.jsonl",), out="shards", **settings)
    assert updates_in_place(step, crawl_settings, differences) is in_place


def test_another_teacher_moves_the_old_descriptions_aside(cluster):
    out = completed_pipeline(cluster)
    assert submit("--describe.settings", "{max_new_tokens: 7}") == 0
    assert submitted_steps(cluster, 10) == ["describe-train", "distill", "embed", "tune", "evaluate"]
    assert not list((out / "shards" / "train").glob("*.descriptions.jsonl"))
    assert len(list((out / "stale" / "describe-train-1").glob("*.descriptions.jsonl"))) == 2


def test_an_unfinished_run_with_other_settings_is_moved_aside(cluster):
    """Its command would refuse to resume."""
    out = cluster / "pipeline-mini"
    assert submit() == 0
    make_results(out, *ORDER[:7])
    for number in range(1, 8):
        end_job(cluster, number, "COMPLETED")
    (out / "runs" / "tune" / "checkpoints").mkdir(parents=True)
    end_job(cluster, 8, "FAILED", "NonZeroExitCode")
    assert submit() == 0
    assert submitted_steps(cluster, 10) == ["tune", "evaluate"] and (out / "runs" / "tune").is_dir(), "it resumes"
    end_job(cluster, 10, "FAILED", "NonZeroExitCode")
    assert submit(*OTHER_LR) == 0
    assert (out / "stale" / "tune-1" / "checkpoints").is_dir() and not (out / "runs" / "tune").exists()


def test_existing_results_are_accepted_and_compared_later(cluster, capsys):
    out = cluster / "pipeline-mini"
    make_results(out, *ORDER)
    assert submit() == 0
    assert "nothing to submit" in capsys.readouterr().out
    assert submit(*OTHER_LR) == 0
    assert submitted_steps(cluster, 1) == ["tune", "evaluate"]


def test_queued_jobs_keep_their_recorded_settings(cluster, capsys):
    out = cluster / "pipeline-mini"
    assert submit() == 0
    assert submit(*OTHER_LR) == 0
    assert len(jobs(cluster)) == len(ORDER)
    assert "tune continues as job 8, which was submitted before a change (loop.lr was" in capsys.readouterr().err
    assert yaml.safe_load((out / "pipeline.yaml").read_text())["tune"]["settings"] == {}


def test_force_runs_a_stage_and_its_dependents_unless_queued(cluster, capsys):
    out = completed_pipeline(cluster)
    assert submit("--force", "embed") == 0
    assert submitted_steps(cluster, 10) == ["embed", "tune", "evaluate"]
    assert (out / "stale" / "embed-1" / "manifest.json").is_file()
    assert submit("--force", "embed") == 2
    error = capsys.readouterr().err
    assert "embed is waiting (job 10) and would be rebuilt, since --force names it" in error
    assert submit("--force", "distill") == 2
    assert "embed is waiting (job 10) and would be rebuilt, since it reads distill" in capsys.readouterr().err
    assert len(jobs(cluster)) == 12 and (out / "runs" / "distill").is_dir()


def test_a_running_job_stays_running_if_its_input_is_incomplete(cluster):
    """A retry of the crawl packed shards again, with photos that have no description yet."""
    out = cluster / "pipeline-mini"
    assert submit() == 0
    make_results(out, *ORDER[:5])
    for number in range(1, 6):
        end_job(cluster, number, "COMPLETED")
    queue = jobs(cluster)
    queue[5] |= {"state": "RUNNING", "reason": "None", "elapsed": "1:02:03"}
    set_slurm(cluster, jobs=queue)
    next(iter((out / "shards" / "train").glob("*.descriptions.jsonl"))).unlink()
    rows = status()
    assert rows["describe-train"]["state"] == "failed"
    assert rows["distill"]["state"] == "running" and rows["distill"]["elapsed"] == "1:02:03"


def weights(name: str) -> bytes:
    """A .safetensors file without tensors."""
    header = json.dumps({"__metadata__": {"name": name}}).encode()
    return len(header).to_bytes(8, "little") + header


def test_a_changed_base_model_is_noticed(cluster, tmp_path_factory):
    completed_pipeline(cluster)
    base = tmp_path_factory.mktemp("base")
    (base / "config.json").write_text("{}")
    (base / "model.safetensors").write_bytes(weights("x"))
    args = ("--tune.settings", json.dumps({"model": {"name": str(base)}}))
    assert submit(*args) == 0
    make_results(Path("pipeline-mini"), "tune", "evaluate")
    complete_jobs(cluster)
    assert set(states().values()) == {"done"}
    (base / "model.safetensors").write_bytes(weights("y"))
    assert status()["tune"]["why"] == "the base model has changed"


def test_relative_paths_do_not_depend_on_the_working_folder(cluster, monkeypatch, capsys):
    (cluster / "evaluate.yaml").write_text("# lavic evaluate\nwords: words.jsonl\n")
    (cluster / "words.jsonl").write_text("{}")
    (cluster / "base").mkdir()
    (cluster / "base" / "config.json").write_text('{"model_type": "llava_next"}')
    (cluster / "base" / "model.safetensors").write_bytes(weights("x"))
    args = ["--evaluate.config", "evaluate.yaml", "--evaluate.settings", "{train: mini/train.jsonl}"]
    args += ["--tune.settings", "{model: {name: base}}"]
    assert submit(*args) == 0
    job_args = jobs(cluster)[-1]["args"]
    assert job_args[job_args.index("--words") + 1] == str(cluster / "words.jsonl")
    assert job_args[job_args.index("--train") + 1] == str(cluster / "mini" / "train.jsonl")
    out = cluster / "pipeline-mini"
    make_results(out, *ORDER)
    complete_jobs(cluster)
    monkeypatch.chdir(out)
    assert set(states(out).values()) == {"done"}
    (cluster / "words.jsonl").write_text("{} ")
    assert status(out)["evaluate"]["why"] == f"{cluster / 'words.jsonl'} has changed"
    monkeypatch.chdir(cluster)
    (cluster / "words.jsonl").unlink()
    capsys.readouterr()
    assert submit(*args) == 2
    assert f"evaluate reads {cluster / 'words.jsonl'}: no such file" in capsys.readouterr().err


@pytest.mark.parametrize("broken", [b"{", b"[]", b"\0\xff", b""])
def test_a_broken_job_cache_is_ignored(cluster, broken):
    out = completed_pipeline(cluster)
    (out / ".seen.json").write_bytes(broken)
    assert set(states().values()) == {"done"}
