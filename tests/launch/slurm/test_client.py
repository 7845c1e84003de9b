"""A SLURM that fails or does not answer: no job is submitted twice or lost; status, cancel and logs."""

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


def set_all_running(cluster: Path, **fields: str) -> None:
    """Sets every job to RUNNING."""
    set_slurm(cluster, jobs=[{**job, "state": "RUNNING", "reason": "None", **fields} for job in jobs(cluster)])


def slurm_calls(cluster: Path) -> list[list[str]]:
    """The recorded calls of SLURM programs."""
    file = cluster / "bin" / "calls.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture(autouse=True)
def short_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_PAUSE_S", 0.0)
    monkeypatch.setattr(status_command, "POLL_S", 0.05)
    monkeypatch.setattr(logs, "POLL_S", 0.05)


def test_a_job_queued_by_an_sbatch_that_failed_is_found(cluster):
    set_slurm(cluster, sbatch="late")
    Path("site.yaml").write_text("slurm: {options: [--comment=project 7]}\n")
    assert submit("--config", "site.yaml", "--only", "crawl") == 0
    assert submitted_steps(cluster, 1) == ["crawl-train", "crawl-valid"]
    recorded = json.loads((cluster / "pipeline-mini" / "jobs.json").read_text())["steps"]
    assert {name: job["id"] for name, job in recorded.items()} == {"crawl-train": "1", "crawl-valid": "2"}
    assert recorded["crawl-train"]["log"].endswith("crawl-train-1.log")
    # the comment of site.yaml is kept
    comments = [arg for arg in jobs(cluster)[0]["args"] if arg.startswith("--comment=")]
    assert comments[-1].startswith("--comment=project 7 lavic-")


def test_a_job_queued_by_an_sbatch_that_hangs_is_found(cluster, monkeypatch):
    monkeypatch.setattr(client, "_TIMEOUT_S", 5.0)
    set_slurm(cluster, sbatch="hang")
    mark = "lavic-0123"
    args = ["--job-name=x", f"--comment={mark}", "x.sh"]
    assert client.submit(args, mark=mark) == "1"
    assert len(jobs(cluster)) == 1


def test_the_greeting_of_a_sites_sbatch_is_no_job_id(cluster):
    set_slurm(cluster, sbatch="greet")
    assert submit("--only", "crawl") == 0
    recorded = json.loads((cluster / "pipeline-mini" / "jobs.json").read_text())["steps"]
    assert [job["id"] for job in recorded.values()] == ["1", "2", "3"][: len(recorded)]


def test_a_job_that_is_submitted_within_a_job_inherits_nothing_of_it(cluster, monkeypatch):
    """srun refuses SLURM_MEM_PER_CPU of the outer job beside SLURM_MEM_PER_NODE of the inner one."""
    for name in ("SLURM_JOB_ID", "SLURM_MEM_PER_CPU", "SLURM_CPU_BIND", "SLURM_TMPDIR"):
        monkeypatch.setenv(name, "7")
    clients = {"SLURM_CONF": "/etc/slurm/other.conf", "SLURM_CLUSTERS": "gpus"}
    for name, value in clients.items():
        monkeypatch.setenv(name, value)
    assert submit("--only", "crawl") == 0
    for job in jobs(cluster):
        assert {name: value for name, value in job["env"].items() if name.startswith("SLURM_")} == clients


def test_a_job_that_appears_late_is_not_submitted_again(cluster, capsys):
    """The queue is empty at first; the controller accepts the job later."""
    set_slurm(cluster, sbatch="lost")
    assert submit() == 2
    error = capsys.readouterr().err
    assert "crawl-train: sbatch: " in error and "looks for that job first" in error
    mark = json.loads((cluster / "pipeline-mini" / "jobs.json").read_text())["steps"]["crawl-train"]["mark"]
    late = {"args": ["--job-name=lavic-crawl-train", f"--comment={mark}"], "env": {}, "state": "RUNNING", "reason": ""}
    set_slurm(cluster, sbatch="", jobs=[late])
    assert states()["crawl-train"] == "running"
    assert submit() == 0
    assert submitted_steps(cluster, 1) == ORDER


def test_a_lost_job_is_submitted_by_the_next_call(cluster):
    set_slurm(cluster, sbatch="lost")
    assert submit() == 2
    set_slurm(cluster, sbatch="")
    assert states()["crawl-train"] == "open"
    assert submit() == 0
    assert submitted_steps(cluster, 1) == ORDER


def test_an_accounting_outage_does_not_end_jobs(cluster):
    assert submit() == 0
    set_all_running(cluster)
    assert set(states().values()) == {"running"}
    set_slurm(cluster, jobs=[{**job, "state": "forgotten"} for job in jobs(cluster)], sacct="down")
    assert set(states().values()) == {"running"}
    assert submit() == 0
    assert len(jobs(cluster)) == len(ORDER)
    set_slurm(cluster, sacct="up", jobs=[{**job, "accounted": "RUNNING"} for job in jobs(cluster)])
    assert set(states().values()) == {"running"}
    set_slurm(cluster, jobs=[{**job, "accounted": "FAILED"} for job in jobs(cluster)])
    rows = status()
    assert rows["crawl-train"]["state"] == "failed" and rows["crawl-train"]["exit_code"] == 2
    assert rows["crawl-train"]["elapsed"] == "00:10:00"


def test_status_by_another_user_does_not_end_jobs(cluster):
    assert submit() == 0
    set_all_running(cluster)
    out = cluster / "pipeline-mini"
    body = json.loads((out / "jobs.json").read_text())
    for job in body["steps"].values():
        job["owner"] = "alice"
        job["seen"]["state"] = "RUNNING"
    (out / "jobs.json").write_text(json.dumps(body))
    set_slurm(cluster, user="alice")
    assert set(states().values()) == {"running"}
    assert "--user=alice" in slurm_calls(cluster)[-1]
    # a site that hides jobs of other users
    set_slurm(cluster, user="nobody")
    assert set(states().values()) == {"running"}


def test_status_takes_no_lock_and_keeps_jobs_json(cluster):
    assert submit() == 0
    out = cluster / "pipeline-mini"
    set_all_running(cluster)
    before = (out / "jobs.json").read_bytes()
    with locked(out):
        assert set(states().values()) == {"running"}
    assert (out / "jobs.json").read_bytes() == before
    end_job(cluster, 1, "FAILED")
    assert states()["crawl-train"] == "failed"
    set_slurm(cluster, jobs=[{**job, "state": "forgotten"} for job in jobs(cluster)])
    assert states()["crawl-train"] == "failed" and (out / "jobs.json").read_bytes() == before


def test_status_works_from_another_folder(cluster, tmp_path_factory, monkeypatch, capsys):
    Path("mine.yaml").write_text("loop: {steps: 7}\n")
    assert submit("--tune.config", "mine.yaml") == 0
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert set(states(cluster / "pipeline-mini").values()) == {"waiting"}
    assert not capsys.readouterr().err
    (cluster / "mine.yaml").unlink()
    assert set(states(cluster / "pipeline-mini").values()) == {"waiting"}
    assert "not compared with its settings: tune: " in capsys.readouterr().err


def test_status_shows_exit_code_and_last_lines_of_a_failed_step(cluster, capsys):
    assert submit() == 0
    log = cluster / "pipeline-mini" / "logs" / "crawl-train-1.log"
    log.write_text(
        "job 1, start 0, on n1\nlavic crawl: error: of an earlier start\njob 1, start 1, on n2\n"
        "lavic crawl: error: no such host\nlavic: rank 0 on n2 exited with code 2\n"
        "exit code 2: fix the error above, then submit the same line again\n"
    )
    set_slurm(cluster, jobs=[{**job, "exit": "0:9"} for job in jobs(cluster)])
    end_job(cluster, 1, "FAILED", "NonZeroExitCode")
    row = status()["crawl-train"]
    assert row["why"] == "lavic crawl: error: no such host"
    assert row["last_lines"][0].startswith("job 1, start 1") and len(row["last_lines"]) == 4
    assert row["exit_code"] == 137
    assert main(["submit", "status", "pipeline-mini"]) == 1
    text = capsys.readouterr().out
    assert "crawl-train: failed (exit code 137): lavic crawl: error: no such host" in text
    assert f"end of {log}:" in text and "  lavic: rank 0 on n2 exited with code 2" in text


def test_status_shows_elapsed_and_remaining_time(cluster, capsys):
    assert submit() == 0
    make_results(cluster / "pipeline-mini", *ORDER[:7])
    for number in range(1, 8):
        end_job(cluster, number, "COMPLETED")
    queue = jobs(cluster)
    queue[7] |= {"state": "RUNNING", "elapsed": "0:10:00"}
    queue[8] |= {"start": "2026-11-29T12:00:00"}
    set_slurm(cluster, jobs=queue)
    run = cluster / "pipeline-mini" / "runs" / "tune"
    run.mkdir(parents=True)
    rows: list[dict] = [{"time": 0.0, "event": "resume", "step": 0, "total": 100}]
    rows += [{"time": 60.0 * n, "step": n, "loss": 1.0} for n in range(1, 11)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    steps = status()
    tune = steps["tune"]
    assert (tune["remaining_s"], tune["elapsed"], tune["limit"]) == (5400, "0:10:00", "1:00:00")
    assert steps["evaluate"]["start"] == "2026-11-29T12:00:00"
    assert main(["submit", "status", "pipeline-mini"]) == 0
    text = capsys.readouterr().out
    assert "0:10:00 of 1:00:00, 1.5 h left" in text and "starts 2026-11-29T12:00:00" in text
    assert "step 10 of 100, loss 1" in text


def test_cancel_selected_steps_or_all(cluster, capsys):
    assert submit() == 0
    set_all_running(cluster)
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


def test_logs_prints_the_last_lines(cluster, capfdbinary):
    assert submit() == 0
    set_all_running(cluster)
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
    set_all_running(cluster)
    log = cluster / "pipeline-mini" / "logs" / "tune-8.log"

    def run_job() -> None:
        """Writes the log while it is followed."""
        log.write_text("begins\n")
        before = len(slurm_calls(cluster))
        while len(slurm_calls(cluster)) == before:
            time.sleep(0.01)
        with log.open("a") as file:
            file.write("ends\n")
        end_job(cluster, 8, "COMPLETED")

    thread = threading.Thread(target=run_job)
    thread.start()
    assert main(["submit", "logs", "pipeline-mini", "tune", "-f"]) == 0
    thread.join()
    assert capfdbinary.readouterr().out.endswith(b"begins\nends\n")


@pytest.mark.parametrize("option", ["wait", "watch"])
def test_wait_and_watch_return_when_all_jobs_ended(cluster, capsys, option):
    if option == "watch":
        assert submit() == 0

    def end_jobs() -> None:
        while not (cluster / "bin" / "slurm.json").exists() or len(jobs(cluster)) < len(ORDER):
            time.sleep(0.05)
        make_results(cluster / "pipeline-mini", *ORDER[:5])
        for number in range(1, 6):
            end_job(cluster, number, "COMPLETED")
        end_job(cluster, 6, "FAILED")

    thread = threading.Thread(target=end_jobs)
    thread.start()
    code = submit("--wait") if option == "wait" else main(["submit", "status", "pipeline-mini", "--watch"])
    thread.join()
    assert code == 1
    text = capsys.readouterr().out
    assert "evaluate" in text and "distill: failed: FAILED; its log is empty" in text


def test_dry_run_and_submit_report_the_same_missing_files(cluster, capsys):
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
