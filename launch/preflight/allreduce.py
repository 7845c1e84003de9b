"""A small all-reduce between ranks, as a program that can be killed when it hangs: one JSON line on stdout.

`lavic preflight` starts one per GPU of each node, with torchrun's variables.
"""

from __future__ import annotations

import json
import sys
import time

from lavic.distributed.context import DistributedContext
from lavic.distributed.failure import exit_process

_GPU_BYTES, _CPU_BYTES = 64 << 20, 1 << 20


def main(timeout_s: float) -> int:
    """Reduces a tensor over all ranks a few times, prints the bytes per second; returns 1 if a sum is wrong, else 0."""
    import torch

    world = DistributedContext.from_env()
    world.init_process_group(timeout_s=timeout_s)
    device = world.device()
    numbers = torch.ones((_GPU_BYTES if device.type == "cuda" else _CPU_BYTES) // 4, device=device)
    expected = float(world.size)
    ok = bool((world.all_reduce(numbers) == expected).all())  # the first one sets up the connections
    start = time.perf_counter()
    rounds = 5
    for _ in range(rounds):
        ok = ok and float(world.all_reduce(numbers)[-1]) == expected
    rate = rounds * numbers.numel() * 4 / (time.perf_counter() - start)
    print(json.dumps({"rank": world.rank, "ok": ok, "bytes_per_s": rate}), flush=True)
    world.destroy_process_group()
    return 0 if ok else 1


if __name__ == "__main__":
    exit_process(main(float(sys.argv[1])))
