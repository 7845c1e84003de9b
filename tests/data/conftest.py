"""Small drawn photos and sets of them."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from lavic.data.manifest import Manifest
from lavic.data.tar_shards import Sample
from tests.crawled_sets import write_set


def jpeg(number: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8 + number % 5, 6), (number * 7 % 256, 80, 160)).save(out, "JPEG")
    return out.getvalue()


def sample(number: int, text: str | None = None) -> Sample:
    return Sample.of(
        item_id=f"B{number:09d}",
        n=0,
        jpg=jpeg(number),
        title=f"Tässe {number}",
        width=8 + number % 5,
        height=6,
        text=f"text {number}" if text is None else text,
    )


@pytest.fixture
def make_sample() -> Callable[..., Sample]:
    return sample


@pytest.fixture
def small_set(tmp_path: Path) -> Manifest:
    """25 samples in shards of 10, 10 and 5."""
    return write_set(tmp_path / "set", map(sample, range(25)), set="cups", split="train", photos_per_shard=10)
