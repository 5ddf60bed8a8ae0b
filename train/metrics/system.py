"""Figures of the machine that the first rank runs on: what a slow run is asked for first."""

import time
from pathlib import Path

import torch


class Machine:
    """Looks at CPU, memory, disk, network and GPU.

    Args:
        directory: the run directory, whose file system is looked at.
        device: of this rank.
    """

    def __init__(self, directory: Path, device: torch.device):
        import psutil

        self._psutil = psutil
        self._directory, self._device = directory, device
        self._process = psutil.Process()
        self._process.cpu_percent()  # counts from here on
        psutil.cpu_percent()
        self._counts, self._at = self._counted(), time.monotonic()

    def look(self) -> dict[str, float]:
        """Figures by name: shares in [0, 1], bytes, and bytes per second since the look before."""
        memory, disk = self._psutil.virtual_memory(), self._psutil.disk_usage(str(self._directory))
        counts, now = self._counted(), time.monotonic()
        took = max(now - self._at, 1e-9)
        rates = {f"{name}_bytes_per_s": (counts[name] - self._counts.get(name, 0)) / took for name in counts}
        self._counts, self._at = counts, now
        figures = {
            "cpu": self._psutil.cpu_percent() / 100,
            "process_cores": self._process.cpu_percent() / 100,
            "memory": memory.percent / 100,
            "memory_free_bytes": float(memory.available),
            "process_memory_bytes": float(self._process.memory_info().rss),
            "disk": disk.percent / 100,
            "disk_free_bytes": float(disk.free),
            **rates,
            **self._gpu(),
        }
        return {f"system/{name}": value for name, value in figures.items()}

    def _counted(self) -> dict[str, int]:
        """Bytes since the machine started; a container may hide them."""
        disk, network = self._psutil.disk_io_counters(), self._psutil.net_io_counters()
        found = {"disk_read": disk.read_bytes, "disk_written": disk.write_bytes} if disk else {}
        return found | ({"sent": network.bytes_sent, "received": network.bytes_recv} if network else {})

    def _gpu(self) -> dict[str, float]:
        """Of this rank's device alone: asking for another one's memory would take some of it."""
        if self._device.type != "cuda":
            return {}
        free, total = torch.cuda.mem_get_info(self._device)
        found = {"gpu_memory": 1 - free / total, "gpu_memory_free_bytes": float(free)}
        try:
            found["gpu"] = torch.cuda.utilization(self._device) / 100
            found["gpu_celsius"] = float(torch.cuda.temperature(self._device))
            found["gpu_watts"] = torch.cuda.power_draw(self._device) / 1000
        except (RuntimeError, ImportError):  # needs the package nvidia-ml-py
            pass
        return found
