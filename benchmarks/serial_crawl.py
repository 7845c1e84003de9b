"""The crawl that needs no tool: one request after another, the photo opened and saved by Pillow.

That is how the released LaViC code does it.

serial_crawl.py LINKS OUT: LINKS has one address a line; OUT/<n>.jpg is written.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import requests
from PIL import Image


def main(links: Path, out: Path) -> None:
    """Fetch every photo."""
    out.mkdir(parents=True, exist_ok=True)
    for n, link in enumerate(links.read_text().split()):
        answer = requests.get(link, timeout=10)
        answer.raise_for_status()
        Image.open(io.BytesIO(answer.content)).save(out / f"{n}.jpg")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
