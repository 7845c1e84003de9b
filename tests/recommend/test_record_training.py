"""What a server kept of its conversations is training data as it stands."""

from __future__ import annotations

import pytest

from lavic.cli import main
from lavic.model.bundle import BundleInfo
from lavic.recommend.conversation_record import CANDIDATES, ConversationRecord

from .conftest import KEY, Assets


@pytest.mark.slow
def test_tune_on_recorded_votes(assets: Assets, tmp_path):
    record = ConversationRecord(tmp_path / "kept.jsonl")
    for number, row in enumerate(assets.conversations[:6]):
        shown = row.candidates[KEY]
        record.add_answer(row.turns, shown)
        record.add_vote(row.turns, shown, shown[number], liked=number % 2 == 0)
    argv = [
        *("tune", "--store", assets.store, "--train", record.path, "--valid", record.path, "--candidates", CANDIDATES),
        *("--model.name", assets.store.parent / "base", "--out", tmp_path / "run", "--lora.r", "2"),
        *("--loop.steps", "1", "--loop.global-batch-size", "2", "--max-length", "512"),
    ]
    assert main([str(arg) for arg in argv]) == 0
    assert BundleInfo.read(tmp_path / "run" / "bundle").list_size == 10
