"""The output folder of a training run: its settings, its status and its lock.

RUN/config.yaml    the resolved settings
    metrics.jsonl  the journal
    checkpoints/
    bundle/        the result
    result.json    written last: the run is complete
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lavic.config import dump, flatten, load
from lavic.distributed.context import DistributedContext
from lavic.distributed.failure import disk_is_full, show_traceback
from lavic.errors import ConfigError, DataError, LavicError
from lavic.storage.atomic import atomic_write, remove_partial_files
from lavic.storage.output_folder import lock_output_folder

RESULT = "result.json"

FREE = (
    "cache",
    "deepspeed",
    "loop.activation_checkpointing",
    "loop.flight_recorder",
    "loop.hang_warn_minutes",
    "loop.log_every",
    "loop.micro_batch",
    "loop.micro_tokens",
    "loop.num_workers",
    "loop.save_every",
    "loop.save_total_limit",
    "model.chat_template",  # a path; the content is part of the prompt version, which is compared
    "nproc",
    "out",
    "tracking",
)
"""Keys, or groups of them, that may change when a run is resumed, because they do not affect the result."""

CHANGEABLE = (
    "loop.epochs",
    "loop.lr",
    "loop.max_grad_norm",
    "loop.max_skipped",
    "loop.early_stopping_patience",
    "loop.schedule",
    "loop.skip_samples",
    "loop.steps",
    "loop.warmup",
)
"""Keys that may change when a run is resumed, although they affect the result; changes are recorded in the journal."""


class RunFolder:
    """The output folder of a training run, locked until `close`: a context manager.

    Opening it creates the folder `settings.out` and, on rank 0, locks it. Before its first checkpoint, a run may be
    started again with other settings.

    Args:
        settings: The run's settings.
        command: Its name, for messages.
        world: The ranks; rank 0 writes.
        free: More keys that may change, such as the paths of inputs, whose content is compared.

    Raises:
        ConfigError: It has a run with other settings, a run in progress, or other content; or its path is not UTF-8.

    Attributes:
        folder: The folder.
        bundle: Its bundle.
        checkpoints: The folder of its checkpoints.
        begun: Whether it has a checkpoint, complete or not.
        changed: Settings of `CHANGEABLE` that differ from those of its last start, with the old and the new value.
    """

    def __init__(self, settings: Any, *, command: str, world: DistributedContext, free: Iterable[str] = ()) -> None:
        self.folder: Path = settings.out
        try:
            str(self.folder.absolute()).encode()
        except UnicodeEncodeError:
            raise ConfigError(
                f"--out {self.folder}: a path that is not UTF-8, which safetensors cannot write to: use another one"
            ) from None
        self.bundle = self.folder / "bundle"
        self.checkpoints = self.folder / "checkpoints"
        self.changed: dict[str, list[Any]] = {}
        self._main = world.is_main
        self._command = command
        config = self.folder / "config.yaml"
        # Check this before config.yaml, which rank 0 may be writing right now.
        occupied = self.folder.exists() and not _empty(self.folder)
        self.begun = self.done or any(self.checkpoints.glob("step-*"))
        if config.is_file() and self.begun:
            changes = _changed_settings(load(type(settings), config), settings, {*FREE, *free})
            self.changed = {key: changes.pop(key) for key in CHANGEABLE if key in changes}
            if changes:
                changed = _format_changes(changes)
                raise ConfigError(
                    f"{self.folder} has a run with other settings: {changed}. Use those of {config}, or another --out"
                )
        elif occupied and not config.is_file():
            raise ConfigError(f"--out {self.folder} exists and is not a {command} run: use another folder")
        if not self._main:
            return
        self._lock = ExitStack()
        self._lock.enter_context(lock_output_folder(self.folder))
        remove_partial_files(self.folder)
        if not (config.is_file() and self.begun):
            atomic_write(config, dump(settings, command=command))

    @property
    def done(self) -> bool:
        """Whether the run is complete."""
        return (self.folder / RESULT).is_file()

    @property
    def extended(self) -> bool:
        """Whether the run was complete, and the settings now have more steps or more patience."""
        return self.done and not self.changed.keys().isdisjoint(
            ("loop.steps", "loop.epochs", "loop.early_stopping_patience")
        )

    def accept_changes(self, settings: Any) -> str:
        """Records the changed settings; the run is then incomplete. All ranks must have opened it.

        Returns:
            The changes, for the log.
        """
        if self._main:
            atomic_write(self.folder / "config.yaml", dump(settings, command=self._command))
            (self.folder / RESULT).unlink(missing_ok=True)
        return _format_changes(self.changed)

    def close(self) -> None:
        """Unlocks the folder."""
        if self._main:
            self._lock.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def check_inputs(self, digests: Mapping[str, str]) -> None:
        """Compares the inputs with those of a complete run. On rank 0.

        Raises:
            ConfigError: One of them has another content.
        """
        recorded = json.loads((self.folder / RESULT).read_text("utf-8")).get("inputs", {})
        if changed := [name for name, digest in digests.items() if recorded.get(name, digest) != digest]:
            raise ConfigError(
                f"--out {self.folder}: its run is complete, and its {changed[0]} was another one: use another folder"
            )

    def finish(self, result: Mapping[str, Any], inputs: Mapping[str, str]) -> None:
        """Writes the result: the run is complete.

        Args:
            result: Its fields.
            inputs: Digests of the data by name, see `check_inputs`.
        """
        if self._main:
            atomic_write(self.folder / RESULT, json.dumps({**result, "inputs": dict(inputs)}, indent=2) + "\n")


def write_on_rank_0(path: Path, write: Callable[[], object], world: DistributedContext) -> None:
    """Calls `write` on rank 0; an error is raised on every rank, so that none waits for another. Collective.

    Raises:
        LavicError: On all ranks, with the message and the exit code of rank 0's error, whose type depends on the
            library that writes.
    """
    problem: tuple[int, str] | None = None
    if world.is_main:
        try:
            write()
        except LavicError as e:
            problem = e.exit_code, str(e)
        except Exception as e:
            if not (full := disk_is_full(e)) and not isinstance(e, OSError):
                show_traceback(type(e), e, e.__traceback__)
            hint = ": make room, then run the same command again" if full else ""
            problem = 1, f"could not write {path} ({type(e).__name__}: {e}){hint}"
    if problem := world.broadcast_object(problem):
        code, message = problem
        raise (DataError if code == DataError.exit_code else LavicError)(message)


def digest_files(files: Iterable[Path]) -> str:
    """A digest of the content of files, in the given order, but not of their names."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.stat().st_size.to_bytes(8, "little"))
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def _empty(folder: Path) -> bool:
    return folder.is_dir() and all(path.name.startswith(".") for path in folder.iterdir())


def _changed_settings(before: Any, now: Any, free: set[str]) -> dict[str, list[Any]]:
    """Settings that differ, with both values."""
    old, new = flatten(before), flatten(now)
    return {
        key: [old.get(key), new.get(key)]
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key) and not any(key == f or key.startswith(f"{f}.") for f in free)
    }


def _format_changes(changes: Mapping[str, Sequence[Any]]) -> str:
    return "; ".join(f"{key} was {old}, is {new}" for key, (old, new) in changes.items())
