"""The steps of a pipeline: what each reads and waits for, which are selected, the job of each."""

from __future__ import annotations

from pathlib import Path

import pytest

from lavic.config import parse
from lavic.data.conversations import set_names
from lavic.errors import ConfigError
from lavic.launch.pipeline.dag import plan_steps, select_steps
from lavic.launch.pipeline.pipeline_status import resolve_settings
from lavic.launch.pipeline.settings import STAGES, PipelineSettings, stage_of
from lavic.launch.pipeline.step_digest import reads_result_of
from lavic.launch.slurm.sbatch_job import step_job
from tests.launch.mini_pipeline import ORDER, pipeline


def test_every_step_waits_for_the_steps_that_it_reads():
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


def test_conversation_files_of_the_same_name_get_separate_lists():
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


def test_tune_and_evaluate_read_the_lists_of_retrieve():
    conversations = {"train": "t.jsonl.gz", "valid": "v.jsonl", "test": ["main=e.jsonl"]}
    retrieve_settings = {"settings": {"methods": ["bm25", "tokens"], "key": "candidates_all"}}
    steps = {
        step.name: step
        for step in plan_steps(pipeline(stages=STAGES, conversations=conversations, retrieve=retrieve_settings))
    }
    assert steps["tune-retriever"].needs == ("embed",) and steps["retrieve"].needs == ("tune-retriever",)
    assert steps["tune"].needs == ("retrieve",) and steps["evaluate"].needs == ("tune",)
    out = str(Path("out").absolute())
    retrieve = resolve_settings(steps["retrieve"], pipeline(retrieve=retrieve_settings))
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
    assert steps["tune"].inputs == steps["evaluate"].inputs == ()  # retrieve writes their inputs
    assert {"a.json", "b.jsonl"} <= {*steps["retrieve"].inputs}

    without_retriever = [stage for stage in STAGES if stage != "tune-retriever"]
    (step,) = (step for step in plan_steps(pipeline(stages=without_retriever)) if step.name == "retrieve")
    assert step.needs == ("embed",) and "--tokens.retriever" not in step.args


def test_the_key_of_the_lists_may_be_in_the_yaml_file_of_retrieve(tmp_path):
    file = tmp_path / "retrieve.yaml"
    file.write_text("# lavic retrieve\nkey: candidates_mine\n")
    steps = plan_steps(pipeline(stages=STAGES, retrieve={"config": str(file)}))
    by_name = {step.name: step for step in steps}
    for name in ("tune", "evaluate"):
        assert by_name[name].filled_in["candidates"] == "candidates_mine"


def test_stage_of_a_step_is_the_longest_prefix_of_its_name():
    names = ["crawl-train", "tune-retriever", "tune", "embed"]
    assert [stage_of(name) for name in names] == ["crawl", "tune-retriever", "tune", "embed"]
    (tune,) = (step for step in plan_steps(pipeline(stages=STAGES)) if step.name == "tune")
    assert reads_result_of(tune, "retrieve") and not reads_result_of(tune, "tune-retriever")


def test_retrieval_on_several_nodes_runs_on_ray():
    for nodes, script in ((1, "cpu.sbatch"), (3, "crawl.sbatch")):
        settings = pipeline(stages=STAGES, retrieve={"nodes": nodes})
        (step,) = (step for step in plan_steps(settings) if step.name == "retrieve")
        assert step_job(step, settings, resolve_settings(step, settings)).script.name == script


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
    pipeline_settings = pipeline(stages=STAGES, **{stage: {"settings": settings, "gpus": 8, "nodes": 2}})
    step = next(step for step in plan_steps(pipeline_settings) if step.stage == stage)
    job = step_job(step, pipeline_settings, resolve_settings(step, pipeline_settings))
    assert f"--gpus-per-node={gpus}" in job.args()
    assert job.resources.ranks_per_node == (gpus or 1)


def test_distill_waits_for_the_crawl_without_verify_and_describe():
    steps = plan_steps(pipeline(stages=["crawl", "distill"]))
    assert {step.name: step.needs for step in steps if step.selected}["distill"] == ("crawl-valid",)


def test_only_and_from_select_steps():
    settings = pipeline(only=["tune", "crawl"])
    selected = select_steps(plan_steps(settings), settings)
    assert [step.name for step in selected] == ["crawl-train", "crawl-valid", "tune"]
    settings = parse(PipelineSettings, ["--config", "pipeline-mini", "--from", "embed"], command="submit")
    assert [step.name for step in select_steps(plan_steps(settings), settings)] == ["embed", "tune", "evaluate"]
    with pytest.raises(ConfigError, match="--only crawl: not in this pipeline's stages"):
        settings = pipeline(stages=["tune"], only=["crawl"])
        select_steps(plan_steps(settings), settings)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"photos": {}}, r"photos.train.items is missing"),
        ({"conversations": {"train": "t", "valid": "v"}}, r"conversations.test is missing"),
        ({"conversations": {"train": "t", "test": ["v"]}}, r"conversations.valid is missing"),
        ({"tune": {"settings": {"out": "elsewhere"}}}, r"tune.settings.out: the pipeline fills that in"),
        ({"tune": {"config": "tune-mimi"}}, r"did you mean tune-mini"),
        ({"out": "a\\b"}, r"SLURM cannot write logs to a path with"),
    ],
)
def test_invalid_pipeline_settings_are_refused(changed, message):
    with pytest.raises(ConfigError, match=message):
        plan_steps(pipeline(**changed))


def test_an_unquoted_time_in_yaml_is_refused(tmp_path):
    file = tmp_path / "p.yaml"
    file.write_text("out: x\ntune: {time: 12:00:00}\n")
    with pytest.raises(ConfigError, match="put the time in quotes"):
        parse(PipelineSettings, ["--config", str(file)], command="submit")
