"""A small set of photos for the tests of `lavic describe --endpoint`."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

from lavic.data.descriptions import descriptions_path
from lavic.data.manifest import Manifest
from lavic.data.tar_shards import Sample
from tests.crawled_sets import write_set
from tests.endpoint.openai_server import photos


def colour_of(number: int) -> tuple[int, int, int]:
    """Of photo `number`: no two are alike."""
    return 16 * (number % 16), 16 * (number // 16), 128


def make_photos(folder: Path, count: int, photos_per_shard: int) -> Manifest:
    """One-coloured photos."""
    samples = []
    for n in range(count):
        file = io.BytesIO()
        Image.new("RGB", (16, 16), colour_of(n)).save(file, "JPEG", quality=95)
        title = f"Acme <b>Mug</b> {n}"
        samples.append(Sample.of(item_id=f"B{n:09d}", n=0, jpg=file.getvalue(), title=title, width=16, height=16))
    return write_set(folder, samples, photos_per_shard=photos_per_shard)


def colour_in(body: dict[str, Any]) -> str:
    """The colour of the photo in a request, so that a text shows which photo the server saw."""
    (url,) = photos(body)
    image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")
    red, green, _ = (round(value / 16) for value in image.getpixel((8, 8)))
    return f"{red}-{green}"


def sidecars(manifest: Manifest) -> list[list[dict[str, str]]]:
    """The rows beside each shard; an empty list where there is no sidecar."""
    paths = [descriptions_path(manifest.path(shard)) for shard in manifest.shards]
    return [[json.loads(line) for line in path.open()] if path.exists() else [] for path in paths]
