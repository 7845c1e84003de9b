"""Checkpoints: one folder per step, written atomically.

    checkpoints/step-000120/state.safetensors   weights and AdamW moments by parameter name, float32
                            progress.json       `TrainState`, and the identity of model and data
                            COMPLETE            size and sha256 of the others; written last

Rank 0 writes them from tensors gathered over all ranks: the content of DeepSpeed's universal checkpoint, without its
conversion step. A run can therefore resume with any number of ranks, frozen weights are not saved, and nothing is
unpickled.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file

from lavic.distributed.context import DistributedContext
from lavic.errors import ConfigError, LavicError
from lavic.storage.atomic import atomic_folder
from lavic.storage.file_digest import file_sha256
from lavic.train.run_folder import write_on_rank_0

if TYPE_CHECKING:
    from lavic.train.deepspeed.engine import Engine

FORMAT = 1
STATE, PROGRESS, COMPLETE = "state.safetensors", "progress.json", "COMPLETE"
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """The progress of a run: with weights and moments, all that is needed to resume to the same losses.

    The order of samples, their random choices and dropout are functions of the seed and of these numbers.
    """

    step: int = 0
    """Optimizer steps done."""
    samples: int = 0
    """Samples seen by all ranks: the position in the data."""
    best_step: int | None = None
    """Step of the best validation so far: of the lowest loss, or the highest score."""
    best_loss: float | None = None
    """The validation loss of that step, nats per target token."""
    best_score: float | None = None
    """The score of that step, if the model is selected by a score."""
    validations_since_best: int = 0
    """Validations since then, for `loop.early_stopping_patience`."""
    validated: int = -1
    """Step of the last validation."""
    skipped_steps: int = 0
    """Number of those steps that changed no weight because loss or gradient was not finite."""
    empty_steps: int = 0
    """Number of those steps that changed no weight because none of their samples has a target."""

    @property
    def updates(self) -> int:
        """Number of those steps that changed the weights."""
        return self.step - self.skipped_steps - self.empty_steps


class CheckpointManager:
    """Saves and loads the checkpoints of one run. Every method is collective.

    Args:
        folder: RUN/checkpoints, on a file system that all ranks share.
        world: The ranks.
        keep: How many of the newest to keep.
        identity: Digests of model and data, which `load` compares.
    """

    def __init__(
        self, folder: Path, world: DistributedContext, *, keep: int = 2, identity: Mapping[str, str] | None = None
    ) -> None:
        self.folder = folder
        self.keep = keep
        self.identity = dict(identity or {})
        self._world = world

    def save(self, engine: Engine, train_state: TrainState) -> Path:
        """Writes a checkpoint, then removes the oldest ones.

        Returns:
            Its folder.

        Raises:
            LavicError: It could not be written; earlier ones are still there.
        """
        tensors = engine.state_dict()
        target = self.folder / f"step-{train_state.step:06d}"

        def write() -> None:
            with atomic_folder(target) as part:
                save_file(tensors, part / STATE)
                _write(part / PROGRESS, {"format": FORMAT, "identity": self.identity, **asdict(train_state)})
                _write(part / COMPLETE, {name: _checksum(part / name) for name in (STATE, PROGRESS)})
            self._prune(target)

        try:
            write_on_rank_0(target, write, self._world)
        except LavicError as e:
            last = self.latest()
            raise LavicError(f"{e}; the last complete checkpoint is {last.name if last else 'none'}") from None
        return target

    def latest(self) -> Path | None:
        """The newest complete checkpoint. Damaged ones are logged and ignored."""
        latest = None
        if self._world.is_main:
            for folder in self._folders():
                if not (damage := find_damage(folder)):
                    latest = folder
                    break
                log.warning("%s is damaged (%s): ignored", folder, damage)
        return self._world.broadcast_object(latest)

    def latest_step(self) -> int:
        """Steps done at the newest complete checkpoint; 0 without one."""
        folder = self.latest()
        return _step(folder) if folder else 0

    def load(self, engine: Engine) -> TrainState | None:
        """Loads the newest complete checkpoint into the engine.

        Returns:
            The run's progress, or None without a complete checkpoint.

        Raises:
            ConfigError: The checkpoint belongs to another model, other data or another format.
        """
        folder = self.latest()
        if folder is None:
            return None
        try:
            record = json.loads((folder / PROGRESS).read_text("utf-8"))
            tensors = load_file(folder / STATE)
        except OSError as e:
            raise ConfigError(
                f"rank {self._world.rank} does not see {folder} ({e.strerror or e}): --out must be on a file system "
                "that every node shares"
            ) from e
        if (written := record.pop("format")) != FORMAT:
            raise ConfigError(f"{folder} has format {written}, this version reads {FORMAT}: start a new --out")
        saved = record.pop("identity")
        for key in sorted({*saved, *self.identity}):
            if saved.get(key, self.identity.get(key)) != self.identity.get(key):  # older versions recorded fewer
                raise ConfigError(
                    f"{folder} belongs to another {key} ({saved.get(key)}, here {self.identity.get(key)}): "
                    f"restore the {key} it was made with, or start a new --out"
                )
        train_state = TrainState(**record)
        engine.load_state_dict(tensors, steps=train_state.updates)
        return train_state

    def _folders(self) -> list[Path]:
        folders = (folder for folder in self.folder.glob("step-*") if re.fullmatch(r"step-\d+", folder.name))
        return sorted(folders, key=_step, reverse=True)

    def _prune(self, newest: Path) -> None:
        # A later step than the one just written is damaged: the run would have resumed from it.
        resumable = [
            folder for folder in self._folders() if _step(folder) <= _step(newest) and (folder / COMPLETE).exists()
        ]
        for folder in (*self._folders(), *self.folder.glob(".step-*")):
            if folder not in resumable[: max(1, self.keep)]:
                try:
                    shutil.rmtree(folder)
                except OSError as e:  # on NFS a file that another process reads; the next save tries again
                    log.warning("%s cannot be removed (%s)", folder, e.strerror or e)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def find_damage(folder: Path) -> str:
    """Which files of a checkpoint differ from the sizes and sha256 in COMPLETE; "" if none."""
    try:
        checksums = json.loads((folder / COMPLETE).read_text("utf-8"))
        if set(checksums) != {STATE, PROGRESS}:
            return f"{COMPLETE} lists other files"
        changed = [name for name, checksum in checksums.items() if _checksum(folder / name) != checksum]
        return f"{', '.join(changed)} changed" if changed else ""
    except OSError as e:
        return f"{Path(e.filename).name if e.filename else folder.name}: {e.strerror}"
    except (ValueError, TypeError, AttributeError):
        return f"{COMPLETE} is not a list of files"


def _write(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=1) + "\n", "utf-8")


def _checksum(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
