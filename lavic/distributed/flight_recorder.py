"""PyTorch's flight recorder: the last collectives of each rank, for `torchfrtrace`."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def enable_flight_recorder(folder: Path) -> None:
    """Turns the flight recorder on for process groups that are made from here on.

    NCCL's watchdog writes the records to `folder`, one file for each rank, when a collective times out; `torchfrtrace
    FOLDER -p rank_` compares them. Variables that are set already are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"):  # the second before torch 2.9
        os.environ.setdefault(name, "2000")
    for name in ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"):
        os.environ.setdefault(name, str(folder.absolute() / "rank_"))
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")


def dump_flight_recorder(folder: Path, rank: int) -> None:
    """Writes this rank's record into `folder`; does nothing where torch has none."""
    import torch
    import torch.distributed as dist

    name = "_dump_nccl_trace" if dist.get_backend() == "nccl" else "_dump_fr_trace"
    dump = getattr(torch._C._distributed_c10d, name, None)
    if dump is not None:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"rank_{rank}").write_bytes(dump())
