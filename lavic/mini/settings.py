"""Settings of `lavic mini pretrain`."""

from __future__ import annotations

from pathlib import Path

from lavic.config import settings
from lavic.mini.architecture import Architecture
from lavic.mini.pretrain import PretrainSettings


@settings
class MiniPretrainSettings:
    """Train a miniature LLaVA-NeXT from scratch: first to read (look-up in lists), then to see (photos described)."""

    shards: Path
    """Set of photos to learn from, those with a description."""
    valid: Path
    """Set of held-out photos: never learnt from, also where `shards` holds them."""
    train: Path
    """Conversations with candidates, as `lavic tune` takes them."""
    candidates: str = "candidates_st"
    """Key of the candidate list."""
    looks: Path
    """What training items look like in a few words, lines of `{"id", "look"}`: for lists that words alone answer."""
    out: Path
    """Folder of the model."""
    start: str | None = None
    """A miniature whose language model is taken over, and its vision side where that has the same sizes, as LLaVA began
    with Mistral's and CLIP's; `mini` is the packaged one."""
    architecture: Architecture = Architecture()
    pretrain: PretrainSettings = PretrainSettings()
    minimum: int = 1
    """Words seen less often are unknown to the tokenizer."""
    threads: int = 2
    """CPU threads."""
