"""Settings of `lavic mini realshape`."""

from __future__ import annotations

from pathlib import Path

from pydantic import PositiveInt

from lavic.config import Seed, settings


@settings
class RealShapeSettings:
    """Make a model folder that is LLaVA-v1.6-Mistral-7B in all but depth and weights, which are random: real
    vocabulary, photo processor, special tokens and file layout. For tests of memory, files and speed."""

    out: Path
    """Folder of the model; it must not be there yet."""
    layers: PositiveInt = 2
    """Layers of the language model; the real one has 32, which with 24 vision layers is 15 GB."""
    vision_layers: PositiveInt = 3
    """Layers of the vision tower; the real one has 24."""
    narrow: bool = False
    """Small widths (d_text 128, d_vision 64) instead of the real ones."""
    tokenizer: Path | None = None
    """Mistral's SentencePiece model, vocabulary/mistral_common/data/tokenizer.model.v1 after `pip install --no-deps
    --target vocabulary mistral-common`. By default that of an installed mistral-common."""
    seed: Seed = 0
    """Seed of the weights."""
