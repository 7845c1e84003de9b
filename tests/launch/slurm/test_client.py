"""A SLURM that does not answer, or not to this user: no job is submitted twice, and none is lost."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pytest

from lavic.cli import main
from lavic.launch.pipeline.job_registry import locked
from lavic.launch.slurm import client
from lavic.launch.submit import logs
from lavic.launch.submit import status as status_command
from tests.launch.mini_pipeline import (
    ORDER,
    end_job,
    jobs,
    make_results,
    set_slurm,
    states,
    status,
    submit,
    submitted_steps,
)


def run_all(cluster: Path, **more: str) -> None:
    """Every job runs."""
    set_slurm(cluster, jobs=[{**job, "state": "RUNNING", "reason": "None", **more} for job in jobs(cluster)])


def asked(cluster: Path) -> list[list[str]]:
    """What SLURM was asked, word by word."""
    file = cluster / "bin" / "calls.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_PAUSE_S", 0.0)
    monkeypatch.setattr(status_command, "POLL_S", 0.05)
    monkeypatch.setattr(logs, "POLL_S", 0.05)


def test_an_sbatch_that_gives_no_answer_and_has_queued_the_job_is_believed_by_the_queue(cluster):
    set_slurm(cluster, sbatch="late")
    Path("site.yaml").write_text("slurm: {options: [--comment=project 7]}\n")
    assert submit("--config", "site.yaml", "--only", "crawl") == 0
    assert submitted_steps(cluster, 1) == ["crawl-train", "crawl-valid"]
    kept = json.loads((cluster / "pipeline-mini" / "jobs.json").read_text())["steps"]
    assert {name: job["id"] for name, job in kept.items()} == {"crawl-train": "1", "crawl-valid": "2"}
    assert kept["crawl-train"]["log"].endswith("crawl-train-1.log")
    # the site's own comment stays
    words = [word for word in jobs(cluster)[0]["args"] if word.startswith("--comment=")]
    assert words[-1].startswith("--comment=project 7 lavic-")


def test_an_sbatch_that_hangs_is_given_up_and_its_job_found(cluster, monkeypatch):
    monkeypatch.setattr(client, "_TIMEOUT_S", 5.0)
    set_slurm(cluster, sbatch="hang")
    mark = "lavic-0123"
    words = ["--job-name=x", f"--comment={mark}", "x.sh"]
    assert client.submit(words, mark=mark) == "1"
    assert len(jobs(cluster)) == 1


def test_a_job_that_comes_late_is_not_queued_again(cluster, capsys):
    """Nothing is in the queue when it is asked; the controller takes the job afterwards."""
    set_slurm(cluster, sbatch="lost")
    assert submit() == 2
    said = capsys.readouterr().err
    assert "crawl-train: sbatch: " in said and "looks for that job first" in said
    mark = json.loads((cluster / "pipeline-mini" / "jobs.json").read_text())["steps"]["crawl-train"]["mark"]
    late = {"args": ["--job-name=lavic-crawl-train", f"--comment={mark}"], "env": {}, "state": "RUNNING", "reason": ""}
    set_slurm(cluster, sbatch="", jobs=[late])
    assert states()["crawl-train"] == "running"
    assert submit() == 0
    assert submitted_steps(cluster, 1) == ORDER


def test_a_job_that_never_came_is_queued_by_the_next_call(cluster):
    set_slurm(cluster, sbatch="lost")
    assert submit() == 2
    set_slurm(cluster, sbatch="")
    assert states()["crawl-train"] == "open"
    assert submit() == 0
    assert submitted_steps(cluster, 1) == ORDER


def test_an_outage_of_the_accounting_ends_no_job(cluster):
    assert submit() == 0
    run_all(cluster)
    assert set(states().values()) == {"running"}
    set_slurm(cluster, jobs=[{**job, "state": "forgotten"} for job in jobs(cluster)], sacct="down")
    assert set(states().values()) == {"running"}
    assert submit() == 0
    assert len(jobs(cluster)) == len(ORDER)
    set_slurm(cluster, sacct="up", jobs=[{**job, "accounted": "RUNNING"} for job in jobs(cluster)])
    assert set(states().values()) == {"running"}
    set_slurm(cluster, jobs=[{**job, "accounted": "FAILED"} for job in jobs(cluster)])
    told = status()
    assert told["crawl-train"]["state"] == "failed" and told["crawl-train"]["exit_code"] == 2
    assert told["crawl-train"]["elapsed"] == "00:10:00"


def test_another_user_ends_no_job_by_looking(cluster):
    assert submit() == 0
    run_all(cluster)
    out = cluster / "pipeline-mini"
    body = json.loads((out / "jobs.json").read_text())
    for job in body["steps"].values():
        job["owner"] = "alice"
        job["seen"]["state"] = "RUNNING"
    (out / "jobs.json").write_text(json.dumps(body))
    set_slurm(cluster, user="alice")
    assert set(states().values()) == {"running"}
    assert "--user=alice" in asked(cluster)[-1]
    # a site that hides a user's jobs from others
    set_slurm(cluster, user="nobody")
    assert set(states().values()) == {"running"}


def test_status_takes_no_lock_and_leaves_what_submit_wrote(cluster):
    assert submit() == 0
    out = cluster / "pipeline-mini"
    run_all(cluster)
    before = (out / "jobs.json").read_bytes()
    with locked(out):
        assert set(states().values()) == {"running"}
    assert (out / "jobs.json").read_bytes() == before
    end_job(cluster, 1, "FAILED")
    assert states()["crawl-train"] == "failed"
    set_slurm(cluster, jobs=[{**job, "state": "forgotten"} for job in jobs(cluster)])
    assert states()["crawl-train"] == "failed" and (out / "jobs.json").read_bytes() == before


def test_status_from_another_folder(cluster, tmp_path_factory, monkeypatch, capsys):
    Path("mine.yaml").write_text("loop: {steps: 7}\n")
    assert submit("--tune.config", "mine.yaml") == 0
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert set(states(cluster / "pipeline-mini").values()) == {"waiting"}
    assert not capsys.readouterr().err
    (cluster / "mine.yaml").unlink()
    assert set(states(cluster / "pipeline-mini").values()) == {"waiting"}
    assert "not compared with its settings: tune: " in capsys.readouterr().err


def test_what_failed_is_shown_with_its_exit_code_and_its_last_lines(cluster, capsys):
    assert submit() == 0
    log = cluster / "pipeline-mini" / "logs" / "crawl-train-1.log"
    log.write_text(
        "job 1, start 0, on n1\nlavic crawl: error: of an earlier start\njob 1, start 1, on n2\n"
        "lavic crawl: error: no such host\nlavic: rank 0 on n2 exited with code 2\n"
        "exit code 2: fix the error above, then submit the same line again\n"
    )
    set_slurm(cluster, jobs=[{**job, "exit": "0:9"} for job in jobs(cluster)])
    end_job(cluster, 1, "FAILED", "NonZeroExitCode")
    told = status()["crawl-train"]
    assert told["why"] == "lavic crawl: error: no such host"
    assert told["last_lines"][0].startswith("job 1, start 1") and len(told["last_lines"]) == 4
    assert told["exit_code"] == 137
    assert main(["submit", "status", "pipeline-mini"]) == 1
    said = capsys.readouterr().out
    assert "crawl-train: failed (exit code 137): lavic crawl: error: no such host" in said
    assert f"end of {log}:" in said and "  lavic: rank 0 on n2 exited with code 2" in said


def test_how_long_a_step_takes_is_shown(cluster, capsys):
    assert submit() == 0
    make_results(cluster / "pipeline-mini", *ORDER[:7])
    for number in range(1, 8):
        end_job(cluster, number, "COMPLETED")
    now = jobs(cluster)
    now[7] |= {"state": "RUNNING", "elapsed": "0:10:00"}
    now[8] |= {"start": "2026-11-29T12:00:00"}
    set_slurm(cluster, jobs=now)
    run = cluster / "pipeline-mini" / "runs" / "tune"
    run.mkdir(parents=True)
    rows: list[dict] = [{"time": 0.0, "event": "resume", "step": 0, "total": 100}]
    rows += [{"time": 60.0 * n, "step": n, "loss": 1.0} for n in range(1, 11)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = status()
    assert (told["tune"]["remaining_s"], told["tune"]["elapsed"], told["tune"]["limit"]) == (5400, "0:10:00", "1:00:00")
    assert told["evaluate"]["start"] == "2026-11-29T12:00:00"
    assert main(["submit", "status", "pipeline-mini"]) == 0
    said = capsys.readouterr().out
    assert "0:10:00 of 1:00:00, 1.5 h left" in said and "starts 2026-11-29T12:00:00" in said
    assert "step 10 of 100, loss 1" in said


def test_cancel(cluster, capsys):
    assert submit() == 0
    run_all(cluster)
    assert main(["submit", "cancel", "pipeline-mini", "evaluate", "crawl-train"]) == 0
    assert [job["state"] for job in jobs(cluster)] == ["CANCELLED", *["RUNNING"] * 7, "CANCELLED"]
    assert main(["submit", "cancel", "pipeline-mini", "nothing"]) == 2
    assert "nothing: no step or stage of this pipeline" in capsys.readouterr().err
    assert main(["submit", "cancel", "pipeline-mini"]) == 0
    assert {job["state"] for job in jobs(cluster)} == {"CANCELLED"}
    assert states()["tune"] == "cancelled"
    capsys.readouterr()
    assert main(["submit", "cancel", "pipeline-mini"]) == 0
    assert "no job to cancel" in capsys.readouterr().out
    assert main(["submit", "cancel", "mini"]) == 2


def test_logs(cluster, capfdbinary):
    assert submit() == 0
    run_all(cluster)
    folder = cluster / "pipeline-mini" / "logs"
    (folder / "tune-8.log").write_text("".join(f"line {n}\n" for n in range(100)))
    assert main(["submit", "logs", "pipeline-mini", "tune", "--lines", "2"]) == 0
    assert capfdbinary.readouterr().out.endswith(b"line 98\nline 99\n")
    (folder / "embed-7.log").write_bytes(b"now \xff\n")
    os.utime(folder / "tune-8.log", (1, 1))
    assert main(["submit", "logs", "pipeline-mini"]) == 0
    assert capfdbinary.readouterr().out == b"now \xff\n"


def test_logs_are_followed_until_the_job_has_ended(cluster, capfdbinary):
    assert submit() == 0
    run_all(cluster)
    log = cluster / "pipeline-mini" / "logs" / "tune-8.log"

    def work() -> None:
        """What the job does, once somebody listens."""
        log.write_text("begins\n")
        before = len(asked(cluster))
        while len(asked(cluster)) == before:
            time.sleep(0.01)
        with log.open("a") as file:
            file.write("ends\n")
        end_job(cluster, 8, "COMPLETED")

    thread = threading.Thread(target=work)
    thread.start()
    assert main(["submit", "logs", "pipeline-mini", "tune", "-f"]) == 0
    thread.join()
    assert capfdbinary.readouterr().out.endswith(b"begins\nends\n")


@pytest.mark.parametrize("how", ["wait", "watch"])
def test_waiting_until_all_has_ended(cluster, capsys, how):
    if how == "watch":
        assert submit() == 0

    def work() -> None:
        while not (cluster / "bin" / "slurm.json").exists() or len(jobs(cluster)) < len(ORDER):
            time.sleep(0.05)
        make_results(cluster / "pipeline-mini", *ORDER[:5])
        for number in range(1, 6):
            end_job(cluster, number, "COMPLETED")
        end_job(cluster, 6, "FAILED")

    thread = threading.Thread(target=work)
    thread.start()
    code = submit("--wait") if how == "wait" else main(["submit", "status", "pipeline-mini", "--watch"])
    thread.join()
    assert code == 1
    said = capsys.readouterr().out
    assert "evaluate" in said and "distill: failed: FAILED; its log is empty" in said


def test_the_dry_run_and_the_submission_tell_of_the_same_absent_files(cluster, capsys):
    for name in ("train.jsonl", "item2meta_train.json"):
        (cluster / "mini" / name).unlink()
    assert submit() == 2
    refused = capsys.readouterr().err
    assert submit("--dry-run") == 0
    shown = capsys.readouterr().out
    for step, name in (("crawl-train", "item2meta_train.json"), ("tune", "train.jsonl")):
        line = f"{step} reads {cluster / 'mini' / name}: no such file"
        assert line in refused and line in shown
    assert refused.count("no such file") == shown.count("no such file") == 2
