"""A sweep on the fake SLURM: its job arrays, what is submitted again or refused, and the table of results."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import yaml

from lavic.cli import main
from lavic.launch import evaluate
from tests.launch.mini_pipeline import jobs, make_results, set_slurm, submit

CATEGORIES = ("mugs", "bags")
KEY = "candidates_st"


def write_files(folder: Path) -> None:
    """Conversation files of each category."""
    rng = random.Random(0)
    for category in CATEGORIES:
        (folder / "data" / category).mkdir(parents=True)
        rows = []
        for number in range(12 if category == "mugs" else 8):
            listed = [f"{category}{item}" for item in rng.sample(range(50), 5)]
            text = f"<submission>{category} {number}</submission>"
            rows.append({"context": text, "context_items": [], "gt_items": [rng.choice(listed)], KEY: listed})
        for name in ("train", "valid", "test"):
            file = folder / "data" / category / f"{name}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def sweep(*args: str) -> int:
    """Submits a sweep; `args` replace the default flags."""
    flags = {f"--conversations.{name}": [f"data/{{category}}/{name}.jsonl"] for name in ("train", "valid", "test")}
    flags |= {"--sweep.categories": [*CATEGORIES], "--sweep.candidates": [KEY]}
    defaults = [arg for flag, values in flags.items() if flag not in args for arg in (flag, *values)]
    return submit("--stages", "embed", "tune", "evaluate", *defaults, *args)


@pytest.fixture
def out(cluster: Path) -> Path:
    """A pipeline's folder with a store, beside the files of two categories."""
    write_files(cluster)
    make_results(cluster / "pipeline-mini", "crawl-train", "crawl-valid", "distill", "embed")
    return cluster / "pipeline-mini"


def arrays(cluster: Path) -> list[dict[str, str]]:
    """The options of each job that is an array, by name."""
    options = [
        dict(arg[2:].split("=", 1) for arg in job["args"] if arg.startswith("--") and "=" in arg)
        for job in jobs(cluster)
    ]
    return [array_options for array_options in options if "array" in array_options]


def test_cells_are_submitted_as_two_arrays(cluster: Path, out: Path, capsys: pytest.CaptureFixture[str]):
    assert sweep("--sweep.seeds", "3", "4", "--sweep.at-once", "2") == 0
    tune, evaluation = arrays(cluster)
    assert tune["array"] == evaluation["array"] == "0,1,2,3%2"
    assert tune["output"] == f"{out}/logs/tune-%A_%a.log"
    assert evaluation["dependency"] == "aftercorr:1" and "dependency" not in tune
    (command, *_) = [job["args"] for job in jobs(cluster)]
    assert command[command.index("tune") :][:3] == ["tune", "--config", "tune-mini"]
    assert f"{out}/sweep/tune/@TASK@.yaml" in command
    cells = [yaml.safe_load((out / "sweep" / "tune" / f"{index}.yaml").read_text()) for index in range(4)]
    assert [cell["loop"]["seed"] for cell in cells] == [3, 4, 3, 4]
    assert {Path(cell["out"]).name for cell in cells} == {f"{c}-st-{s}" for c in CATEGORIES for s in (3, 4)}
    assert all(
        cell["train"] == f"{cluster}/data/{Path(cell['out']).name.partition('-')[0]}/train.jsonl" for cell in cells
    )
    assert yaml.safe_load((out / "sweep" / "evaluate" / "0.yaml").read_text())["bundle"] == f"{cells[0]['out']}/bundle"
    assert "tune            array 1 of 4 tasks" in capsys.readouterr().out

    # All are queued: nothing is submitted twice.
    assert sweep("--sweep.seeds", "3", "4") == 0
    assert len(arrays(cluster)) == 2 and "no cell to submit" in capsys.readouterr().out


def write_cell_results(out: Path, *cells: str, seed: int = 0) -> None:
    """Writes results of some cells: stage 2, and the evaluation of random answers."""
    for cell in cells:
        (out / "runs" / "tune" / cell).mkdir(parents=True)
        (out / "runs" / "tune" / cell / "result.json").write_text("{}")
        test = out.parent / "data" / cell.partition("-")[0] / "test.jsonl"
        rng = random.Random(f"{cell}{seed}")
        answers = [{"recommended": rng.choice(json.loads(line)[KEY])} for line in test.read_text().splitlines()]
        (out.parent / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
        argv = ["--test", test, "--run", f"lavic_x={out.parent / 'answers.jsonl'}", "--draws", "100"]
        assert evaluate.main([*map(str, argv), "--out", str(out / "evaluation" / cell)]) == 0


def test_failed_and_new_cells_are_submitted(cluster: Path, out: Path):
    assert sweep() == 0
    write_cell_results(out, "mugs-st-0")
    ended = [{**job, "state": "FAILED", "reason": "NonZeroExitCode"} for job in jobs(cluster)]
    set_slurm(cluster, jobs=ended)
    assert main(["submit", "status", str(out)]) == 1
    assert sweep("--sweep.seeds", "0", "1") == 0
    tune, evaluation = arrays(cluster)[2:]
    assert tune["array"] == evaluation["array"] == "1,2,3"  # a cell keeps its index
    assert evaluation["dependency"] == "aftercorr:3"


def test_evaluate_needs_a_completed_stage_2(cluster: Path, out: Path, capsys: pytest.CaptureFixture[str]):
    assert sweep("--only", "evaluate") == 2
    assert "evaluate of mugs-st-0 needs its stage 2, which is not done" in capsys.readouterr().err
    for cell in ("mugs-st-0", "bags-st-0"):
        (out / "runs" / "tune" / cell).mkdir(parents=True)
        (out / "runs" / "tune" / cell / "result.json").write_text("{}")
    assert sweep("--only", "evaluate") == 0
    (evaluation,) = arrays(cluster)
    assert evaluation["array"] == "0,1" and "dependency" not in evaluation


def end_all_jobs(cluster: Path, *, state: str = "COMPLETED") -> None:
    """Ends all jobs."""
    set_slurm(cluster, jobs=[{**job, "state": state, "reason": "None"} for job in jobs(cluster)])


def test_cells_with_changed_settings_are_moved_and_run_again(
    cluster: Path, out: Path, capsys: pytest.CaptureFixture[str]
):
    assert sweep() == 0
    write_cell_results(out, "mugs-st-0", "bags-st-0")
    end_all_jobs(cluster)
    # Settings without effect on results, and --keep, run nothing again.
    assert sweep("--tune.settings", "{loop: {num_workers: 1}}") == 0
    assert sweep("--tune.settings", "{loop: {lr: 0.5}}", "--keep") == 0
    assert len(arrays(cluster)) == 2
    with (cluster / "data" / "mugs" / "train.jsonl").open("a") as file:
        file.write("\n")
    capsys.readouterr()
    assert sweep("--tune.settings", "{loop: {lr: 0.5}}") == 0
    text = capsys.readouterr().out
    assert "mugs-st-0 is rebuilt" in text and "mugs/train.jsonl has changed" in text and "bags-st-0" not in text
    tune, evaluation = arrays(cluster)[2:]
    assert tune["array"] == evaluation["array"] == "0" and evaluation["dependency"] == "aftercorr:3"
    assert (out / "stale" / "tune-mugs-st-0-1" / "result.json").is_file()
    assert (out / "stale" / "evaluate-mugs-st-0-1" / "results.json").is_file()
    assert not (out / "runs" / "tune" / "mugs-st-0").exists()
    # A change of a waiting cell is reported; only the evaluation of the other cell runs again.
    assert (
        sweep("--tune.settings", "{loop: {lr: 0.7}}", "--only", "evaluate", "--evaluate.settings", "{orders: 2}") == 0
    )
    error = capsys.readouterr().err
    assert "tune of mugs-st-0 continues as it was submitted, before a change: loop.lr was 0.5, is 0.7" in error
    assert "tune of bags-st-0 was made with other settings or files: loop.lr" in error
    assert [array_options["array"] for array_options in arrays(cluster)[4:]] == ["1"]


def test_a_new_item_store_runs_its_cells_again(cluster: Path, out: Path):
    assert sweep() == 0
    write_cell_results(out, "mugs-st-0", "bags-st-0")
    end_all_jobs(cluster)
    (out / "store" / "manifest.json").write_text('{"new": 1}')
    assert sweep("--only", "tune", "evaluate") == 0
    assert [array_options["array"] for array_options in arrays(cluster)[2:]] == ["0,1", "0,1"]


def test_force_runs_completed_stages_again(cluster: Path, out: Path, capsys: pytest.CaptureFixture[str]):
    assert sweep() == 0
    assert sweep("--force", "tune") == 2
    assert "tune of mugs-st-0 is waiting (1_0) and would be rebuilt" in capsys.readouterr().err
    write_cell_results(out, "mugs-st-0", "bags-st-0")
    end_all_jobs(cluster)
    assert sweep("--force", "evaluate") == 0
    (evaluation,) = arrays(cluster)[2:]
    assert evaluation["array"] == "0,1" and "dependency" not in evaluation
    assert (out / "runs" / "tune" / "mugs-st-0").exists() and not (out / "evaluation" / "mugs-st-0").exists()


@pytest.mark.parametrize("shown", ["at once", "later"])
def test_an_unconfirmed_array_is_found_and_not_submitted_twice(
    cluster: Path, out: Path, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("lavic.launch.slurm.client._PAUSE_S", 0)
    set_slurm(cluster, sbatch="late", user="" if shown == "at once" else "nobody")  # queued but not shown yet
    if shown == "later":
        assert sweep() == 2
        assert "run the same command again, which looks for that array first" in capsys.readouterr().err
        set_slurm(cluster, sbatch="", user="")
    assert sweep() == 0
    tune, evaluation = arrays(cluster)
    assert (tune["array"], evaluation["array"]) == ("0,1", "0,1")
    assert evaluation["dependency"] == "aftercorr:1"


def test_logs_and_cancel_accept_cells(cluster: Path, out: Path, capsys: pytest.CaptureFixture[str]):
    assert sweep() == 0
    (out / "logs" / "tune-1_1.log").write_text("step 1\nstep 2\n")
    capsys.readouterr()
    for names in (["tune-bags-st-0"], ["tune"], []):
        assert main(["submit", "logs", str(out), *names]) == 0
        assert capsys.readouterr().out == "step 1\nstep 2\n"
    assert main(["submit", "logs", str(out), "tune-hats-st-0"]) == 2
    assert "tune-hats-st-0: no step or stage" in capsys.readouterr().err
    assert main(["submit", "cancel", str(out), "bags-st-0"]) == 0
    assert "2 tasks of the sweep: cancelled" in capsys.readouterr().out
    assert sweep() == 0  # only the cancelled cells
    assert [array_options["array"] for array_options in arrays(cluster)[2:]] == ["1", "1"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("--sweep.categories mugs hats", "tune of hats-st-0 reads"),
        ("--sweep.categories mugs mugs", "two cells have one name"),
        ("--sweep.categories ../x", "'../x' is not a name"),
        ("--conversations.train data/train.jsonl", "conversations.train: a sweep of categories needs {category}"),
        ("--force crawl", "--force crawl: not in this pipeline's stages"),
        ("--tune.settings {candidates: x}", "tune.settings.candidates: the sweep fills that in"),
        ("--tune.settings {max_length: no}", "tune of mugs-st-0: "),
    ],
)
def test_invalid_sweep_settings_are_refused(
    cluster: Path, out: Path, setting: str, message: str, capsys: pytest.CaptureFixture[str]
):
    flag, _, value = setting.partition(" ")
    assert sweep(flag, *([value] if value.startswith("{") else value.split())) == 2
    assert message in capsys.readouterr().err
    assert not (cluster / "bin" / "slurm.json").exists()  # nothing was submitted


def test_dry_run_shows_arrays_and_submits_nothing(cluster: Path, out: Path, capsys: pytest.CaptureFixture[str]):
    assert sweep("--dry-run") == 0
    text = capsys.readouterr().out
    assert "== sweep of 2 cells: mugs-st-0, bags-st-0" in text
    assert "--array=0,1" in text and not (out / "sweep.json").exists()


def test_table_pools_seeds_and_categories(cluster: Path, out: Path, capsys: pytest.CaptureFixture[str]):
    seeds = ("--sweep.seeds", "0", "1", "2")
    assert sweep(*seeds) == 0
    assert main(["submit", "table", str(out)]) == 2
    assert "none of the 6 cells is evaluated yet" in capsys.readouterr().err
    for seed in range(3):
        write_cell_results(out, f"mugs-st-{seed}", *([f"bags-st-{seed}"] if seed < 2 else []), seed=seed)
    assert main(["submit", "table", str(out), "--draws", "100"]) == 0
    assert "Not evaluated yet: bags-st-2." in capsys.readouterr().out
    table = json.loads((out / "table.json").read_text())
    assert table["missing"] == ["bags-st-2"]
    rows = {(row["category"], row["arm"]): row for row in table["rows"]}

    def value(category: str, seed: int) -> float:
        results = json.loads((out / "evaluation" / f"{category}-st-{seed}" / "results.json").read_text())
        return results["hit_rate"]["lavic_x"]["value"]

    mugs, pooled = rows["mugs", "lavic_x"], rows["all", "lavic_x"]
    assert (mugs["seeds"], mugs["conversations"]) == (3, 12)
    assert mugs["metrics"]["hit_rate"]["value"] == pytest.approx(sum(value("mugs", seed) for seed in range(3)) / 3)
    # All categories as one set, over the two seeds that both have.
    assert (pooled["seeds"], pooled["conversations"]) == (2, 20)
    expected = sum(12 * value("mugs", seed) + 8 * value("bags", seed) for seed in range(2)) / 40
    assert pooled["metrics"]["hit_rate"]["value"] == pytest.approx(expected)
    assert rows["all", "random"]["metrics"]["hit_rate"]["value"] == pytest.approx(0.2)
    assert "| all | st | lavic_x | 2 | 20 | 1.000 |" in (out / "table.md").read_text()
