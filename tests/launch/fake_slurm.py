"""Stands in for SLURM's programs: keeps its jobs in a JSON file beside it, and every word it was given."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

HOME = Path(__file__).parent
BOOK = HOME / "book.json"
EMPTY = {"jobs": [], "refuse": "", "mute": False, "sbatch": "", "sacct": "disabled", "user": ""}
"""`sbatch` and `sacct` say how these programs fail: `late` queues the job and gives no answer, `lost` queues nothing
and gives none, `hang` queues it and never ends; `user` is the only one whose jobs are shown, if any."""


def write(book: dict) -> None:
    """Whole, since a test may read it at any time."""
    aside = BOOK.with_suffix(f".{os.getpid()}")
    aside.write_text(json.dumps(book))
    aside.replace(BOOK)


def main(name: str, words: list[str]) -> int:
    book = EMPTY | (json.loads(BOOK.read_text()) if BOOK.exists() else {})
    if name == "sbatch":
        return sbatch(book, words)
    with (HOME / "asked.jsonl").open("a") as asked:  # not into the book, which a test may be changing
        asked.write(json.dumps([name, *words]) + "\n")
    if name == "squeue":
        return squeue(book, words)
    if name == "scancel":
        for word in words:
            book["jobs"][int(word) - 1] |= {"state": "CANCELLED", "reason": "None"}
        write(book)
        return 0
    if name == "scontrol":
        job = book["jobs"][int(words[-1]) - 1]
        print(f"JobId={words[-1]} JobName=x ExitCode={job.get('exit', '0:0')} Restarts=0")
        return 0
    return sacct(book, words)


def sbatch(book: dict, words: list[str]) -> int:
    if book["refuse"] and any(book["refuse"] in word for word in words):
        print("sbatch: error: invalid partition specified: nix", file=sys.stderr)
        return 1
    if "--test-only" in words:
        return 0
    how = book["sbatch"]
    if how != "lost":
        env = {key: value for key, value in os.environ.items() if key.startswith(("LAVIC_", "RANKS_"))}
        book["jobs"].append({"words": words, "env": env, "state": "PENDING", "reason": "Dependency"})
        write(book)
    if how == "hang":
        time.sleep(600)
    if how:
        print("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation", file=sys.stderr)
        return 1
    print(f"{len(book['jobs'])};cluster")
    return 0


def squeue(book: dict, words: list[str]) -> int:
    if book["mute"]:
        print("slurm_load_jobs error: Unable to contact slurm controller", file=sys.stderr)
        return 1
    form = next(word.partition("=")[2] for word in words if word.startswith("--format="))
    if book["user"] and f"--user={book['user']}" not in words:
        return 0
    for number, job in enumerate(book["jobs"], 1):
        if job["state"] == "forgotten":
            continue
        comment = [word.partition("=")[2] for word in job["words"] if word.startswith("--comment=")]
        values = {"i": number, "T": job["state"], "r": job["reason"], "k": (comment or ["(null)"])[-1]}
        values |= {"M": job.get("elapsed", "0:00"), "l": "1:00:00", "S": job.get("start", "N/A")}
        print("|".join(str(values[field[1]]) for field in form.split("|")))
    return 0


def sacct(book: dict, words: list[str]) -> int:
    if book["sacct"] == "disabled":
        print("Slurm accounting storage is disabled", file=sys.stderr)
        return 1
    if book["sacct"] == "down":
        print("sacct: error: Problem talking to the database: Connection refused", file=sys.stderr)
        return 1
    wanted = next((word.partition("=")[2].split(",") for word in words if word.startswith("--jobs=")), [])
    for number in wanted:
        if state := book["jobs"][int(number) - 1].get("accounted"):
            print(f"{number}|{state}|00:10:00|01:00:00|2026-01-01T00:00:00|2:0|None")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[0]).name, sys.argv[1:]))
