"""Writes catalogue files: fifty items as JSON lines or parquet, or any bytes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

METAS = {
    f"B{n}": {"title": f"Möbel {n}", "images": [{"large": f"http://x/{n}.jpg"}], "categories": ["a", "b"]}
    for n in range(50)
}


ROWS = [{"parent_asin": id, **meta} for id, meta in METAS.items()]


def write_rows(path: Path, rows: list[dict]) -> Path:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def write_parquet(path: Path) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


def write_bytes(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path
