"""Checkpoints: one folder per step, whole or not there.

    checkpoints/step-000120/state.safetensors   weights and AdamW moments by parameter name, float32
                            progress.json       where the run stands, and what it belongs to
                            COMPLETE            size and sha256 of the others; written last

Rank 0 writes them, from tensors that were put together over all ranks: this is what DeepSpeed's universal checkpoint
holds, without its conversion step. So a run goes on with any number of ranks, frozen weights are never in it, and
nothing is unpickled. A folder is written under another name and renamed when it is on disk.
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
from lavic.train.run_folder import write_together

if TYPE_CHECKING:
    from lavic.train.deepspeed.engine import Engine

FORMAT = 1
STATE, PROGRESS, COMPLETE = "state.safetensors", "progress.json", "COMPLETE"
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands: with the weights, all that is needed to go on to the same losses.

    The order of samples, their random choices and dropout are functions of the seed and of these numbers.
    """

    step: int = 0
    """Optimizer steps done."""
    samples: int = 0
    """Global samples seen: the data position, whatever the number of ranks."""
    best_step: int | None = None
    """Step of the lowest validation loss so far."""
    best_loss: float | None = None
    """That loss, nats per target token."""
    validated: int = -1
    """Step of the last validation."""
    skipped_steps: int = 0
    """Steps among those done whose loss or gradient was not finite: they changed no weight."""


class Checkpoints:
    """The checkpoints of one run. Every method is collective."""

    def __init__(
        self, folder: Path, world: DistributedContext, *, keep: int = 2, identity: Mapping[str, str] | None = None
    ) -> None:
        """Opens a folder, which need not exist.

        Args:
            folder: For example RUN/checkpoints, seen by every rank.
            world: The ranks.
            keep: How many to keep, newest first.
            identity: What a checkpoint belongs to, such as a digest of the base model; `load` refuses others.
        """
        self.folder = folder
        self.keep = keep
        self.identity = dict(identity or {})
        self._world = world

    def save(self, engine: Engine, progress: Progress) -> Path:
        """Writes a checkpoint and removes the oldest ones.

        Returns:
            Its folder.

        Raises:
            LavicError: It could not be written; what was there before still is.
        """
        state = engine.state()
        target = self.folder / f"step-{progress.step:06d}"

        def write() -> None:
            with atomic_folder(target) as aside:
                save_file(state, aside / STATE)
                _write(aside / PROGRESS, {"format": FORMAT, "identity": self.identity, **asdict(progress)})
                _write(aside / COMPLETE, {name: _seal(aside / name) for name in (STATE, PROGRESS)})
            self._prune(target)

        try:
            write_together(target, write, self._world)
        except LavicError as e:
            last = self.latest()
            raise LavicError(f"{e}; the last whole checkpoint is {last.name if last else 'none'}") from None
        return target

    def latest(self) -> Path | None:
        """The newest whole checkpoint. Torn ones (cut off, altered) are named and passed over."""
        found = None
        if self._world.is_main:
            for folder in self._folders():
                if not (harm := torn(folder)):
                    found = folder
                    break
                log.warning("%s is not whole (%s): passed over", folder, harm)
        return self._world.broadcast_object(found)

    def steps(self) -> int:
        """Steps done, as the newest whole checkpoint has it."""
        folder = self.latest()
        return _step(folder) if folder else 0

    def load(self, engine: Engine) -> Progress | None:
        """Puts the newest whole checkpoint into the engine.

        Returns:
            Where the run stands, or None where there is no whole checkpoint.

        Raises:
            ConfigError: The checkpoint belongs to another model, other data or another format.
        """
        folder = self.latest()
        if folder is None:
            return None
        try:
            record = json.loads((folder / PROGRESS).read_text("utf-8"))
            state = load_file(folder / STATE)
        except OSError as e:
            raise ConfigError(
                f"rank {self._world.rank} does not see {folder} ({e.strerror or e}): --out must be on a file system "
                "that every node shares"
            ) from e
        if (written := record.pop("format")) != FORMAT:
            raise ConfigError(f"{folder} has format {written}, this version reads {FORMAT}: start a new --out")
        theirs = record.pop("identity")
        for key in sorted({*theirs, *self.identity}):
            if theirs.get(key) != self.identity.get(key):
                raise ConfigError(
                    f"{folder} belongs to another {key} ({theirs.get(key)}, here {self.identity.get(key)}): "
                    f"restore the {key} it was made with, or start a new --out"
                )
        progress = Progress(**record)
        engine.load(state, steps=progress.step - progress.skipped_steps)
        return progress

    def _folders(self) -> list[Path]:
        found = (folder for folder in self.folder.glob("step-*") if re.fullmatch(r"step-\d+", folder.name))
        return sorted(found, key=_step, reverse=True)

    def _prune(self, newest: Path) -> None:
        # a later step than the one just written was torn, or the run would have gone on from there
        kept = [folder for folder in self._folders() if _step(folder) <= _step(newest) and (folder / COMPLETE).exists()]
        for folder in (*self._folders(), *self.folder.glob(".step-*")):
            if folder not in kept[: max(1, self.keep)]:
                shutil.rmtree(folder)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def torn(folder: Path) -> str:
    """What of a checkpoint is not what was written, by the sizes and sha256 in COMPLETE; nothing where all is whole."""
    try:
        seals = json.loads((folder / COMPLETE).read_text("utf-8"))
        if set(seals) != {STATE, PROGRESS}:
            return f"{COMPLETE} lists other files"
        changed = [name for name, seal in seals.items() if _seal(folder / name) != seal]
        return f"{', '.join(changed)} changed since" if changed else ""
    except OSError as e:
        return f"{Path(e.filename).name if e.filename else folder.name}: {e.strerror}"
    except (ValueError, TypeError, AttributeError):
        return f"{COMPLETE} is no list of files"


def _write(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=1) + "\n", "utf-8")


def _seal(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
