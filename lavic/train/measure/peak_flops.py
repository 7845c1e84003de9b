"""Peak FLOPs per second of a device: utilisation is a share of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PEAK_FLOPS = {
    "A10": 125e12,
    "A100": 312e12,
    "A10G": 70e12,
    "A40": 149.7e12,
    "A800": 312e12,
    "B200": 2250e12,
    "GB200": 2500e12,
    "H100": 989.4e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H20": 148e12,
    "H200": 989.4e12,
    "H800": 989.4e12,
    "L4": 121e12,
    "L40": 181e12,
    "L40S": 362e12,
    "RTX 3090": 71e12,
    "RTX 4090": 165e12,
    "RTX A6000": 154.8e12,
}
"""Floating point operations per second of dense bfloat16 matrix multiplication, from the vendors' data sheets."""


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak operations per second of a device; None for a CPU.

    From the table for bfloat16; else measured with large matrix multiplications.
    """
    if device.type != "cuda":
        return None
    import torch

    known = listed_peak(torch.cuda.get_device_name(device)) if dtype == torch.bfloat16 else None
    return known or measured_peak(device, dtype)


def listed_peak(name: str) -> float | None:
    """The entry of `PEAK_FLOPS` for a device's name: the longest that it contains as words.

    None without one, and for a slice of a GPU ("NVIDIA A100-SXM4-40GB MIG 1g.5gb"), which has a share of its peak.
    """
    if re.search(r"\bMIG\b", name):
        return None
    names = [key for key in PEAK_FLOPS if re.search(rf"\b{key}\b", name)]
    return PEAK_FLOPS[max(names, key=len)] if names else None


def measured_peak(device: torch.device, dtype: torch.dtype, *, side: int = 8192, times: int = 10) -> float:
    """Operations per second of multiplying square matrices, the best of `times`."""
    import torch

    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    spans: list[Sequence[torch.cuda.Event]] = []
    for _ in range(times + 1):
        span = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        span[0].record()
        left @ right
        span[1].record()
        spans.append(span)
    torch.cuda.synchronize(device)
    return 2 * side**3 / min(start.elapsed_time(end) / 1000 for start, end in spans[1:])
