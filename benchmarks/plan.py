"""How much memory a plan of any size takes: peak of the process that makes it, and its seconds.

    python benchmarks/plan.py --photos 5000000 --json plan.json
    python benchmarks/plan.py --photos 50000 200000

Writes a catalogue in the form of Amazon Reviews 2023 into --work (about 1 KB an item, four photos each, one of twenty a
picture that an earlier item shows too), plans it with `--photos all` and removes both. Bar: 5 million photos in 1 GiB.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

BAR_BYTES = 1 << 30
_PER_ITEM = 4
_WORDS = ("soft", "warm", "cotton", "everyday", "pocket", "zip", "collar", "knitted", "waterproof", "slim", "fit")


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, nargs="+", default=[5_000_000], metavar="N")
    parser.add_argument("--photos-per-shard", type=int, default=1000)
    parser.add_argument("--work", type=Path, help="where to put catalogue and plan; by default a temporary folder")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--alone", nargs=2, metavar=("CATALOGUE", "OUT"), help=argparse.SUPPRESS)
    chosen = parser.parse_args(argv)
    if chosen.alone:
        return alone(*chosen.alone, chosen.photos_per_shard)
    rows = []
    print(f"{'photos':>12}{'catalogue MB':>14}{'plan MB':>10}{'seconds':>9}{'photos/s':>10}{'peak MiB':>10}")
    for photos in chosen.photos:
        room = Path(tempfile.mkdtemp(prefix="lavic-plan-", dir=chosen.work))
        try:
            row = measure(photos, room, chosen.photos_per_shard)
        finally:
            shutil.rmtree(room)
        rows.append(row)
        sizes = f"{row['catalogue_bytes'] / 1e6:>14,.0f}{row['plan_bytes'] / 1e6:>10,.0f}"
        rate = row["photos"] / row["seconds"]
        print(f"{row['photos']:>12,}{sizes}{row['seconds']:>9,.1f}{rate:>10,.0f}{row['peak_bytes'] / 2**20:>10,.0f}")
    largest = max(rows, key=lambda row: row["photos"])
    passed = largest["peak_bytes"] <= BAR_BYTES
    print(f"peak at {largest['photos']:,} photos: {'within' if passed else 'over'} the bar of {BAR_BYTES >> 20:,} MiB")
    if chosen.json:
        chosen.json.write_text(json.dumps({"rows": rows, "bar_bytes": BAR_BYTES, "passed": passed}, indent=1) + "\n")
    return 0 if passed else 1


def measure(photos: int, room: Path, per_shard: int) -> dict[str, float]:
    """Plan a catalogue of so many photos in a process of its own."""
    catalogue, out = room / "meta.jsonl", room / "out"
    write_catalogue(catalogue, photos)
    words = [sys.executable, __file__, "--photos-per-shard", str(per_shard), "--alone", str(catalogue), str(out)]
    made = json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE).stdout)
    plan_bytes = sum(path.stat().st_size for path in (out / "plan").iterdir())
    return {**made, "catalogue_bytes": catalogue.stat().st_size, "plan_bytes": plan_bytes}


def alone(catalogue: str, out: str, per_shard: int) -> int:
    """Make the plan and say what it took, as one line of JSON."""
    from lavic.shards.plan.crawl_plan import make_plan
    from lavic.shards.plan.photo_tasks import PlanSettings

    settings = PlanSettings(
        set="bench", split="train", photos_per_shard=per_shard, photos="all", image_size="large", photo={}
    )
    began = time.perf_counter()
    plan = make_plan((catalogue,), Path(out), settings)
    made = {
        "photos": plan.counts.photos,
        "shards": len(plan.digests),
        "shared": plan.counts.shared,
        "seconds": time.perf_counter() - began,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    print(json.dumps(made))
    return 0


def write_catalogue(path: Path, photos: int) -> None:
    """Items like Amazon's: a title, a few features, details, links in three sizes."""
    with path.open("w", encoding="utf-8") as file:
        for item in range(-(-photos // _PER_ITEM)):
            images = []
            for n in range(min(_PER_ITEM, photos - item * _PER_ITEM)):
                number = item * _PER_ITEM + n
                # Each twentieth shows what one of the photos before it shows, in another size.
                name = f"7{number if number % 20 else number // 3:010d}L"
                link = f"https://m.media-amazon.com/images/I/{name}._AC_"
                images.append({"thumb": f"{link}US40_.jpg", "large": f"{link}.jpg", "hi_res": f"{link}SL1500_.jpg"})
            words = [_WORDS[(item * 7 + n * n) % len(_WORDS)] for n in range(40)]
            row = {
                "parent_asin": f"B{item:09d}",
                "title": " ".join(words[:12]),
                "categories": ["Clothing", words[0], words[1]],
                "features": [" ".join(words[at : at + 9]) for at in range(0, 36, 9)],
                "description": [" ".join(words)],
                "details": json.dumps({"Department": "all", "Item model number": str(item), "Material": words[2]}),
                "images": images,
            }
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
