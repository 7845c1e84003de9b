"""Deduplication of hashes with a buffer of a bounded size."""

from __future__ import annotations

from pathlib import Path

import pytest

from lavic.shards.plan import external_dedup
from lavic.shards.plan.external_dedup import ExternalDedup, hash64


def test_more_hashes_than_the_buffer_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external_dedup, "_BUFFER", 64)
    dedup, texts = ExternalDedup(tmp_path / "r"), [str(n * n % 97) for n in range(500)]
    for text in texts:
        dedup.add(hash64(text))
    assert len(dedup) == 500
    assert dedup.first_equal().tolist() == [texts.index(text) for text in texts]
    assert ExternalDedup(tmp_path / "none").first_equal().tolist() == []
