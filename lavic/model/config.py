"""Settings of the base model and its adapters; apart from what loads them, so that `--help` needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from lavic.config import settings

Kind = Literal["vision", "language"]
"""What an adapter is put on: vision tower and projector (stage 1), or the language model (stage 2)."""


@settings
class ModelSettings:
    """Which base model, and how it is held."""

    name: str = "llava-hf/llava-v1.6-mistral-7b-hf"
    """A Hugging Face name, a folder, or `mini` for the miniature that is part of this package."""
    revision: str | None = None
    """Commit or branch of the Hugging Face repository."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the frozen weights. `auto`: bfloat16 on a GPU, float32 on a CPU."""
    views: Literal["five", "lavic"] = "five"
    """How a photo is cut. `five`: the photo and its four quarters, whatever its shape; `lavic`: as the released
    code does, by the model's own choice of grids: slim photos get three or four views."""
    prompt: Literal["inst", "lavic"] = "inst"
    """How the model is asked. `inst`: as the base model was trained, in the tags of its chat template and with the
    photo before the words; `lavic`: in the released code's order, plain text that ends in `Assistant:`."""
    chat_template: Path | None = None
    """A chat template (Jinja) in the place of the base model's own, for a base model that has none."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention kernel."""


@settings
class BaseModelSettings:
    """Where the base model of a bundle is found."""

    name: str | None = None
    """A folder, or a Hugging Face name, where the base model has been moved or renamed since training. Its fingerprint
    must be the one that the bundle records. By default the recorded name."""


@settings
class LoraSettings:
    """Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685); the defaults are those of the LaViC code."""

    r: PositiveInt = 8
    """Rank."""
    alpha: PositiveInt = 32
    """The update is scaled by alpha / r."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """On the adapter's input, while training."""
