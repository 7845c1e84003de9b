"""`lavic submit`: the jobs that it submits, and how it reads the answers of SLURM."""

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
from lavic.config import parse
from lavic.config.cli_args import to_args
from lavic.data.conversations import set_names
from lavic.data.manifest import digest_manifest
from lavic.errors import ConfigError
from lavic.launch.pipeline.dag import plan_steps, select_steps
from lavic.launch.pipeline.pipeline_status import resolve_settings
from lavic.launch.pipeline.settings import STAGES, PipelineSettings, stage_of
from lavic.launch.pipeline.step_digest import reads_result_of
from lavic.launch.pipeline.step_status import last_error
from lavic.launch.slurm.sbatch_job import step_job
from lavic.launch.submit.command import missing_inputs
from tests.crawled_sets import write_set
from tests.launch.mini_pipeline import ORDER, end_job, jobs, make_photos, set_slurm, submit

HERE = Path(__file__).parent
GOLDEN = HERE / "golden"


def pipeline(**more) -> PipelineSettings:
    photos = {"train": {"items": ["a.json"]}, "valid": {"items": ["b.jsonl"], "described": True}}
    conversations = {"train": "t.jsonl", "valid": "v.jsonl", "test": ["e.jsonl"]}
    return PipelineSettings(**{"out": "out", "photos": photos, "conversations": conversations, **more})


# -- The dry run ------------------------------------------------------------------------------------------------------


RETRIEVING = ["--stages", *STAGES]


@pytest.mark.parametrize(
    ("name", "config", "more"),
    [
        ("pipeline-mini", "pipeline-mini", []),
        ("pipeline-7b", "pipeline-7b", []),
        ("pipeline-mini-retrieve", "pipeline-mini", ["--from", "embed", *RETRIEVING]),
    ],
)
def test_the_dry_run_is_as_it_was(name, config, more, tmp_path, monkeypatch, capsys):
    """`LAVIC_GOLDEN=write` writes the files anew: then read their difference."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LAVIC_VENV", "/venv")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert main(["submit", "--config", config, "--dry-run", *more]) == 0
    said = capsys.readouterr().out
    scripts = Path(next(iter(lavic.slurm.__path__)))
    for script in (*scripts.glob("*.sbatch"), *scripts.glob("*.sh")):
        text = script.read_text().rstrip()
        said = said.replace(text, "(the file)")
    neutral = said.replace(str(tmp_path), "HERE").replace(str(scripts), "SLURM")
    golden = GOLDEN / f"{name}.txt"
    if os.environ.get("LAVIC_GOLDEN") == "write":
        golden.write_text(neutral)
    assert neutral == golden.read_text()
    assert neutral.count("(the file)") == len(set(re.findall(r"^== SLURM/.+$", neutral, re.M))) == (4 if more else 5)
    assert not list(tmp_path.iterdir()), "a dry run leaves nothing behind"


def test_samples_are_counted_as_the_training_counts_them(cluster, capsys):
    """One for each target, and no photo that validates."""
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
    said = capsys.readouterr().out
    assert "steps: 20 = 8 epochs of 5 targets / 2" in said
    assert "steps: 12 = 8 epochs of 3 photos / 2" in said


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


def test_a_login_node_plans_without_torch(tmp_path):
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("  per GPU  ") == 2 and "7.57 billion frozen" in done.stdout


def test_the_files_of_a_folder_with_brackets_are_found(tmp_path):
    folder = tmp_path / "[2023] raw"
    folder.mkdir()
    (folder / "meta.jsonl").write_text("{}")

    def crawl(items):
        photos = {"train": {"items": [str(folder / items)]}, "valid": {"items": ["b.jsonl"]}}
        return [step for step in plan_steps(pipeline(photos=photos)) if step.name == "crawl-train"]

    assert missing_inputs(crawl("*.jsonl"), {}) == []
    (line,) = missing_inputs(crawl("*.json"), {})
    assert re.fullmatch(r"crawl-train reads .*\*\.json: no such file", line)


# -- Steps ------------------------------------------------------------------------------------------------------------


def test_every_step_follows_what_it_reads():
    steps = plan_steps(pipeline())
    assert [step.name for step in steps] == ORDER
    needs = {step.name: step.needs for step in steps}
    assert needs == {
        "crawl-train": (),
        "crawl-valid": ("crawl-train",),
        "verify-train": ("crawl-train",),
        "verify-valid": ("crawl-valid",),
        "describe-train": ("verify-train",),
        "distill": ("describe-train", "verify-valid"),
        "embed": ("distill",),
        "tune": ("embed",),
        "evaluate": ("tune",),
    }


def test_conversation_files_of_the_same_name_get_lists_of_their_own():
    tests = ["home=home/test.jsonl", "beauty=beauty/test.jsonl"]
    conversations = {"train": "t.jsonl", "valid": "v.jsonl", "test": tests}
    steps = {step.name: step for step in plan_steps(pipeline(stages=STAGES, conversations=conversations))}
    lists = Path("out").absolute() / "retrieval"
    evaluate = resolve_settings(steps["evaluate"], pipeline())
    assert list(evaluate.test) == [f"home={lists}/home-test.jsonl", f"beauty={lists}/beauty-test.jsonl"]
    retrieve = resolve_settings(steps["retrieve"], pipeline())
    assert set_names(retrieve.conversations) == ["t", "v", "home-test", "beauty-test"]
    twins = {**conversations, "test": ["a=1/home/test.jsonl", "b=2/home/test.jsonl"]}
    with pytest.raises(ConfigError, match="two files have the same name"):
        plan_steps(pipeline(stages=STAGES, conversations=twins))


def test_with_retrieval_the_later_stages_read_the_lists_that_it_makes():
    conversations = {"train": "t.jsonl.gz", "valid": "v.jsonl", "test": ["main=e.jsonl"]}
    chosen = {"settings": {"methods": ["bm25", "tokens"], "key": "candidates_all"}}
    steps = {
        step.name: step for step in plan_steps(pipeline(stages=STAGES, conversations=conversations, retrieve=chosen))
    }
    assert steps["tune-retriever"].needs == ("embed",) and steps["retrieve"].needs == ("tune-retriever",)
    assert steps["tune"].needs == ("retrieve",) and steps["evaluate"].needs == ("tune",)
    out = str(Path("out").absolute())
    retrieve = resolve_settings(steps["retrieve"], pipeline(retrieve=chosen))
    assert [Path(path).name for path in retrieve.conversations] == ["t.jsonl.gz", "v.jsonl", "e.jsonl"]
    assert (str(retrieve.tokens.retriever), str(retrieve.store)) == (f"{out}/runs/retriever", f"{out}/store")
    tune = resolve_settings(steps["tune"], pipeline())
    lists = f"{out}/retrieval"
    assert (str(tune.train), str(tune.valid), tune.candidates) == (
        f"{lists}/t.jsonl",
        f"{lists}/v.jsonl",
        "candidates_all",
    )
    evaluate = resolve_settings(steps["evaluate"], pipeline())
    assert (list(evaluate.test), evaluate.candidates) == ([f"main={lists}/e.jsonl"], "candidates_all")
    assert steps["tune"].inputs == steps["evaluate"].inputs == ()  # nothing of theirs must be there beforehand
    assert {"a.json", "b.jsonl"} <= {*steps["retrieve"].inputs}

    words_alone = [stage for stage in STAGES if stage != "tune-retriever"]
    (step,) = (step for step in plan_steps(pipeline(stages=words_alone)) if step.name == "retrieve")
    assert step.needs == ("embed",) and "--tokens.retriever" not in step.args


def test_a_step_is_of_the_stage_that_its_name_begins_with():
    names = ["crawl-train", "tune-retriever", "tune", "embed"]
    assert [stage_of(name) for name in names] == ["crawl", "tune-retriever", "tune", "embed"]
    (tune,) = (step for step in plan_steps(pipeline(stages=STAGES)) if step.name == "tune")
    assert reads_result_of(tune, "retrieve") and not reads_result_of(tune, "tune-retriever")


def test_retrieval_and_a_sweep_do_not_go_together(cluster, capsys):
    words = ["--sweep.candidates", "candidates_st", "--stages", *STAGES]
    assert submit("--dry-run", *words) == 2
    assert "tune-retriever does not go with a sweep" in capsys.readouterr().err


def test_retrieval_on_several_nodes_runs_on_ray():
    for nodes, script in ((1, "cpu.sbatch"), (3, "crawl.sbatch")):
        chosen = pipeline(stages=STAGES, retrieve={"nodes": nodes})
        (step,) = (step for step in plan_steps(chosen) if step.name == "retrieve")
        assert step_job(step, chosen, resolve_settings(step, chosen)).script.name == script


@pytest.mark.parametrize(
    ("stage", "settings", "gpus"),
    [
        ("describe", {}, 8),
        ("describe", {"endpoint": {"url": ["http://a:1"], "model": "m"}}, 0),
        ("retrieve", {"methods": ["bm25", "dense"]}, 8),
        ("retrieve", {"methods": ["bm25", "endpoint"], "endpoint": {"url": ["http://a:1"], "model": "m"}}, 0),
        ("distill", {}, 8),
    ],
)
def test_a_step_that_loads_no_model_asks_for_no_gpu(stage, settings, gpus):
    chosen = pipeline(stages=STAGES, **{stage: {"settings": settings, "gpus": 8, "nodes": 2}})
    step = next(step for step in plan_steps(chosen) if step.stage == stage)
    job = step_job(step, chosen, resolve_settings(step, chosen))
    assert f"--gpus-per-node={gpus}" in job.args()
    assert job.resources.ranks_per_node == (gpus or 1)


def test_without_the_stages_that_only_add_the_others_wait_for_the_crawl():
    steps = plan_steps(pipeline(stages=["crawl", "distill"]))
    assert {step.name: step.needs for step in steps if step.selected}["distill"] == ("crawl-valid",)


def test_only_and_from():
    chosen = pipeline(only=["tune", "crawl"])
    assert [step.name for step in select_steps(plan_steps(chosen), chosen)] == ["crawl-train", "crawl-valid", "tune"]
    chosen = parse(PipelineSettings, ["--config", "pipeline-mini", "--from", "embed"], command="submit")
    assert [step.name for step in select_steps(plan_steps(chosen), chosen)] == ["embed", "tune", "evaluate"]
    with pytest.raises(ConfigError, match="--only crawl: not in this pipeline's stages"):
        chosen = pipeline(stages=["tune"], only=["crawl"])
        select_steps(plan_steps(chosen), chosen)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"photos": {}}, r"photos.train.items is missing"),
        ({"conversations": {"train": "t", "valid": "v"}}, r"conversations.test is missing"),
        ({"conversations": {"train": "t", "test": ["v"]}}, r"conversations.valid is missing"),
        ({"tune": {"settings": {"out": "elsewhere"}}}, r"tune.settings.out: the pipeline fills that in"),
        ({"tune": {"config": "tune-mimi"}}, r"did you mean tune-mini"),
        ({"out": "a\\b"}, r"SLURM cannot write logs to a path with"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_queued(more, message):
    with pytest.raises(ConfigError, match=message):
        plan_steps(pipeline(**more))


def test_a_time_that_yaml_takes_for_a_number_is_refused(tmp_path):
    file = tmp_path / "p.yaml"
    file.write_text("out: x\ntune: {time: 12:00:00}\n")
    with pytest.raises(ConfigError, match="put the time in quotes"):
        parse(PipelineSettings, ["--config", str(file)], command="submit")


def test_values_become_words_that_need_no_shell():
    values = {"a_b": {"c": 1, "d": True, "e": False}, "f": ["x y", "$(z)"], "g": None, "h": {"i": [[1, "a"]]}}
    args = ["--a-b.c", "1", "--a-b.d", "--a-b.no-e", "--f", "x y", "$(z)", "--g", "None", "--h.i", '[1, "a"]']
    assert list(to_args(values)) == args


# -- Submitting -------------------------------------------------------------------------------------------------------


def test_the_chain_is_queued_once(cluster, capsys):
    assert submit() == 0
    after = [next((w for w in job["args"] if w.startswith("--dependency")), "") for job in jobs(cluster)]
    ids = ["", "1", "1", "2", "3", "5:4", "6", "7", "8"]
    assert after == [f"--dependency=afterok:{i}" if i else "" for i in ids]
    assert all("--kill-on-invalid-dep=yes" in job["args"] for job in jobs(cluster))
    assert all(job["env"]["LAVIC_LOGS"] == str(cluster / "pipeline-mini" / "logs") for job in jobs(cluster))
    capsys.readouterr()
    assert submit() == 0
    assert len(jobs(cluster)) == len(ORDER)
    said = capsys.readouterr().out
    assert said.count("waiting, job") == len(ORDER) and "nothing to submit" in said


def test_a_failure_is_told_with_its_line_and_the_next_call_goes_on_from_there(cluster, capsys):
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
    told = {row["step"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert [told[name]["state"] for name in ORDER] == ["done"] * 5 + ["failed"] + ["cancelled"] * 3
    assert told["distill"]["why"] == "lavic distill: error: no more disk [rank 1]"
    assert told["evaluate"]["why"] == "distill failed: lavic distill: error: no more disk [rank 1]"
    # without accounting SLURM forgets; the pipeline does not
    set_slurm(cluster, jobs=[{**job, "state": "forgotten"} for job in jobs(cluster)])
    assert main(["submit", "status", str(out)]) == 1
    assert "embed, tune, evaluate: cancelled: distill failed: lavic distill: error" in capsys.readouterr().out

    assert submit() == 0
    assert [job["args"][1] for job in jobs(cluster)[9:]] == [f"--job-name=lavic-{name}" for name in ORDER[5:]]
    assert not any(word.startswith("--dependency") for word in jobs(cluster)[9]["args"])


def test_a_job_that_slurm_forgot_before_it_was_asked_for(cluster, capsys):
    assert submit() == 0
    set_slurm(cluster, jobs=[{**job, "state": "forgotten"} for job in jobs(cluster)])
    capsys.readouterr()
    assert main(["submit", "status", "pipeline-mini"]) == 1
    said = capsys.readouterr().out
    assert "crawl-train: failed: SLURM has forgotten the job" in said
    assert "evaluate: cancelled: crawl-train failed" in said


def test_a_silent_controller_queues_nothing_and_status_tells_what_it_knew(cluster, capsys):
    assert submit() == 0
    set_slurm(cluster, mute=True)
    assert submit() == 2
    assert len(jobs(cluster)) == len(ORDER)
    assert main(["submit", "status", "pipeline-mini"]) == 0
    said = capsys.readouterr()
    assert "last known states are used: squeue does not answer" in said.err
    assert not re.search(r"\bopen\b", said.out)


def test_what_sbatch_would_refuse_queues_nothing(cluster, capsys):
    set_slurm(cluster, refuse="--partition=nix")
    assert submit("--evaluate.partition", "nix") == 2
    assert jobs(cluster) == []
    assert "evaluate: sbatch would refuse: sbatch: error: invalid partition" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
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
def test_a_mistake_is_found_before_the_first_job(cluster, capsys, words, message):
    assert submit(*words) == 2
    assert message in capsys.readouterr().err
    assert not (cluster / "bin" / "slurm.json").exists()


NASTY = "a $(touch pwned) `touch pwned` ; touch pwned & 'x' \"y\" %j * \nz.json"


def test_names_never_reach_a_shell(cluster):
    """Not the pipeline's folder, not a catalogue's file, not a test's name: each arrives as the one word that it is."""
    shutil.copy(cluster / "mini" / "item2meta_train.json", cluster / NASTY)
    folder = NASTY.replace("\n", "").replace(".json", "")
    assert submit("--out", folder, "--photos.train.items", NASTY, "--conversations.test", f"x y={NASTY}") == 0
    first, last = jobs(cluster)[0]["args"], jobs(cluster)[-1]["args"]
    assert first[first.index("--items") + 1] == str(cluster / NASTY)
    assert first[first.index("--out") + 1] == str(cluster / folder / "shards" / "train")
    assert last[last.index("--test") + 1] == f"x y={cluster / NASTY}"
    log = next(word for word in first if word.startswith("--output="))
    # SLURM puts things in the place of %j; a name's own % is doubled
    assert log == f"--output={cluster}/{folder.replace('%j', '%%j')}/logs/crawl-train-%j.log"
    assert json.loads((cluster / folder / "jobs.json").read_text())["steps"]["crawl-train"]["log"].endswith(
        f"{folder}/logs/crawl-train-1.log"
    )
    assert not list(cluster.rglob("pwned"))


def test_two_submissions_at_once(cluster):
    from lavic.launch.pipeline.job_registry import locked

    with locked(cluster / "pipeline-mini"):
        assert submit() == 2
    assert not (cluster / "bin" / "slurm.json").exists()


def test_status_of_no_pipeline(tmp_path, capsys):
    assert main(["submit", "status", str(tmp_path)]) == 2
    assert "no pipeline.yaml" in capsys.readouterr().err


def test_the_line_that_says_why(tmp_path):
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


def test_a_password_of_mlflow_is_on_no_command_line_and_in_no_file(cluster, monkeypatch, capfd):
    """The jobs inherit the variable that holds it; a server that does not answer is named without it."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:pw-1234@127.0.0.1:{closed.getsockname()[1]}")
        assert main(["submit", "--config", "pipeline-mini", "--only", "evaluate", "--dry-run"]) == 0
        assert main(["submit", "--config", "pipeline-mini"]) == 0
        assert main(["submit", "status", "pipeline-mini"]) == 0
        assert main(["sync", "pipeline-mini"]) == 2
    said = capfd.readouterr()
    assert "pw-1234" not in said.out + said.err
    assert "the pipeline's own run is not in MLflow" in said.err
    assert "--tracking.uri env:MLFLOW_TRACKING_URI" in said.out
    (words,) = (job["args"] for job in jobs(cluster) if "--job-name=lavic-tune" in job["args"])
    assert words[words.index("--tracking.uri") + 1] == "env:MLFLOW_TRACKING_URI"
    files = [path for path in cluster.rglob("*") if path.is_file()]
    assert {"pipeline.yaml", "jobs.json", "metrics.jsonl", "mlflow.json", "slurm.json"} <= {path.name for path in files}
    assert not [path for path in files if b"pw-1234" in path.read_bytes()]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tracking.uri", "http://me:pw-1234@h"], "--tracking.uri: holds a password.*env:NAME or @FILE"),
        (["--slurm.env", "{HF_TOKEN: pw-1234}"], "--slurm.env: holds a password.*which jobs inherit"),
        (["--slurm.options=--export=ALL,X_TOKEN=pw-1234"], "--slurm.options: holds a password"),
        (["--tune.settings", "{tracking: {uri: 'http://me:pw-1234@h'}}"], "--tune.settings: holds a password"),
    ],
)
def test_a_secret_among_the_settings_is_refused(cluster, capsys, words, said):
    assert main(["submit", "--config", "pipeline-mini", *words]) == 2
    err = capsys.readouterr().err
    assert re.search(said, err) and "pw-1234" not in err
    assert not (cluster / "pipeline-mini").exists()
