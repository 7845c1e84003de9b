"""What a node has: free memory, GPUs, lavic's code, packages, and the data that a job reads."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lavic.tracking.run_metadata import versions

_PACKAGES = ("torch", "transformers", "peft", "deepspeed", "ray", "numpy", "pillow")
_CODE = ("lavic", "lavic.shards", "lavic.launch")


def memory(wanted_gib: float, told: Path = Path("/proc/meminfo")) -> Iterator[str]:
    """Whether this node has so much memory left, which another job's forgotten processes may hold."""
    with contextlib.suppress(OSError, KeyError, ValueError):
        rows = dict(line.split(":", 1) for line in told.read_text().splitlines())
        free, total = (int(rows[name].split()[0]) / 2**20 for name in ("MemAvailable", "MemTotal"))
        if free < wanted_gib:
            yield f"{free:.1f} of {total:.1f} GiB of memory free, {wanted_gib:g} wanted"


def gpus(asked: int, facts: dict[str, Any], *, within_s: float) -> Iterator[str]:
    """What is wrong with this node's GPUs; their names and driver go into `facts`."""
    code = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"
    try:
        told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=within_s)
        found = int(told.stdout.strip() or 0) if told.returncode == 0 else 0
        why = "" if found else next(iter(told.stderr.strip().splitlines()[-1:]), "")
    except subprocess.TimeoutExpired:
        found, why = 0, f"torch did not answer within {within_s:.0f} s"
    if found < asked:
        yield f"{found} of {asked} GPUs seen{f' ({why[:200]})' if why else ''}"
    fields = "index,name,driver_version,memory.total,memory.free,ecc.errors.uncorrected.volatile.total,uuid"
    words = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        table = subprocess.run(words, capture_output=True, text=True, timeout=within_s)
    except FileNotFoundError:
        return
    except subprocess.TimeoutExpired:
        yield f"nvidia-smi did not answer within {within_s:.0f} s"
        return
    if table.returncode:
        yield f"nvidia-smi: {(table.stdout + table.stderr).strip()[:200]}"
        return
    yield from read_cards(table.stdout, facts, os.environ.get("CUDA_VISIBLE_DEVICES"))


def read_cards(table: str, facts: dict[str, Any], visible: str | None = None) -> Iterator[str]:
    """What is wrong according to nvidia-smi's table; names and drivers go into `facts`.

    Args:
        table: A line for each GPU of the node, the fields of which `gpus` asks for.
        facts: Of the node.
        visible: CUDA_VISIBLE_DEVICES: on a shared node the other GPUs belong to other jobs.
    """
    rows = [[cell.strip() for cell in line.split(",")] for line in table.splitlines() if line.strip()]
    if visible is not None:
        rows = list(_visible(rows, visible))
    facts["gpus"] = sorted({row[1] for row in rows})
    facts["driver"] = sorted({row[2] for row in rows})
    free = [int(row[4]) for row in rows if row[4].isdigit()]
    facts["gpu_free_mib"] = min(free, default=0)
    for index, _, _, total, left, errors, *_ in rows:
        if total.isdigit() and left.isdigit() and int(left) < 0.9 * int(total):
            yield f"GPU {index}: {int(left) / 1024:.0f} of {int(total) / 1024:.0f} GiB free: another process is on it"
        if errors.isdigit() and int(errors):
            yield f"GPU {index}: {errors} uncorrected memory errors"


def _visible(rows: Sequence[list[str]], visible: str) -> Iterator[list[str]]:
    """The rows that CUDA shows: numbers, or beginnings of ids, up to the first that names none, as CUDA reads them.

    A part of a GPU (MIG) has an id of its own, which is in no row: its memory is not nvidia-smi's to tell here.
    """
    for name in (word.strip() for word in visible.split(",")):
        by_number = [row for row in rows if name.isdigit() and row[0] == name]
        by_id = [row for row in rows if name and len(row) > 6 and row[6].startswith(name)]
        if not by_number and not by_id:
            return
        yield (by_number or by_id)[0]


def code_digest() -> str:
    """Of lavic's own source."""
    total = hashlib.sha256()
    for name in _CODE:
        spec = importlib.util.find_spec(name)
        folder = Path(((spec and spec.submodule_search_locations) or [""])[0])
        for file in sorted(folder.rglob("*.py")):
            total.update(f"{name}/{file.relative_to(folder)}".encode() + file.read_bytes())
    return total.hexdigest()[:16]


def packages() -> dict[str, str]:
    """Versions of Python and of the packages that matter, where they are installed."""
    return {"python": platform.python_version(), **versions(*_PACKAGES)}


def digest(path: Path) -> str:
    """Tells two states of a file or a folder apart without reading gigabytes: by size, ends, manifests; or "gone"."""
    total = hashlib.sha256()
    try:
        if path.is_dir():
            # Not what a running command writes: only what makes a folder whole.
            for name in ("manifest.json", "config.json", "bundle.json", "result.json"):
                if (path / name).is_file():
                    total.update(name.encode() + (path / name).read_bytes())
            return total.hexdigest()[:16]
        with path.open("rb") as file:
            total.update(file.read(1 << 20))
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - (1 << 20)))
            total.update(file.read() + str(size).encode())
    except OSError:
        return "gone"
    return total.hexdigest()[:16]
