"""Arguments of `lavic retrieve` for a small catalogue."""

from __future__ import annotations

import pytest

from tests.shards.retrieval.retrieval_files import write_catalogue, write_conversations


@pytest.fixture
def argv(tmp_path) -> list[str]:
    items, test = write_catalogue(tmp_path), write_conversations(tmp_path / "test.jsonl")
    return ["retrieve", "--items", f"{items}", "--conversations", f"{test}", "--index", f"{tmp_path / 'index'}"]
