"""A two-tower retriever for the tests of the method `tokens`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lavic.model.bundle import save_bundle
from lavic.model.config import ModelSettings
from lavic.model.loading import Backbone
from lavic.model.two_tower.features import FeatureExtractor
from lavic.model.two_tower.folds import FINAL, submission_hashes
from lavic.model.two_tower.head import TwoTowerHead, save_head
from lavic.model.two_tower.retriever import save_retriever
from tests.recommend.conftest import Assets

FOLDS = 2


@pytest.fixture(scope="session")
def retriever(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A retriever with random heads that names the first twelve conversations as its training data."""
    folder = tmp_path_factory.mktemp("retriever")
    backbone = Backbone.load(ModelSettings(name=str(assets.store.parent / "base")), vision=False)
    widths = FeatureExtractor(backbone)
    files = {}
    for fold in (FINAL, *range(FOLDS)):
        torch.manual_seed(fold + 5)
        head = TwoTowerHead(widths.query_width, widths.item_width, dim=8, hidden=6)
        files[fold] = folder / f"{fold}.safetensors"
        save_head(head, files[fold], {})
    save_bundle(folder / "bundle", backbone, vision=assets.store / "vision_adapter")
    hashes = submission_hashes(assets.conversations[:12])
    save_retriever(folder / "bundle", files, hashes, dim=8, hidden=6, max_length=200)
    return folder
