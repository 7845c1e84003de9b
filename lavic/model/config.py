"""Settings of the base model and its adapters, in a module without torch, so that `--help` is fast."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from lavic.config import settings

Kind = Literal["vision", "language"]
"""What an adapter targets: vision tower and projector (stage 1), or the language model (stage 2)."""


@settings
class ModelSettings:
    """The base model."""

    name: str = "llava-hf/llava-v1.6-mistral-7b-hf"
    """A Hugging Face name, a folder, or `mini` for the miniature in this package."""
    revision: str | None = None
    """Commit or branch of the Hugging Face repository."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the frozen weights. `auto`: bfloat16 on a GPU, float32 on a CPU."""
    views: Literal["five", "lavic"] = "five"
    """Views of a photo. `five`: the photo and its four quarters, whatever its shape; `lavic`: as in the released code,
    the grid that the model's processor chooses: slim photos get three or four views."""
    prompt: Literal["inst", "lavic"] = "inst"
    """Prompt format. `inst`: that of the base model's training, with its chat template and the photo before the text;
    `lavic`: that of the released code, plain text that ends in `Assistant:`."""
    chat_template: Path | None = None
    """A chat template (Jinja) instead of the base model's own, for a base model without one."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention kernel."""


@settings
class BaseModelSettings:
    """The base model of a bundle."""

    name: str | None = None
    """A folder or a Hugging Face name, if the base model was moved or renamed after training. Its fingerprint must be
    that in the bundle. Default: the name in the bundle."""


@settings
class LoraSettings:
    """Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685); the defaults are those of the LaViC code."""

    r: PositiveInt = 8
    """Rank."""
    alpha: PositiveInt = 32
    """The update is scaled by alpha / r."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Dropout on the adapter's input, in training."""
