"""Near duplicates: found in another size or quality, other products are not."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from lavic.data.manifest import Manifest
from lavic.data.tar_shards import Sample
from lavic.data.tar_writer import ShardWriter
from lavic.shards.image import near_duplicates
from lavic.shards.image.near_duplicates import NAME, find_near, perceptual_hash, report_near_duplicates
from tests.shards.fault_server import encoded


def product_image(seed: int) -> Image.Image:
    """Random colours on white, like a product photo."""
    values = np.random.default_rng(seed).integers(0, 255, (9, 8, 3)).astype(np.uint8)
    image = Image.new("RGB", (400, 300), "white")
    image.paste(Image.fromarray(values).resize((300, 260), Image.Resampling.BICUBIC), (50, 20))
    return image


def test_resizing_and_compression_change_few_hash_bits() -> None:
    hashes = [perceptual_hash(encoded(product_image(seed), quality=95)) for seed in range(20)]
    changed_bits = []
    for seed, (hash, colour) in enumerate(hashes):
        for size in ((160, 120), (900, 700)):
            changed, changed_colour = perceptual_hash(encoded(product_image(seed).resize(size), quality=60))
            changed_bits.append((hash ^ changed).bit_count())
            assert max(abs(a - b) for a, b in zip(colour, changed_colour, strict=True)) <= 4
    assert np.mean(np.array(changed_bits) <= 4) > 0.9
    assert min((hash ^ other).bit_count() for (hash, _), (other, _) in pairwise(hashes)) > 8
    assert perceptual_hash(encoded(Image.new("RGB", (64, 48), "red"))) == (0, (254, 0, 0))


def test_find_near_equals_a_search_of_all_pairs() -> None:
    """Each photo is matched with the earliest similar photo that has no match itself."""
    random = np.random.default_rng(3)
    hashes = random.integers(1, 1 << 63, 900, dtype=np.uint64)
    colours = random.integers(0, 256, (900, 3)).astype(np.uint8)
    for n in range(300, 900):
        flips = random.choice(64, random.integers(0, 6), replace=False)
        hashes[n] = hashes[n % 300] ^ np.uint64(sum(1 << int(bit) for bit in flips))
        colours[n] = np.clip(colours[n % 300].astype(int) + random.integers(-18, 18), 0, 255)
    hashes[[5, 17]] = 0
    leaders: dict[int, tuple[int, int]] = {}
    for n in np.flatnonzero(hashes).tolist():
        earlier = np.array([m for m in range(n) if hashes[m] and m not in leaders], int)
        bits = np.array([int(value).bit_count() for value in hashes[earlier] ^ hashes[n]])
        alike = (bits <= 4) & (np.abs(colours[earlier].astype(int) - colours[n]) <= 16).all(1)
        if alike.any():
            leaders[n] = (int(earlier[alike][0]), int(bits[alike][0]))
    followers, firsts, bits = find_near(hashes, colours)
    assert followers.tolist() == list(leaders) and len(leaders) > 200
    assert list(zip(firsts.tolist(), bits.tolist(), strict=True)) == list(leaders.values())
    assert all(len(part) == 0 for part in find_near(hashes[:0], colours[:0]))


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """Two shards: two images and one in other colours; then the first image resized, the first again, a plain one."""
    recoloured = Image.merge("RGB", product_image(1).split()[::-1])
    brighter = ImageEnhance.Color(recoloured).enhance(0.2)
    shards = []
    for name, images in (
        ("s-000000.tar", [product_image(1), product_image(2), brighter]),
        ("s-000001.tar", [product_image(1).resize((200, 150)), product_image(1), Image.new("RGB", (64, 64))]),
    ):
        with ShardWriter(tmp_path / name) as writer:
            for n, image in enumerate(images):
                jpg = encoded(image)
                writer.add(Sample.of(item_id=name[7], n=n, jpg=jpg, title="", width=image.width, height=image.height))
        shards.append(writer.entry)
    return Manifest(folder=tmp_path, set="s", split="train", shards=tuple(shards))


def test_the_report_names_photos_and_reads_only_new_shards(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    assert report_near_duplicates(manifest) == f"2 of 6 photos look like an earlier one, see {NAME}"
    text = (manifest.folder / NAME).read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert [(row["key"], row["shard"], row["near"], row["near_shard"]) for row in rows] == [
        ("1_0", "s-000001.tar", "0_0", "s-000000.tar"),
        ("1_1", "s-000001.tar", "0_0", "s-000000.tar"),
    ]
    assert rows[1]["distance"] == 0 and rows[0]["distance"] <= 4
    read = []
    monkeypatch.setattr(near_duplicates, "read_samples", lambda shard: read.append(shard) or iter(()))
    report_near_duplicates(manifest)
    assert not read and (manifest.folder / NAME).read_text() == text
