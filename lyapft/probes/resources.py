"""What a training uses: memory now and at its worst, processor time."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any, cast

import lightning as L
import psutil
import torch
from lightning.pytorch.callbacks import Callback

from lyapft.environment import STATUS

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from lyapft.module import FineTuner


class ResourceProbe(Callback):
    """Memory in use and its peak so far, memory per token in flight, share of the processors.

    Columns: `memory_bytes` (resident set, or what CUDA's allocator holds), `memory_peak_bytes` (of the process so far),
    `memory_bytes_per_token` (the peak over the tokens of a micro-batch), `cpu_percent` (100 for each core that was
    busy), and on CUDA `gpu_percent`, the busy share that the driver reports, where its library is there.
    """

    def __init__(self, every: int = 1) -> None:
        """
        Args:
            every: steps between two measurements.
        """
        self.every = every
        self._process = psutil.Process()
        self._last: tuple[float, float] | None = None
        self._gpu_reports = True
        self._micro_batches = 1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clocks."""
        self._micro_batches = cast("FineTuner", pl_module).settings.accumulate  # slow to read: a third of the cost
        self._last = self._clocks()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure once a step is whole."""
        module = cast("FineTuner", pl_module)
        if (batch_idx + 1) % self._micro_batches or trainer.global_step % self.every:
            return
        now, peak = self.memory(pl_module.device)
        wall, cpu = self._clocks()
        before = self._last or (wall, cpu)
        self._last = wall, cpu
        module.observed["memory_bytes"] = now
        if peak is not None:
            module.observed["memory_peak_bytes"] = peak
            parts = self._micro_batches * module.copies * module.parts
            tokens = module.observed["tokens"] / parts
            module.observed["memory_bytes_per_token"] = peak / tokens
        if wall > before[0]:
            module.observed["cpu_percent"] = 100 * (cpu - before[1]) / (wall - before[0])
        if pl_module.device.type == "cuda":
            self._gpu(module)

    def memory(self, device: torch.device) -> tuple[int, int | None]:
        """Bytes in use and the peak so far; the peak of a process is known on Linux."""
        if device.type == "cuda":
            return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
        try:  # not getrusage: its peak is inherited from whoever launched this process
            status = STATUS.read_bytes()
        except OSError:
            return self._process.memory_info().rss, None
        return _kilobytes(status, b"VmRSS:"), _kilobytes(status, b"VmHWM:")

    def _gpu(self, module: FineTuner) -> None:
        if not self._gpu_reports:
            return
        try:
            module.observed["gpu_percent"] = float(torch.cuda.utilization(module.device))
        except Exception as error:  # noqa: BLE001 - no NVML, or NVML's own: a slice of a GPU has no such number
            self._gpu_reports = False
            log.warning("the busy share of the GPU is not measured: %s", error)

    def _clocks(self) -> tuple[float, float]:
        """Seconds of the wall, and of all threads of this process on processors."""
        return time.perf_counter(), time.process_time()


def _kilobytes(status: bytes, field: bytes) -> int:
    """A line of Linux's /proc/self/status, in bytes."""
    return 1024 * int(status.partition(field)[2].split(maxsplit=1)[0])
