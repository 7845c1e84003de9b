"""Finds photos that look alike: the same picture in another size, quality or format.

Each photo has a perceptual hash of 64 bits (pHash: the signs of the lowest frequencies of its cosine transform around
their median, see https://www.hackerfactor.com/blog/index.php?/archives/432-Looks-Like-It.html) and its mean colour, so
that one product in two colours is not mistaken for one picture. Hashes that differ in at most four bits are found by
sorting (Manku, Jain, Das Sarma: Detecting Near-Duplicates for Web Crawling, WWW 2007).

Hashes are stored beside each shard, so that only new shards of a set are read. It takes about 50 bytes of memory per
photo.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import combinations
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from lavic.data.manifest import Manifest, ShardEntry
from lavic.data.tar_shards import read_samples, sidecar_path
from lavic.storage.atomic import atomic_open
from lavic.storage.paths import storage_errors

NAME = "near_duplicates.jsonl"
_ENDING = "hashes.npy"
_ROW = np.dtype([("key", "S90"), ("hash", "<u8"), ("colour", "u1", 3)])
_SIDE, _LOW = 32, 8
"""Side of the picture that is transformed, and of the lowest frequencies that are used."""
_FLAT = 2.0
"""Photos with a smaller standard deviation of their greys are not compared."""
_MAX_BITS, _MAX_COLOUR = 4, 16
"""Near duplicates differ in at most this many bits, and levels of red, green and blue."""
_PARTS = (10, 9, 9, 9, 9, 9, 9)
"""Bits of the parts of a hash. If at most four bits differ, three of the seven parts are equal."""
_EQUAL = 3
_MAX_COMPARED = 200
"""Maximum number of hashes with three equal parts that a hash is compared with."""
_ANGLES = np.outer(np.arange(_LOW), np.arange(_SIDE) + 0.5) * (np.pi / _SIDE)
_TRANSFORM = np.cos(_ANGLES).astype(np.float32)
_ONES = np.array([value.bit_count() for value in range(256)], np.uint8)


def report_near_duplicates(manifest: Manifest) -> str:
    """Write which photos of a whole set look like an earlier one, into `NAME` beside the manifest.

    A row holds the photo's `key` and `shard`, those of the first photo that looks like it (`near`, `near_shard`), and
    the `distance` of their hashes in bits. Returns a summary in one line.

    Raises:
        DataError: A shard is damaged.
        OSError: The folder cannot be written to.
    """

    def read(shard: ShardEntry) -> tuple[np.ndarray, np.ndarray]:
        table = _hashes(manifest.path(shard), shard)
        return table["hash"].copy(), table["colour"].copy()

    with ThreadPoolExecutor(os.cpu_count() or 1, "hashes") as pool:
        tables = list(pool.map(read, manifest.shards))
    hashes, colours = (np.concatenate(column) for column in zip(*tables, strict=True))
    followers, leaders, distances = find_near(hashes, colours)
    with atomic_open(manifest.folder / NAME) as file:
        for line in _lines(manifest, [len(table) for table, _ in tables], followers, leaders, distances):
            file.write(line)
    return f"{len(followers):,} of {len(hashes):,} photos look like an earlier one, see {NAME}"


def perceptual_hash(jpg: bytes) -> tuple[int, tuple[int, int, int]]:
    """The hash of a JPEG as shards store it, 0 if it is too uniform, and its mean colour."""
    try:
        # At the smallest sufficient size, which saves most of the decoding.
        pixels = simplejpeg.decode_jpeg(jpg, "RGB", min_height=2 * _SIDE, min_width=2 * _SIDE, min_factor=1)
        image = Image.fromarray(pixels)
    except ValueError:
        image = Image.open(io.BytesIO(jpg)).convert("RGB")
    thumbnail = image.resize((_SIDE, _SIDE), Image.Resampling.BOX)
    red, green, blue = (round(value) for value in np.asarray(thumbnail).reshape(-1, 3).mean(0))
    grey = np.asarray(thumbnail.convert("L"), np.float32)
    if grey.std() < _FLAT:
        return 0, (red, green, blue)
    frequencies = (_TRANSFORM @ grey @ _TRANSFORM.T).ravel()
    bits = frequencies > np.median(frequencies)
    return int.from_bytes(np.packbits(bits).tobytes(), "big"), (red, green, blue)


def find_near(hashes: np.ndarray, colours: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Photos that look like an earlier one, which itself looks like none before it.

    Args:
        hashes: uint64 [n], in the set's order; those of 0 are left out.
        colours: uint8 [n, 3].

    Returns:
        Numbers of such photos, ascending; for each that of the earlier one; and the bits in which they differ.
    """
    numbers = np.flatnonzero(hashes)
    # Equal ones side by side, the earliest first, which stands for the others.
    order = numbers[np.lexsort((numbers, *colours[numbers].T, hashes[numbers]))]
    repeated = np.zeros(len(order), bool)
    repeated[1:] = (hashes[order[1:]] == hashes[order[:-1]]) & (colours[order[1:]] == colours[order[:-1]]).all(1)
    first_equal = order[np.maximum.accumulate(np.where(repeated, 0, np.arange(len(order))))]
    leader = dict(_near_leaders(order[~repeated], hashes, colours))
    followers, leaders = [], []
    for number, first in zip(order.tolist(), first_equal.tolist(), strict=True):
        if (target := leader.get(first, first)) != number:
            followers.append(number)
            leaders.append(target)
    by_number = np.argsort(np.array(followers, np.int64))
    sorted_followers, sorted_leaders = np.array(followers, np.int64)[by_number], np.array(leaders, np.int64)[by_number]
    return sorted_followers, sorted_leaders, _bits(hashes[sorted_followers] ^ hashes[sorted_leaders])


def _near_leaders(numbers: np.ndarray, hashes: np.ndarray, colours: np.ndarray) -> Iterator[tuple[int, int]]:
    """(photo, the earlier one that it looks like) among photos with different hashes."""
    pair_arrays = list(_near_pairs(numbers, hashes, colours))
    if not pair_arrays:
        return
    pairs = np.unique(np.sort(np.concatenate(pair_arrays), axis=1), axis=0)
    followers: set[int] = set()
    # In the order of the later one, so that the earlier ones are decided.
    for first, second in pairs[np.lexsort((pairs[:, 0], pairs[:, 1]))].tolist():
        if first not in followers and second not in followers:
            followers.add(second)
            yield second, first


def _near_pairs(numbers: np.ndarray, hashes: np.ndarray, colours: np.ndarray) -> Iterator[np.ndarray]:
    """Pairs of photos that look alike, int64 [k, 2] at a time; a pair may come more than once."""
    for mask in _masks():
        keys = hashes[numbers] & mask
        by_key = np.argsort(keys, kind="stable")
        keys, sorted_numbers = keys[by_key], numbers[by_key]
        positions = np.arange(len(keys))
        for distance in range(1, _MAX_COMPARED):
            positions = positions[positions + distance < len(keys)]
            positions = positions[keys[positions] == keys[positions + distance]]
            if not len(positions):
                break
            first, second = sorted_numbers[positions], sorted_numbers[positions + distance]
            is_near = _bits(hashes[first] ^ hashes[second]) <= _MAX_BITS
            is_near &= (np.abs(colours[first].astype(np.int16) - colours[second]) <= _MAX_COLOUR).all(1)
            if is_near.any():
                yield np.stack([first[is_near], second[is_near]], axis=1)


def _masks() -> Iterator[np.uint64]:
    """Bit masks of every three of the seven parts of a hash."""
    ends = np.cumsum(_PARTS)
    parts = [((1 << bits) - 1) << int(end - bits) for bits, end in zip(_PARTS, ends, strict=True)]
    for chosen in combinations(parts, _EQUAL):
        yield np.uint64(sum(chosen))


def _bits(values: np.ndarray) -> np.ndarray:
    return _ONES[values.reshape(-1, 1).view(np.uint8)].sum(1)


def _hashes(shard: Path, entry: ShardEntry) -> np.ndarray:
    """Hashes of a shard's photos, in its order; read from the file beside it if that belongs to these bytes."""
    path = sidecar_path(shard, _ENDING)
    try:
        with path.open("rb") as file:
            if file.read(64) == entry.sha256.encode():
                return np.load(file, allow_pickle=False)
    except storage_errors(ValueError, EOFError):
        pass
    rows = [(sample.key.encode(), *perceptual_hash(sample.jpg)) for sample in read_samples(shard)]
    table = np.array(rows, _ROW)
    with atomic_open(path) as part:
        part.write(entry.sha256.encode())
        np.save(part, table, allow_pickle=False)
    return table


def _lines(
    manifest: Manifest, counts: Sequence[int], followers: np.ndarray, leaders: np.ndarray, distances: np.ndarray
) -> Iterator[bytes]:
    """Rows of the report, in the set's order; keys are read from the file of hashes when they are needed."""
    ends = np.cumsum(counts)

    @lru_cache(maxsize=64)
    def keys(number: int) -> np.ndarray:
        shard = manifest.shards[number]
        return _hashes(manifest.path(shard), shard)["key"]

    def name(photo: int) -> tuple[str, str]:
        number = int(np.searchsorted(ends, photo, side="right"))
        return keys(number)[photo - ends[number]].decode(), manifest.shards[number].name

    for follower, leader, distance in zip(followers.tolist(), leaders.tolist(), distances.tolist(), strict=True):
        (key, shard), (near_key, near_shard) = name(follower), name(leader)
        row = {"key": key, "shard": shard, "near": near_key, "near_shard": near_shard, "distance": distance}
        yield json.dumps(row).encode() + b"\n"
