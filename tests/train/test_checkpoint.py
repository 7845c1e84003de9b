"""Checkpoints that are cut off, altered or of another run."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch

from lavic.distributed.context import DistributedContext
from lavic.errors import ConfigError
from lavic.train.checkpoint import COMPLETE, PROGRESS, STATE, CheckpointManager, TrainState, find_damage
from lavic.train.config import LoopSettings
from lavic.train.deepspeed.engine import Engine
from tests.train.toy import ToyData, ToyTask


@pytest.fixture(scope="module")
def engine(world: DistributedContext) -> Engine:
    engine, data = Engine(ToyTask(), world, LoopSettings()), ToyData(40, 1)
    engine.backward(engine.forward(data.collate([data[p] for p in range(8)])).mean())
    engine.step(0.1)
    return engine


@pytest.fixture
def checkpoints(tmp_path: Path, engine: Engine) -> CheckpointManager:
    """Steps 1 and 2, with weights of all ones and of all twos."""
    checkpoints = CheckpointManager(tmp_path / "checkpoints", DistributedContext(), identity={"base model": "a"})
    for step in (1, 2):
        engine.load_state_dict(
            {name: torch.full_like(tensor, step) for name, tensor in engine.state_dict().items()}, steps=step
        )
        checkpoints.save(engine, TrainState(step=step, samples=8 * step, best_step=step, best_loss=0.5, validated=step))
    return checkpoints


def weights_equal(engine: Engine, value: float) -> bool:
    return all((p == value).all() for p in engine.parameters.values())


def test_the_newest_checkpoint_is_loaded(checkpoints: CheckpointManager, engine: Engine) -> None:
    progress = checkpoints.load(engine)
    assert progress == TrainState(step=2, samples=16, best_step=2, best_loss=0.5, validated=2)
    assert weights_equal(engine, 2)


def test_load_without_checkpoints_returns_none(tmp_path: Path, engine: Engine) -> None:
    assert CheckpointManager(tmp_path / "none", DistributedContext()).load(engine) is None


def truncate(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])


def flip_last_byte(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(data)


@pytest.mark.parametrize("name", [STATE, PROGRESS, COMPLETE])
@pytest.mark.parametrize("damage", [truncate, flip_last_byte, lambda folder, name: (folder / name).unlink()])
def test_a_damaged_checkpoint_is_skipped(checkpoints: CheckpointManager, engine: Engine, name: str, damage) -> None:
    newest = checkpoints.folder / "step-000002"
    assert not find_damage(newest)
    if (name, damage) == (COMPLETE, flip_last_byte):
        (newest / COMPLETE).write_text("[]")  # its last byte is a newline: flipping it changes nothing
    else:
        damage(newest, name)
    assert find_damage(newest)
    progress = checkpoints.load(engine)
    assert progress is not None and progress.step == 1
    assert weights_equal(engine, 1)


def test_partial_checkpoints_are_ignored_and_removed(checkpoints: CheckpointManager, engine: Engine) -> None:
    shutil.copytree(checkpoints.folder / "step-000002", checkpoints.folder / ".step-000003.0123.part")
    assert checkpoints.latest() == checkpoints.folder / "step-000002"
    checkpoints.save(engine, TrainState(step=3, samples=24))
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step-000002", "step-000003"]


def test_a_damaged_later_checkpoint_is_removed(checkpoints: CheckpointManager, engine: Engine) -> None:
    truncate(checkpoints.folder / "step-000002", STATE)
    checkpoints.save(engine, TrainState(step=1, samples=8))
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-000001"]


def test_an_old_checkpoint_that_cannot_be_removed_is_tried_again(
    checkpoints: CheckpointManager, engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On NFS a removed file that another process reads stays in its folder: that is no reason to end a training."""

    def fail(folder: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(folder))

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", fail)
        checkpoints.save(engine, TrainState(step=3, samples=24))
    assert "step-000001 cannot be removed (Directory not empty)" in caplog.text
    checkpoints.save(engine, TrainState(step=4, samples=32))
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step-000003", "step-000004"]


def test_a_checkpoint_of_an_older_version_lacks_newer_digests(checkpoints: CheckpointManager, engine: Engine) -> None:
    identity = {"base model": "a", "tokenizer": "t"}
    assert CheckpointManager(checkpoints.folder, DistributedContext(), identity=identity).load(engine)
    CheckpointManager(checkpoints.folder, DistributedContext(), identity=identity).save(engine, TrainState(step=5))
    with pytest.raises(ConfigError, match=r"step-000005 belongs to another tokenizer \(t, here u\)"):
        CheckpointManager(checkpoints.folder, DistributedContext(), identity={**identity, "tokenizer": "u"}).load(
            engine
        )


def test_a_checkpoint_of_another_model_is_refused(checkpoints: CheckpointManager, engine: Engine) -> None:
    other = CheckpointManager(checkpoints.folder, DistributedContext(), identity={"base model": "b"})
    with pytest.raises(ConfigError, match=r"step-000002 belongs to another base model \(a, here b\)"):
        other.load(engine)


def test_a_checkpoint_of_another_format_is_refused(checkpoints: CheckpointManager, engine: Engine) -> None:
    import lavic.train.checkpoint as module

    folder = checkpoints.folder / "step-000002"
    record = json.loads((folder / PROGRESS).read_text())
    (folder / PROGRESS).write_text(json.dumps({**record, "format": 0}))
    checksums = json.loads((folder / COMPLETE).read_text())
    (folder / COMPLETE).write_text(json.dumps({**checksums, PROGRESS: module._checksum(folder / PROGRESS)}))
    with pytest.raises(ConfigError, match="format 0"):
        checkpoints.load(engine)


def test_frozen_weights_are_not_saved(checkpoints: CheckpointManager, engine: Engine) -> None:
    trained = sum(p.numel() for p in engine.parameters.values())
    size = (checkpoints.folder / "step-000002" / STATE).stat().st_size
    assert 12 * trained < size < 12 * trained + 4000
