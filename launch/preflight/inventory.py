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

from lavic.launch.preflight.report import MISSING
from lavic.tracking.run_metadata import versions

_PACKAGES = ("torch", "transformers", "peft", "deepspeed", "ray", "numpy", "pillow")
_CODE = ("lavic", "lavic.shards", "lavic.launch")


def memory_problems(required_gib: float, meminfo: Path = Path("/proc/meminfo")) -> Iterator[str]:
    """Too little free main memory, as where processes of an earlier job are still running."""
    with contextlib.suppress(OSError, KeyError, ValueError):
        rows = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free, total = (int(rows[name].split()[0]) / 2**20 for name in ("MemAvailable", "MemTotal"))
        if free < required_gib:
            yield f"{free:.1f} of {total:.1f} GiB of memory free, {required_gib:g} required"


def gpu_problems(required: int, facts: dict[str, Any], *, timeout_s: float) -> Iterator[str]:
    """What is wrong with this node's GPUs; their names and driver are added to `facts`."""
    code = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"
    try:
        completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout_s)
        visible = int(completed.stdout.strip() or 0) if completed.returncode == 0 else 0
        reason = "" if visible else next(iter(completed.stderr.strip().splitlines()[-1:]), "")
    except subprocess.TimeoutExpired:
        visible, reason = 0, f"torch did not answer within {timeout_s:.0f} s"
    if visible < required:
        yield f"{visible} of {required} GPUs visible{f' ({reason[:200]})' if reason else ''}"
    fields = "index,name,driver_version,memory.total,memory.free,ecc.errors.uncorrected.volatile.total,uuid"
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        table = subprocess.run(query, capture_output=True, text=True, timeout=timeout_s)
    except FileNotFoundError:
        return
    except subprocess.TimeoutExpired:
        yield f"nvidia-smi did not answer within {timeout_s:.0f} s"
        return
    if table.returncode:
        yield f"nvidia-smi: {(table.stdout + table.stderr).strip()[:200]}"
        return
    yield from read_gpu_table(table.stdout, facts, os.environ.get("CUDA_VISIBLE_DEVICES"))


def read_gpu_table(table: str, facts: dict[str, Any], visible: str | None = None) -> Iterator[str]:
    """What is wrong according to nvidia-smi; GPU names and drivers are added to `facts`.

    The table has a line for each GPU of the node, with the fields that `gpu_problems` queries. `visible` is
    CUDA_VISIBLE_DEVICES: on a shared node the other GPUs belong to other jobs.
    """
    rows = [[cell.strip() for cell in line.split(",")] for line in table.splitlines() if line.strip()]
    if visible is not None:
        rows = list(_visible_rows(rows, visible))
    facts["gpus"] = sorted({row[1] for row in rows})
    facts["driver"] = sorted({row[2] for row in rows})
    facts["gpu_free_mib"] = min((int(row[4]) for row in rows if row[4].isdigit()), default=0)
    for index, _, _, total, free, errors, *_ in rows:
        if total.isdigit() and free.isdigit() and int(free) < 0.9 * int(total):
            yield f"GPU {index}: {int(free) / 1024:.0f} of {int(total) / 1024:.0f} GiB free: another process uses it"
        if errors.isdigit() and int(errors):
            yield f"GPU {index}: {errors} uncorrected memory errors"


def _visible_rows(rows: Sequence[list[str]], visible: str) -> Iterator[list[str]]:
    """The rows that CUDA shows: indices or prefixes of UUIDs, up to the first that matches none, as CUDA reads them.

    A MIG instance has a UUID of its own, which is in no row: nvidia-smi does not report its memory here.
    """
    for name in (part.strip() for part in visible.split(",")):
        by_index = [row for row in rows if name.isdigit() and row[0] == name]
        by_uuid = [row for row in rows if name and len(row) > 6 and row[6].startswith(name)]
        if not by_index and not by_uuid:
            return
        yield (by_index or by_uuid)[0]


def code_digest() -> str:
    """The digest of lavic's own source files."""
    total = hashlib.sha256()
    for name in _CODE:
        spec = importlib.util.find_spec(name)
        folder = Path(((spec and spec.submodule_search_locations) or [""])[0])
        for file in sorted(folder.rglob("*.py")):
            total.update(f"{name}/{file.relative_to(folder)}".encode() + file.read_bytes())
    return total.hexdigest()[:16]


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter, where they are installed."""
    return {"python": platform.python_version(), **versions(*_PACKAGES)}


def data_digest(path: Path) -> str:
    """A quick digest of a file or folder: of its size, its ends, its manifests; `MISSING` where it does not exist."""
    total = hashlib.sha256()
    try:
        if path.is_dir():
            # only the files that complete a folder, not what a running command writes
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
        return MISSING
    return total.hexdigest()[:16]
