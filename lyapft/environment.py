"""What this machine is: device, threads, memory, versions."""

import ctypes
import gc
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

PACKAGES = ("torch", "transformers", "peft", "lightning", "datasets", "numba", "numpy", "lyapft")
DECIDING = (  # of a description: what can change the last bits of a number
    "torch", "transformers", "peft", "lightning", "numba", "numpy", "lyapft", "platform", "cpu", "device", "git_commit",
)  # fmt: skip
CLEAR_REFS = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from malloc.h


def resolve_device(wanted: str) -> tuple[str, list[str]]:
    """The device that `device=` means here, and what is wrong with it."""
    has_cuda = torch.cuda.is_available()
    if wanted == "cuda" and not has_cuda:
        return "cpu", ["device=cuda needs a CUDA GPU that this torch can use; this machine has none. Use device=cpu."]
    return ("cuda" if has_cuda else "cpu") if wanted == "auto" else wanted, []


def resolve_threads(wanted: int | None) -> int:
    """CPU threads: those asked for, else OMP_NUM_THREADS, else one for each core that this process may use."""
    if wanted is not None:
        return wanted
    told = os.environ.get("OMP_NUM_THREADS", "")
    if told.isdigit() and int(told) > 0:
        return int(told)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class PeakMemory:
    """Peak memory of a training: the model's own bytes and whatever was held above them at the worst moment.

    On CUDA: the allocator's peak. On Linux: the resident-set high-water mark, reset at the start, after the C
    allocator has given back what earlier cells of the process left, and without the pages of files (code that a
    process runs for the first time, mapped data) that came in since: they are the system's to drop. Elsewhere such a
    mark cannot be reset, and the peak is None.

    Attributes:
        source: where the number comes from, for the record.
        earlier_bytes: the peak of an attempt that this one continues.
    """

    def __init__(self, model: nn.Module, device: str) -> None:
        """
        Args:
            model: before its training, on whatever device.
            device: `cpu` or `cuda`, where it will train.
        """
        tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
        self.device, self._model_bytes, self._start, self._files = device, sum(tensors.values()), 0, 0
        self.earlier_bytes: int | None = None
        self._at_end: int | None = None
        if device == "cuda":
            self.source = "torch.cuda.max_memory_allocated"
        else:
            self.source = "resident set high-water mark, pages of files left out (Linux)"

    def start(self) -> None:
        """Start measuring: the model is on its device, the training has not begun."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated()
            return
        _return_free_memory()
        self._start = psutil.Process().memory_info().rss
        try:
            self._files = _status("RssFile")
            CLEAR_REFS.write_text("5")
        except (OSError, StopIteration):  # no such file, or not this line in it
            self.source = "not available on this system"

    def stop(self) -> None:
        """What is held from now on is no longer this training's."""
        self._at_end = self._since_start()

    def peak_bytes(self) -> int | None:
        """The peak from the start to the end, or of an earlier attempt where that was higher, in bytes."""
        peak = self._since_start() if self._at_end is None else self._at_end
        return peak if peak is None else max(peak, self.earlier_bytes or 0)

    def _since_start(self) -> int | None:
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() - self._start + self._model_bytes
        if not self.source.startswith("resident"):
            return None
        files = max(0, _status("RssFile") - self._files)
        return max(0, _status("VmHWM") - self._start - files) + self._model_bytes


def warm_up(module: nn.Module, loss: Callable[[Any], Tensor], batches: Iterable[Any]) -> None:
    """One forward and backward pass whose numbers are thrown away.

    What a process allocates once, on its first pass (code, threads, workspaces), would otherwise be counted as the
    memory of its first training alone. Random numbers are put back.
    """
    devices = sorted({p.device.index or 0 for p in module.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices):
        loss(
            {name: value.to(next(module.parameters()).device) for name, value in next(iter(batches)).items()}
        ).backward()
    module.zero_grad(set_to_none=True)


def _status(field: str) -> int:
    """A figure of this process from Linux, in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _return_free_memory() -> None:
    """Give freed heap pages back to the system, where the C library can (glibc)."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def keep_freed_memory() -> None:
    """Let the C library (glibc) keep what a training step frees for the next step.

    By default it hands large blocks back to the system, which gives out untouched pages: a softmax over 16 MB of logits
    then takes seven times as long. `PeakMemory` returns what was kept before it measures.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**25)  # the largest that glibc accepts
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def describe(device: str, threads: int) -> dict[str, Any]:
    """Versions and hardware, for the record. No host names, no paths."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "python": platform.python_version(),
        **versions,
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": threads,
        "git_commit": _git_commit(),
    }


def differences(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What can change the last bits of a number and is not the same in two descriptions; empty if nothing is.

    >>> differences({"torch": "2.12.0", "python": "3.12"}, {"torch": "2.13.0", "python": "3.13"})
    'torch 2.12.0 is now 2.13.0'
    """
    pairs = ((name, earlier.get(name), now.get(name)) for name in DECIDING)
    return ", ".join(f"{name} {before} is now {after}" for name, before, after in pairs if before != after)


def cpu_name() -> str:
    """The processor, as its maker names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _git_commit() -> str | None:
    """The commit of the checkout that lyapft runs from, if it runs from one."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
