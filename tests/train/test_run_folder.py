"""Whose a run's folder is."""

from __future__ import annotations

from pathlib import Path

import pytest

from lavic.config import settings
from lavic.distributed.context import DistributedContext
from lavic.errors import ConfigError
from lavic.train.config import LoopSettings
from lavic.train.run_folder import RunFolder, digest_files


@settings
class Chosen:
    """A run's settings."""

    out: Path
    data: Path = Path("a")
    loop: LoopSettings = LoopSettings()
    nproc: int = 1


def opened(**chosen: object) -> RunFolder:
    return RunFolder(Chosen(**chosen), command="distill", world=DistributedContext(), free=("data",))


def begin(run: RunFolder) -> None:
    (run.checkpoints / "step-000001").mkdir(parents=True)
    run.close()


def test_a_run_goes_on_with_settings_that_change_nothing(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = opened(out=out)
    assert (out / "config.yaml").read_text().startswith("# lavic distill\n")
    assert not run.done
    begin(run)
    run = opened(out=out, data=Path("b"), nproc=2, loop=LoopSettings(num_workers=3, micro_batch=2, save_every=7))
    run.finish({"steps": 3})
    assert run.done
    run.close()


def test_other_settings_are_named(tmp_path: Path) -> None:
    begin(opened(out=tmp_path / "run"))
    with pytest.raises(
        ConfigError,
        match=r"settings: loop.global_batch_size was 32, is 8; loop.seed was 0, is 4. Use those of .*config.yaml",
    ):
        opened(out=tmp_path / "run", loop=LoopSettings(lr=0.1, global_batch_size=8, seed=4))


def test_a_run_goes_on_with_another_rate_and_other_steps(tmp_path: Path) -> None:
    out, loop = tmp_path / "run", LoopSettings(lr=0.5, steps=9, max_grad_norm=0.0, schedule="constant")
    begin(opened(out=out))
    run = opened(out=out, loop=loop)
    assert run.changed == {
        "loop.max_grad_norm": [1.0, 0.0],
        "loop.lr": [0.0001, 0.5],
        "loop.schedule": ["cosine", "constant"],
        "loop.steps": [None, 9],
    }
    run.close()
    run = opened(out=out, loop=loop)
    assert run.changed, "a start that ended before it went on changes nothing"
    assert run.accept_changes(Chosen(out=out, loop=loop)).startswith(
        "loop.lr was 0.0001, is 0.5; loop.max_grad_norm was 1.0, is 0.0; "
    )
    run.close()
    run = opened(out=out, loop=loop)
    assert not run.changed
    run.close()


def test_a_run_that_is_done_goes_on_to_more_steps_alone(tmp_path: Path) -> None:
    out = tmp_path / "run"
    begin(opened(out=out))
    run = opened(out=out)
    run.finish({"steps": 3})
    run.close()
    run = opened(out=out, loop=LoopSettings(lr=0.5))
    assert run.done and not run.extended
    run.close()
    run = opened(out=out, loop=LoopSettings(epochs=2.0))
    assert run.done and run.extended
    run.accept_changes(Chosen(out=out, loop=LoopSettings(epochs=2.0)))
    assert not run.done
    run.close()


def test_before_the_first_checkpoint_settings_may_change(tmp_path: Path) -> None:
    opened(out=tmp_path / "run").close()
    run = opened(out=tmp_path / "run", loop=LoopSettings(lr=0.5))
    assert not run.begun
    begin(run)
    run = opened(out=tmp_path / "run")
    assert run.changed == {"loop.lr": [0.5, 0.0001]}
    run.close()


def test_two_runs_do_not_write_to_one_folder(tmp_path: Path) -> None:
    run = opened(out=tmp_path / "run")
    with pytest.raises(ConfigError, match="another lavic command is writing to this folder"):
        opened(out=tmp_path / "run")
    run.close()
    opened(out=tmp_path / "run").close()


def test_something_else_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="is not a distill run"):
        opened(out=tmp_path)
    with pytest.raises(ConfigError, match="is not a distill run"):
        opened(out=tmp_path / "thesis.tex")


def test_a_path_that_weights_cannot_be_written_to_is_refused_before_the_training(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a path that is not UTF-8"):
        opened(out=tmp_path / "caf\udce9" / "run")
    assert not list(tmp_path.iterdir())
    opened(out=tmp_path / "café" / "run").close()


def test_a_digest_is_of_content_and_its_parts(tmp_path: Path) -> None:
    for name, text in (("a", "one"), ("b", "two"), ("c", "onetwo"), ("d", ""), ("e", "one")):
        (tmp_path / name).write_text(text)
    a, b, c, d, e = (tmp_path / name for name in "abcde")
    assert digest_files([a, b]) == digest_files([e, b])
    assert len({digest_files(files) for files in ([a, b], [b, a], [c, d], [c], [a])}) == 5
