"""Watches one node while a run goes on: CPU, memory, disk, network, GPUs.

    python -m lavic.tracking.system_metrics RUN_DIR NODE SECONDS PARENT

appends to RUN_DIR/system/node-NODE.jsonl until the process that started this one is gone. One such process a node, so
that the metrics of all nodes are there and no rank spends a step on them. The names are those of MLflow's own system
metrics, which shows them apart.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from lavic.errors import LavicError
from lavic.tracking.journal import Journal

FOLDER = "system"
_POLL_S = 0.5
_FIRST_S = 1.0


def watch(run_dir: Path, node: int, seconds: float, parent: int) -> int:
    """Watches until the process that started this one, `parent`, is gone."""
    stay_calm()
    try:
        look = Look(run_dir)
    except ImportError:
        return 0  # without psutil nothing is seen
    with contextlib.suppress(OSError, LavicError):  # a full disk: the run will say so itself
        journal = Journal(run_dir / FOLDER / f"node-{node}.jsonl")
        journal.event("node", host=socket.gethostname(), gpus=look.names)
        due = time.monotonic() + min(_FIRST_S, seconds)
        while os.getppid() == parent:
            if time.monotonic() >= due:
                journal.log(0, **look())
                due = time.monotonic() + seconds
            time.sleep(min(_POLL_S, seconds))
    return 0


class Look:
    """What a node is doing, since the last look."""

    def __init__(self, run_dir: Path) -> None:
        """Finds the GPUs. Raises ImportError without psutil."""
        import psutil

        self._psutil = psutil
        self._place = str(run_dir)
        self._network = psutil.net_io_counters()
        psutil.cpu_percent()  # the first look at the CPU only sets its clock
        self._nvml: Any = None
        self._gpus: list[Any] = []
        self.names: list[str] = []
        try:
            import pynvml

            pynvml.nvmlInit()
            self._nvml = pynvml
            for index in range(pynvml.nvmlDeviceGetCount()):
                self._gpus.append(pynvml.nvmlDeviceGetHandleByIndex(index))
                self.names.append(str(pynvml.nvmlDeviceGetName(self._gpus[-1])))
        except Exception:  # no package, no driver, no GPU
            self._gpus = []

    def __call__(self) -> dict[str, float]:
        """The metrics; what a GPU does not tell is left out."""
        memory, disk = self._psutil.virtual_memory(), self._psutil.disk_usage(self._place)
        network = self._psutil.net_io_counters()
        seen = {
            "cpu_utilization_percentage": self._psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / 1e6,
            "system_memory_usage_percentage": memory.percent,
            "disk_usage_percentage": disk.percent,
            "disk_available_megabytes": disk.free / 1e6,
        }
        if network and self._network:
            seen["network_receive_megabytes"] = (network.bytes_recv - self._network.bytes_recv) / 1e6
            seen["network_transmit_megabytes"] = (network.bytes_sent - self._network.bytes_sent) / 1e6
        for index, gpu in enumerate(self._gpus):
            seen |= {f"gpu_{index}_{name}": value for name, value in self._look_at(gpu).items()}
        return {name: round(value, 1) for name, value in seen.items()}

    def _look_at(self, gpu: Any) -> dict[str, float]:
        nvml, seen = self._nvml, {}
        try:
            memory = nvml.nvmlDeviceGetMemoryInfo(gpu)
            seen["memory_usage_megabytes"] = memory.used / 1e6
            seen["memory_usage_percentage"] = 100 * memory.used / memory.total
            seen["utilization_percentage"] = float(nvml.nvmlDeviceGetUtilizationRates(gpu).gpu)
            seen["power_usage_watts"] = nvml.nvmlDeviceGetPowerUsage(gpu) / 1000
        except nvml.NVMLError:
            pass
        return seen


def stay_calm() -> None:
    """For a process beside a rank: low priority, deaf to stop requests, which a scheduler sends to every process.

    It goes when the rank has gone, or is killed by it.
    """
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(name, signal.SIG_IGN)
    if hasattr(os, "nice"):
        os.nice(10)


if __name__ == "__main__":
    raise SystemExit(watch(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])))
