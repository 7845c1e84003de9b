"""A miniature with random weights in an ordinary Hugging Face folder: small, real, made in a second."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lavic.mini import architecture
from lavic.mini.architecture import Architecture
from lavic.mini.tokenizer import make_tokenizer
from lavic.model.config import ModelSettings
from lavic.model.loading import Backbone

WORDS = """Seeker: Comment: I want a red striped shirt. Candidates: Which ID fits? Title: Describe how it
looks. Acme Nova Classic Urban Shirt Mug The photo shows a blue dotted mug. B0MN12: word, word."""


def make_base(folder: Path, seed: int = 0) -> Path:
    """Writes a random miniature."""
    tokenizer = make_tokenizer([WORDS])
    torch.manual_seed(seed)
    small = Architecture(view=24, patch=12, vision_width=16, vision_layers=3, width=32, layers=2, heads=2)
    architecture.save(architecture.build(small, tokenizer), tokenizer, folder)
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def other_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same architecture with other weights."""
    return make_base(tmp_path_factory.mktemp("other_base"), seed=1)


@pytest.fixture
def backbone(base: Path) -> Backbone:
    return Backbone.load(ModelSettings(name=str(base)))
