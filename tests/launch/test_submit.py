"""`lavic submit` on a fake cluster: the dry run, what it queues, what it reports, what it refuses."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import lavic.slurm
from lavic.cli import main
from lavic.data.manifest import digest_manifest
from lavic.launch.pipeline.dag import plan_steps
from lavic.launch.pipeline.settings import STAGES
from lavic.launch.pipeline.step_status import last_error
from lavic.launch.submit.command import missing_inputs
from tests.crawled_sets import write_set
from tests.launch.mini_pipeline import ORDER, end_job, jobs, make_photos, pipeline, set_slurm, submit

GOLDEN = Path(__file__).with_name("golden")


RETRIEVING = ["--stages", *STAGES]


@pytest.mark.parametrize(
    ("name", "config", "extra_args"),
    [
        ("pipeline-mini", "pipeline-mini", []),
        ("pipeline-7b", "pipeline-7b", []),
        ("pipeline-mini-retrieve", "pipeline-mini", ["--from", "embed", *RETRIEVING]),
    ],
)
def test_dry_run_output_matches_the_golden_files(name, config, extra_args, tmp_path, monkeypatch, capsys):
    """`LAVIC_GOLDEN=write` rewrites the files: review their diff."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LAVIC_VENV", "/venv")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert main(["submit", "--config", config, "--dry-run", *extra_args]) == 0
    output = capsys.readouterr().out
    scripts = Path(next(iter(lavic.slurm.__path__)))
    for script in (*scripts.glob("*.sbatch"), *scripts.glob("*.sh")):
        text = script.read_text().rstrip()
        output = output.replace(text, "(the file)")
    neutral = output.replace(str(tmp_path), "HERE").replace(str(scripts), "SLURM")
    golden = GOLDEN / f"{name}.txt"
    if os.environ.get("LAVIC_GOLDEN") == "write":
        golden.write_text(neutral)
    assert neutral == golden.read_text()
    scripts_shown = len(set(re.findall(r"^== SLURM/.+$", neutral, re.M)))
    assert neutral.count("(the file)") == scripts_shown == (4 if extra_args else 5)
    assert not list(tmp_path.iterdir()), "a dry run leaves nothing behind"


def test_planned_steps_count_samples_as_training_does(cluster, capsys):
    """One sample per target; photos of the validation set are not trained on."""
    row = {"context": "a lamp", "context_items": [], "gt": ""}
    rows = [
        {**row, "gt_items": targets, "candidates_st": ["A", "B"]} for targets in (["A", "B"], ["A"], ["A", "C", "A"])
    ]
    (cluster / "mini" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = cluster / "pipeline-mini" / "shards"
    make_photos(out / "train", "A", "B", "C", "D")
    make_photos(out / "valid", "D", "E")
    epochs = "{loop: {steps: null, epochs: 8, global_batch_size: 2}}"
    assert submit("--dry-run", "--tune.settings", epochs, "--distill.settings", epochs) == 0
    output = capsys.readouterr().out
    assert "steps: 20 = 8 epochs of 5 targets / 2" in output
    assert "steps: 12 = 8 epochs of 3 photos / 2" in output


WITHOUT_TORCH = """
import sys

class Absent:
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in ("torch", "transformers", "peft", "deepspeed", "ray", "mlflow"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from lavic.cli import main
sys.exit(main(["submit", "--config", "pipeline-7b", "--dry-run"]))
"""


def test_dry_run_needs_no_torch(tmp_path):
    result = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("  per GPU  ") == 2 and "7.57 billion frozen" in result.stdout


def test_input_globs_work_in_a_folder_with_brackets(tmp_path):
    folder = tmp_path / "[2023] raw"
    folder.mkdir()
    (folder / "meta.jsonl").write_text("{}")

    def crawl(items):
        photos = {"train": {"items": [str(folder / items)]}, "valid": {"items": ["b.jsonl"]}}
        return [step for step in plan_steps(pipeline(photos=photos)) if step.name == "crawl-train"]

    assert missing_inputs(crawl("*.jsonl"), {}) == []
    (line,) = missing_inputs(crawl("*.json"), {})
    assert re.fullmatch(r"crawl-train reads .*\*\.json: no such file", line)


def test_retrieval_with_a_sweep_is_refused(cluster, capsys):
    argv = ["--sweep.candidates", "candidates_st", "--stages", *STAGES]
    assert submit("--dry-run", *argv) == 2
    assert "tune-retriever does not go with a sweep" in capsys.readouterr().err


def test_a_second_submit_queues_nothing(cluster, capsys):
    assert submit() == 0
    dependencies = [next((w for w in job["args"] if w.startswith("--dependency")), "") for job in jobs(cluster)]
    ids = ["", "1", "1", "2", "3", "5:4", "6", "7", "8"]
    assert dependencies == [f"--dependency=afterok:{i}" if i else "" for i in ids]
    assert all("--kill-on-invalid-dep=yes" in job["args"] for job in jobs(cluster))
    assert all(job["env"]["LAVIC_LOGS"] == str(cluster / "pipeline-mini" / "logs") for job in jobs(cluster))
    capsys.readouterr()
    assert submit() == 0
    assert len(jobs(cluster)) == len(ORDER)
    out = capsys.readouterr().out
    assert out.count("waiting, job") == len(ORDER) and "nothing to submit" in out


def test_status_shows_the_error_line_and_submit_resumes_at_the_failed_step(cluster, capsys):
    assert submit() == 0
    out = cluster / "pipeline-mini"
    write_set(out / "shards" / "train", [])
    write_set(out / "shards" / "valid", [])
    for split in ("train", "valid"):
        receipt = {"manifest": digest_manifest(out / "shards" / split)}
        (out / "shards" / f"{split}.verified.json").write_text(json.dumps(receipt))
    for number in range(1, 6):
        end_job(cluster, number, "COMPLETED")
    (out / "logs" / "distill-6.log").write_text("Traceback\nlavic distill: error: no more disk [rank 1]\nerror: srun\n")
    end_job(cluster, 6, "FAILED", "NonZeroExitCode")
    capsys.readouterr()
    assert main(["submit", "status", str(out), "--json"]) == 1
    rows = {row["step"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert [rows[name]["state"] for name in ORDER] == ["done"] * 5 + ["failed"] + ["cancelled"] * 3
    assert rows["distill"]["why"] == "lavic distill: error: no more disk [rank 1]"
    assert rows["evaluate"]["why"] == "distill failed: lavic distill: error: no more disk [rank 1]"
    # without accounting SLURM forgets jobs; jobs.json keeps their states
    set_slurm(cluster, jobs=[{**job, "state": "forgotten"} for job in jobs(cluster)])
    assert main(["submit", "status", str(out)]) == 1
    assert "embed, tune, evaluate: cancelled: distill failed: lavic distill: error" in capsys.readouterr().out

    assert submit() == 0
    assert [job["args"][1] for job in jobs(cluster)[9:]] == [f"--job-name=lavic-{name}" for name in ORDER[5:]]
    assert not any(word.startswith("--dependency") for word in jobs(cluster)[9]["args"])


def test_a_job_unknown_to_slurm_is_failed(cluster, capsys):
    assert submit() == 0
    set_slurm(cluster, jobs=[{**job, "state": "forgotten"} for job in jobs(cluster)])
    capsys.readouterr()
    assert main(["submit", "status", "pipeline-mini"]) == 1
    out = capsys.readouterr().out
    assert "crawl-train: failed: SLURM has forgotten the job" in out
    assert "evaluate: cancelled: crawl-train failed" in out


def test_without_squeue_nothing_is_queued_and_status_is_the_last_known(cluster, capsys):
    assert submit() == 0
    set_slurm(cluster, mute=True)
    assert submit() == 2
    assert len(jobs(cluster)) == len(ORDER)
    assert main(["submit", "status", "pipeline-mini"]) == 0
    captured = capsys.readouterr()
    assert "last known states are used: squeue does not answer" in captured.err
    assert not re.search(r"\bopen\b", captured.out)


def test_a_job_that_sbatch_refuses_queues_nothing(cluster, capsys):
    set_slurm(cluster, refuse="--partition=nix")
    assert submit("--evaluate.partition", "nix") == 2
    assert jobs(cluster) == []
    assert "evaluate: sbatch would refuse: sbatch: error: invalid partition" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--only", "tune"], "tune needs embed, which is not done"),
        (["--conversations.train", "gone.jsonl"], "gone.jsonl: no such file"),
        (["--photos.train.items", "gone/*.jsonl"], "gone/*.jsonl: no such file"),
        (["--distill.nodes", "3"], "distill: --loop.global-batch-size 32 cannot be shared by 3 processes"),
        (["--tune.settings", "{loop: {stpes: 3}}"], "tune: unknown flag --loop.stpes; did you mean --loop.steps?"),
        (["--embed.settings", "{batch_size: many}"], "embed: --batch-size"),
        (["--slurm.scripts", "mini"], "mini: has no "),
    ],
)
def test_invalid_arguments_are_refused_before_the_first_job(cluster, capsys, argv, message):
    assert submit(*argv) == 2
    assert message in capsys.readouterr().err
    assert not (cluster / "bin" / "slurm.json").exists()


HOSTILE_NAME = "a $(touch pwned) `touch pwned` ; touch pwned & 'x' \"y\" %j * \nz.json"


def test_names_never_reach_a_shell(cluster):
    """The pipeline folder, catalogue file and test set name each arrive as one argument."""
    shutil.copy(cluster / "mini" / "item2meta_train.json", cluster / HOSTILE_NAME)
    folder = HOSTILE_NAME.replace("\n", "").replace(".json", "")
    inputs = ["--photos.train.items", HOSTILE_NAME, "--conversations.test", f"x y={HOSTILE_NAME}"]
    assert submit("--out", folder, *inputs) == 0
    first, last = jobs(cluster)[0]["args"], jobs(cluster)[-1]["args"]
    assert first[first.index("--items") + 1] == str(cluster / HOSTILE_NAME)
    assert first[first.index("--out") + 1] == str(cluster / folder / "shards" / "train")
    assert last[last.index("--test") + 1] == f"x y={cluster / HOSTILE_NAME}"
    log = next(word for word in first if word.startswith("--output="))
    # SLURM substitutes %j; a % in a name is doubled
    assert log == f"--output={cluster}/{folder.replace('%j', '%%j')}/logs/crawl-train-%j.log"
    assert json.loads((cluster / folder / "jobs.json").read_text())["steps"]["crawl-train"]["log"].endswith(
        f"{folder}/logs/crawl-train-1.log"
    )
    assert not list(cluster.rglob("pwned"))


def test_a_second_submit_is_refused_while_one_runs(cluster):
    from lavic.launch.pipeline.job_registry import locked

    with locked(cluster / "pipeline-mini"):
        assert submit() == 2
    assert not (cluster / "bin" / "slurm.json").exists()


def test_status_of_a_folder_without_a_pipeline_is_refused(tmp_path, capsys):
    assert main(["submit", "status", str(tmp_path)]) == 2
    assert "no pipeline.yaml" in capsys.readouterr().err


def test_last_error_finds_the_line_that_explains_a_failure(tmp_path):
    log = tmp_path / "x.log"
    assert last_error(log) == ""
    log.write_text("one\ntwo\n")
    assert last_error(log) == "two"
    log.write_text("one\nslurmstepd: error: *** JOB 12 ON n1 CANCELLED AT now DUE TO TIME LIMIT ***\ntwo\n")
    assert "DUE TO TIME LIMIT" in last_error(log)
    log.write_text("[n1] lavic tune: error: no such thing\nRuntimeError: rank 1\nsrun: error: n1: exit 2\n")
    assert last_error(log) == "lavic tune: error: no such thing"
    log.write_text("rank 1 on n2 was killed by SIGKILL\nsrun: error: n2: task 0: exited with exit code 137\nfailed\n")
    assert last_error(log) == "rank 1 on n2 was killed by SIGKILL"


def test_the_mlflow_password_is_on_no_command_line_and_in_no_file(cluster, monkeypatch, capfd):
    """Jobs inherit the variable that holds it; the message about a server that does not answer omits it."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:pw-1234@127.0.0.1:{closed.getsockname()[1]}")
        assert main(["submit", "--config", "pipeline-mini", "--only", "evaluate", "--dry-run"]) == 0
        assert main(["submit", "--config", "pipeline-mini"]) == 0
        assert main(["submit", "status", "pipeline-mini"]) == 0
        assert main(["sync", "pipeline-mini"]) == 2
    captured = capfd.readouterr()
    assert "pw-1234" not in captured.out + captured.err
    assert "the pipeline's own run is not in MLflow" in captured.err
    assert "--tracking.uri env:MLFLOW_TRACKING_URI" in captured.out
    (argv,) = (job["args"] for job in jobs(cluster) if "--job-name=lavic-tune" in job["args"])
    assert argv[argv.index("--tracking.uri") + 1] == "env:MLFLOW_TRACKING_URI"
    files = [path for path in cluster.rglob("*") if path.is_file()]
    assert {"pipeline.yaml", "jobs.json", "metrics.jsonl", "mlflow.json", "slurm.json"} <= {path.name for path in files}
    assert not [path for path in files if b"pw-1234" in path.read_bytes()]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tracking.uri", "http://me:pw-1234@h"], "--tracking.uri: holds a password.*env:NAME or @FILE"),
        (["--slurm.env", "{HF_TOKEN: pw-1234}"], "--slurm.env: holds a password.*which jobs inherit"),
        (["--slurm.options=--export=ALL,X_TOKEN=pw-1234"], "--slurm.options: holds a password"),
        (["--tune.settings", "{tracking: {uri: 'http://me:pw-1234@h'}}"], "--tune.settings: holds a password"),
    ],
)
def test_a_secret_in_the_settings_is_refused(cluster, capsys, argv, message):
    assert main(["submit", "--config", "pipeline-mini", *argv]) == 2
    err = capsys.readouterr().err
    assert re.search(message, err) and "pw-1234" not in err
    assert not (cluster / "pipeline-mini").exists()
