"""Samples one node's CPU, memory, disk, network and GPUs during a run.

    python -m lavic.tracking.system_metrics RUN_DIR NODE SECONDS PARENT_PID

appends to RUN_DIR/system/node-NODE.jsonl until the parent process has exited. Names and units are those of MLflow's
`SystemMetricsMonitor`, which is not used: it writes to the MLflow server itself, once for each run and not for each
journal, so nodes without mlflow or network would have no metrics, and its samples would not be sent exactly once.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

from lavic.distributed.background import run_in_background
from lavic.errors import LavicError
from lavic.tracking.journal import Journal

SYSTEM_FOLDER = "system"
_POLL_S = 0.5
_FIRST_SAMPLE_S = 1.0


def monitor(run_dir: Path, node: int, seconds: float, parent_pid: int) -> int:
    """Samples until the parent process has exited."""
    run_in_background()
    try:
        sampler = NodeSampler(run_dir)
    except ImportError:
        return 0  # psutil is not installed
    with contextlib.suppress(OSError, LavicError):  # a full disk: the run reports it
        journal = Journal(run_dir / SYSTEM_FOLDER / f"node-{node}.jsonl")
        journal.event("node", host=socket.gethostname(), gpus=sampler.gpu_names)
        due = time.monotonic() + min(_FIRST_SAMPLE_S, seconds)
        while os.getppid() == parent_pid:
            if time.monotonic() >= due:
                journal.log(0, **sampler.sample())
                due = time.monotonic() + seconds
            time.sleep(min(_POLL_S, seconds))
    return 0


class NodeSampler:
    """Reads the load of this node."""

    def __init__(self, run_dir: Path) -> None:
        """Finds the GPUs. Raises ImportError without psutil."""
        import psutil

        self._psutil = psutil
        self._disk = str(run_dir)
        self._network = psutil.net_io_counters()
        psutil.cpu_percent()  # the first call starts its clock
        self._nvml: Any = None
        self._gpus: list[Any] = []
        self.gpu_names: list[str] = []
        with contextlib.suppress(Exception):  # no package, no driver, no GPU
            import pynvml

            pynvml.nvmlInit()
            self._nvml = pynvml
            for index in range(pynvml.nvmlDeviceGetCount()):
                gpu = pynvml.nvmlDeviceGetHandleByIndex(index)
                self.gpu_names.append(str(pynvml.nvmlDeviceGetName(gpu)))
                self._gpus.append(gpu)

    def sample(self) -> dict[str, float]:
        """The metrics; those that a GPU does not report are left out. Network counts are since the start."""
        memory, disk = self._psutil.virtual_memory(), self._psutil.disk_usage(self._disk)
        network = self._psutil.net_io_counters()
        metrics = {
            "cpu_utilization_percentage": self._psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / 1e6,
            "system_memory_usage_percentage": memory.percent,
            "disk_usage_percentage": disk.percent,
            "disk_available_megabytes": disk.free / 1e6,
        }
        if network and self._network:
            metrics["network_receive_megabytes"] = (network.bytes_recv - self._network.bytes_recv) / 1e6
            metrics["network_transmit_megabytes"] = (network.bytes_sent - self._network.bytes_sent) / 1e6
        for index, gpu in enumerate(self._gpus):
            with contextlib.suppress(self._nvml.NVMLError):
                memory = self._nvml.nvmlDeviceGetMemoryInfo(gpu)
                metrics[f"gpu_{index}_memory_usage_megabytes"] = memory.used / 1e6
                metrics[f"gpu_{index}_memory_usage_percentage"] = 100 * memory.used / memory.total
                utilization = self._nvml.nvmlDeviceGetUtilizationRates(gpu).gpu
                metrics[f"gpu_{index}_utilization_percentage"] = float(utilization)
                metrics[f"gpu_{index}_power_usage_watts"] = self._nvml.nvmlDeviceGetPowerUsage(gpu) / 1000
        return {name: round(value, 1) for name, value in metrics.items()}


if __name__ == "__main__":
    raise SystemExit(monitor(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])))
