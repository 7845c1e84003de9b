"""The descriptions of a shard that is not finished, on disk: a killed command continues inside the shard."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, get_args

from lavic.data.tar_shards import sidecar_path
from lavic.shards.teacher.teacher import Description
from lavic.shards.teacher.text_check import Flag
from lavic.storage.paths import is_remote

_FORMAT = "lavic-begun-descriptions-1"


class PartialDescriptions:
    """What has been written about a shard so far, by attempt and key.

    Lines are appended as descriptions come; one that a kill cut short is removed. Descriptions of another shard, or
    made in another way, are discarded. In an object store nothing is kept.

    Attributes:
        written: Attempt (0 or 1) -> key -> description.
    """

    def __init__(self, file: BinaryIO | None, written: dict[int, dict[str, Description]]) -> None:
        self._file, self.written = file, written

    @classmethod
    @contextmanager
    def open(cls, shard: Path, origin: Mapping[str, str]) -> Iterator[PartialDescriptions]:
        """Reads what is there; `origin` has the shard's digest, and what its descriptions depend on."""
        written: dict[int, dict[str, Description]] = {0: {}, 1: {}}
        if is_remote(shard):
            yield cls(None, written)
            return
        path = partial_path(shard)
        header = _line({"format": _FORMAT, **origin})
        with path.open("a+b") as file:
            file.seek(0)
            end = _read(file, header, written)
            file.truncate(end)
            if not end:
                file.write(header)
            yield cls(file, written)

    def add(self, attempt: int, keys: Sequence[str], texts: Sequence[Description]) -> None:
        """Keeps some descriptions at once; failed ones are not kept."""
        lines = []
        for key, text in zip(keys, texts, strict=True):
            self.written[attempt][key] = text
            if text.flag != "failed":
                lines.append(_line({"key": key, "attempt": attempt, "text": text.text, "flag": text.flag}))
        if self._file is not None:
            self._file.write(b"".join(lines))
            self._file.flush()


def partial_path(shard: Path) -> Path:
    """Its path: `x-000000.tar` -> `x-000000.descriptions.begun`."""
    return sidecar_path(shard, "descriptions.begun")


def _line(value: Mapping[str, object]) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _read(file: BinaryIO, header: bytes, written: dict[int, dict[str, Description]]) -> int:
    """Fills `written`; returns where the whole lines end, 0 if the file is of something else."""
    if file.readline() != header:
        return 0
    end = len(header)
    for line in file:
        try:
            row = json.loads(line)
            if not line.endswith(b"\n") or row["flag"] not in get_args(Flag):
                break
            written[row["attempt"]][row["key"]] = Description(text=row["text"], flag=row["flag"])
        except (ValueError, KeyError, TypeError):
            break
        end += len(line)
    return end
