"""Stands in for sbatch, squeue and sacct: keeps its jobs in a JSON file beside it, and every word it was given."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

HOME = Path(__file__).parent
BOOK = HOME / "book.json"


def main(name: str, words: list[str]) -> int:
    book = json.loads(BOOK.read_text()) if BOOK.exists() else {"jobs": [], "refuse": "", "mute": False}
    if name == "sbatch":
        if book["refuse"] and any(book["refuse"] in word for word in words):
            print("sbatch: error: invalid partition specified: nix", file=sys.stderr)
            return 1
        if "--test-only" in words:
            return 0
        env = {key: value for key, value in os.environ.items() if key.startswith(("LAVIC_", "RANKS_"))}
        book["jobs"].append({"words": words, "env": env, "state": "PENDING", "reason": "Dependency"})
        BOOK.write_text(json.dumps(book))
        print(f"{len(book['jobs'])};cluster")
        return 0
    if name == "squeue":
        if book["mute"]:
            print("slurm_load_jobs error: Unable to contact slurm controller", file=sys.stderr)
            return 1
        for number, job in enumerate(book["jobs"], 1):
            if job["state"] != "forgotten":
                print(f"{number}|{job['state']}|{job['reason']}")
        return 0
    print("Slurm accounting storage is disabled", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[0]).name, sys.argv[1:]))
