"""Looks for incomplete files in a folder."""

from __future__ import annotations

import json
import struct
import tarfile
from pathlib import Path

import yaml
from PIL import Image


def check_complete(folder: Path) -> None:
    """Reads every file to its end, except hidden ones, which no reader opens."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            try:
                _read(path)
            except Exception as error:
                raise AssertionError(f"incomplete: {path}: {error!r}") from error


def _read(path: Path) -> None:
    data = path.read_bytes()
    if path.suffix == ".json":
        json.loads(data)
    elif path.suffix == ".jsonl":
        lines = data.splitlines(keepends=True)
        if path.name == "metrics.jsonl":  # a journal may end within a line
            lines = [line for line in lines if line.endswith(b"\n")]
        for line in lines:
            json.loads(line)
            assert line.endswith(b"\n")
    elif path.suffix in (".yaml", ".yml"):
        assert yaml.safe_load(data)
    elif path.suffix == ".safetensors":
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])
        ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        assert len(data) == 8 + size + max(ends)
    elif path.suffix == ".tar":
        with tarfile.open(path) as archive:
            assert all(archive.extractfile(member).read() is not None for member in archive)  # type: ignore[union-attr]
        assert data.endswith(bytes(1024))
    elif path.suffix in (".jpg", ".png"):
        with Image.open(path) as image:
            image.load()
    elif path.suffix == ".html":
        assert data.rstrip().endswith(b"</html>")
    else:
        # a step's result may have no rows; a file of counts beside it says that it is complete
        assert data or path.name == "jobs.json" or "work" in path.parts
