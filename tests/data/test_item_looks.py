"""Looks in words, read from a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from lavic.data.sources.item_looks import read_looks
from lavic.errors import DataError


def test_looks_are_read(tmp_path: Path) -> None:
    (tmp_path / "looks.jsonl").write_bytes(b'\xef\xbb\xbf{"id": "A", "look": "red plain"}\r\n\r\n')
    assert read_looks(tmp_path / "looks.jsonl") == {"A": "red plain"}
    (tmp_path / "looks.jsonl").write_text('{"id": "A", "look": "red plain"}\n{"id": "B"}\n')
    with pytest.raises(DataError, match=r"looks.jsonl:2"):
        read_looks(tmp_path / "looks.jsonl")
    with pytest.raises(DataError, match="no such file"):
        read_looks(tmp_path / "none.jsonl")
