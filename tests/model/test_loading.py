"""The base model, whole and in parts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lavic.errors import ConfigError
from lavic.model.config import ModelSettings
from lavic.model.loading import Backbone


def without(base: Path, folder: Path, part: str) -> ModelSettings:
    """A copy of a base model whose file lacks a part."""
    shutil.copytree(base, folder)
    file = folder / "model.safetensors"
    state = load_file(file)
    kept = {name: tensor for name, tensor in state.items() if part not in name}
    assert 0 < len(kept) < len(state)
    save_file(kept, file, metadata={"format": "pt"})
    return ModelSettings(name=str(folder))


@pytest.mark.parametrize("part", ["vision_tower", "language_model"])
def test_a_part_that_is_not_wanted_is_not_even_read(base: Path, tmp_path: Path, part: str) -> None:
    """From a file that does not hold it: stage 2 has no vision tower, `embed` no language model."""
    poor = without(base, tmp_path / "poor", part)
    expected = Backbone.load(ModelSettings(name=str(base))).model.state_dict()
    some = Backbone.load(poor, **{part.partition("_")[0]: False}).model
    assert not hasattr(some.model, part)
    assert type(some).__name__ == "LlavaNextForConditionalGeneration"
    state = some.state_dict()
    # the head goes with the language model
    assert set(expected) - set(state) == {
        name for name in expected if part in name or (part[0] == "l" and "lm_head" in name)
    }
    for name, tensor in state.items():
        assert torch.equal(tensor, expected[name]), name
    with pytest.raises(ConfigError, match=r"weights are missing \(first: "):
        Backbone.load(poor)
