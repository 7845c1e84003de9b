"""A small all-reduce between ranks, as a program of its own that can be given up on: one JSON line on stdout.

`lavic preflight` starts one for each GPU of each node, with torchrun's variables.
"""

from __future__ import annotations

import json
import sys
import time

from lavic.distributed.context import DistributedContext
from lavic.distributed.failure import exit_process

_GPU_BYTES, _CPU_BYTES = 64 << 20, 1 << 20


def main(within_s: float) -> int:
    """Reduces a tensor over all ranks a few times and compares the sum with what it must be.

    Prints whether it was right, and how many bytes of the tensor went through per second.
    """
    import torch

    world = DistributedContext.from_env()
    world.init_process_group(timeout_s=within_s)
    device = world.device()
    numbers = torch.ones((_GPU_BYTES if device.type == "cuda" else _CPU_BYTES) // 4, device=device)
    expected = float(world.size)
    right = bool((world.all_reduce(numbers) == expected).all())  # the first one sets connections up
    began = time.perf_counter()
    rounds = 5
    for _ in range(rounds):
        right = right and float(world.all_reduce(numbers)[-1]) == expected
    rate = rounds * numbers.numel() * 4 / (time.perf_counter() - began)
    print(json.dumps({"rank": world.rank, "right": right, "bytes_per_s": rate}), flush=True)
    world.destroy_process_group()
    return 0 if right else 1


if __name__ == "__main__":
    exit_process(main(float(sys.argv[1])))
