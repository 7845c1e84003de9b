"""The run folder: which settings may change when a run resumes, and which folders are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from lavic.config import settings
from lavic.distributed.context import DistributedContext
from lavic.errors import ConfigError
from lavic.train.config import LoopSettings
from lavic.train.run_folder import RunFolder, digest_files


@settings
class RunSettings:
    """A run's settings."""

    out: Path
    data: Path = Path("a")
    loop: LoopSettings = LoopSettings()
    nproc: int = 1


def open_run(**options: object) -> RunFolder:
    return RunFolder(RunSettings(**options), command="distill", world=DistributedContext(), free=("data",))


def write_first_checkpoint(run: RunFolder) -> None:
    (run.checkpoints / "step-000001").mkdir(parents=True)
    run.close()


def test_settings_that_do_not_affect_weights_may_change(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = open_run(out=out)
    assert (out / "config.yaml").read_text().startswith("# lavic distill\n")
    assert not run.done
    write_first_checkpoint(run)
    run = open_run(out=out, data=Path("b"), nproc=2, loop=LoopSettings(num_workers=3, micro_batch=2, save_every=7))
    run.finish({"steps": 3}, {"training set": "a"})
    assert run.done
    run.close()


def test_changed_settings_are_refused_and_named(tmp_path: Path) -> None:
    write_first_checkpoint(open_run(out=tmp_path / "run"))
    with pytest.raises(
        ConfigError,
        match=r"settings: loop.global_batch_size was 32, is 8; loop.seed was 0, is 4. Use those of .*config.yaml",
    ):
        open_run(out=tmp_path / "run", loop=LoopSettings(lr=0.1, global_batch_size=8, seed=4))


def test_learning_rate_and_steps_may_change(tmp_path: Path) -> None:
    out, loop = tmp_path / "run", LoopSettings(lr=0.5, steps=9, max_grad_norm=0.0, schedule="constant")
    write_first_checkpoint(open_run(out=out))
    run = open_run(out=out, loop=loop)
    assert run.changed == {
        "loop.max_grad_norm": [1.0, 0.0],
        "loop.lr": [0.0001, 0.5],
        "loop.schedule": ["cosine", "constant"],
        "loop.steps": [None, 9],
    }
    run.close()
    run = open_run(out=out, loop=loop)
    assert run.changed, "a start that ended early records no change"
    assert run.accept_changes(RunSettings(out=out, loop=loop)).startswith(
        "loop.lr was 0.0001, is 0.5; loop.max_grad_norm was 1.0, is 0.0; "
    )
    run.close()
    run = open_run(out=out, loop=loop)
    assert not run.changed
    run.close()


def test_a_complete_run_of_other_data_is_refused(tmp_path: Path) -> None:
    run = open_run(out=tmp_path / "run")
    run.finish({"steps": 3}, {"training set": "a", "validation set": "b"})
    run.check_inputs({"training set": "a", "validation set": "b", "item store": "of a later version"})
    with pytest.raises(ConfigError, match="its run is complete, and its validation set was another one"):
        run.check_inputs({"training set": "a", "validation set": "c"})


def test_a_complete_run_continues_only_with_more_steps(tmp_path: Path) -> None:
    out = tmp_path / "run"
    write_first_checkpoint(open_run(out=out))
    run = open_run(out=out)
    run.finish({"steps": 3}, {"training set": "a"})
    run.close()
    run = open_run(out=out, loop=LoopSettings(lr=0.5))
    assert run.done and not run.extended
    run.close()
    run = open_run(out=out, loop=LoopSettings(epochs=2.0))
    assert run.done and run.extended
    run.accept_changes(RunSettings(out=out, loop=LoopSettings(epochs=2.0)))
    assert not run.done
    run.close()


def test_all_settings_may_change_before_the_first_checkpoint(tmp_path: Path) -> None:
    open_run(out=tmp_path / "run").close()
    run = open_run(out=tmp_path / "run", loop=LoopSettings(lr=0.5))
    assert not run.begun
    write_first_checkpoint(run)
    run = open_run(out=tmp_path / "run")
    assert run.changed == {"loop.lr": [0.5, 0.0001]}
    run.close()


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    run = open_run(out=tmp_path / "run")
    with pytest.raises(ConfigError, match="another lavic command is writing to this folder"):
        open_run(out=tmp_path / "run")
    run.close()
    open_run(out=tmp_path / "run").close()


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("a thesis")
    with pytest.raises(ConfigError, match="is not a distill run"):
        open_run(out=tmp_path)
    with pytest.raises(ConfigError, match="is not a distill run"):
        open_run(out=tmp_path / "thesis.tex")


def test_a_path_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a path that is not UTF-8"):
        open_run(out=tmp_path / "caf\udce9" / "run")
    assert not list(tmp_path.iterdir())
    open_run(out=tmp_path / "café" / "run").close()


def test_digest_depends_on_contents_and_file_boundaries(tmp_path: Path) -> None:
    for name, text in (("a", "one"), ("b", "two"), ("c", "onetwo"), ("d", ""), ("e", "one")):
        (tmp_path / name).write_text(text)
    a, b, c, d, e = (tmp_path / name for name in "abcde")
    assert digest_files([a, b]) == digest_files([e, b])
    assert len({digest_files(files) for files in ([a, b], [b, a], [c, d], [c], [a])}) == 5
