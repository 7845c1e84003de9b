"""A fake of SLURM's programs: it keeps jobs and calls in JSON files beside it.

Tests start it hundreds of times, so it imports few modules.
"""

# pathlib takes long to import
# ruff: noqa: PTH105, PTH119, PTH120, PTH123

from __future__ import annotations

import json
import os
import sys
import time

FOLDER = os.path.dirname(__file__)
STATE = f"{FOLDER}/slurm.json"
EMPTY = {"jobs": [], "refuse": "", "mute": False, "sbatch": "", "sacct": "disabled", "user": ""}
"""`sbatch` and `sacct`: how these programs fail. `late` queues the job and gives no answer, `lost` queues nothing and
gives none, `hang` queues it and never ends, `greet` prints more than the id. `user`: the only user whose jobs are
shown, if any."""


def write(state: dict) -> None:
    """Writes atomically: a test may read at any time."""
    temporary = f"{STATE}.{os.getpid()}"
    with open(temporary, "w") as file:
        json.dump(state, file)
    os.replace(temporary, STATE)


def read() -> dict:
    try:
        with open(STATE) as file:
            return EMPTY | json.load(file)
    except FileNotFoundError:
        return dict(EMPTY)


def main(name: str, args: list[str]) -> int:
    state = read()
    if name == "sbatch":
        return sbatch(state, args)
    # a separate file: a test may be changing the state
    with open(f"{FOLDER}/calls.jsonl", "a") as calls:
        calls.write(json.dumps([name, *args]) + "\n")
    if name == "squeue":
        return squeue(state, args)
    if name == "scancel":
        for arg in args:
            number, _, task = arg.partition("_")
            job = state["jobs"][int(number) - 1]
            (job.setdefault("tasks", {}).setdefault(task, {}) if task else job).update(state="CANCELLED", reason="None")
        write(state)
        return 0
    if name == "scontrol":
        job = state["jobs"][int(args[-1]) - 1]
        print(f"JobId={args[-1]} JobName=x ExitCode={job.get('exit', '0:0')} Restarts=0")
        return 0
    return sacct(state, args)


def sbatch(state: dict, args: list[str]) -> int:
    if state["refuse"] and any(state["refuse"] in arg for arg in args):
        print("sbatch: error: invalid partition specified: nix", file=sys.stderr)
        return 1
    if "--test-only" in args:
        return 0
    failure = state["sbatch"]
    if failure != "lost":
        env = {key: value for key, value in os.environ.items() if key.startswith(("LAVIC_", "RANKS_", "SLURM_"))}
        state["jobs"].append({"args": args, "env": env, "state": "PENDING", "reason": "Dependency"})
        write(state)
    if failure == "hang":
        time.sleep(600)
    if failure == "greet":
        print("-" * 40 + "\n   Welcome to the cluster 2000\n" + "-" * 40)
    elif failure:
        print("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation", file=sys.stderr)
        return 1
    print(f"{len(state['jobs'])};cluster")
    return 0


def squeue(state: dict, args: list[str]) -> int:
    if state["mute"]:
        print("slurm_load_jobs error: Unable to contact slurm controller", file=sys.stderr)
        return 1
    form = next(arg.partition("=")[2] for arg in args if arg.startswith("--format="))
    if state["user"] and f"--user={state['user']}" not in args:
        return 0
    for number, job in enumerate(state["jobs"], 1):
        if job["state"] == "forgotten":
            continue
        comment = [arg.partition("=")[2] for arg in job["args"] if arg.startswith("--comment=")]
        values = {"i": number, "T": job["state"], "r": job["reason"], "k": (comment or ["(null)"])[-1]}
        values |= {"M": job.get("elapsed", "0:00"), "l": "1:00:00", "S": job.get("start", "N/A")}
        array = next((arg.partition("=")[2] for arg in job["args"] if arg.startswith("--array=")), "")
        ids = [f"{number}_{task}" for task in array.partition("%")[0].split(",")] if array else [number]
        for id in ids if "--array" in args else [f"{number}_[{array}]" if array else number]:
            task = job.get("tasks", {}).get(str(id).partition("_")[2], {})
            shown = {**values, "i": id, "T": task.get("state", values["T"]), "r": task.get("reason", values["r"])}
            print("|".join(str(shown[field[1]]) for field in form.split("|")))
    return 0


def sacct(state: dict, args: list[str]) -> int:
    if state["sacct"] == "disabled":
        print("Slurm accounting storage is disabled", file=sys.stderr)
        return 1
    if state["sacct"] == "down":
        print("sacct: error: Problem talking to the database: Connection refused", file=sys.stderr)
        return 1
    job_ids = next((arg.partition("=")[2].split(",") for arg in args if arg.startswith("--jobs=")), [])
    for number in job_ids:
        if accounted := state["jobs"][int(number) - 1].get("accounted"):
            print(f"{number}|{accounted}|00:10:00|01:00:00|2026-01-01T00:00:00|2:0|None")
    return 0


if __name__ == "__main__":
    sys.exit(main(os.path.basename(sys.argv[0]), sys.argv[1:]))
