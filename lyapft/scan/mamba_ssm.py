"""The CUDA kernels of mamba-ssm and causal-conv1d: why they cannot run here, and where each one is.

Nothing is imported before somebody asks. The Triton kernels (SSD, state updates, norms) also run on a CPU in Triton's
interpreter, TRITON_INTERPRET=1: slow, for tests.
"""

import importlib
import os
from collections.abc import Callable
from functools import cache
from typing import Any

SCAN, SSD, UPDATE = (
    "mamba_ssm.ops.selective_scan_interface",
    "mamba_ssm.ops.triton.ssd_combined",
    "mamba_ssm.ops.triton.selective_state_update",
)
MODULES = {
    "selective_scan_fn": SCAN,
    "mamba_inner_fn": SCAN,
    "mamba_chunk_scan_combined": SSD,
    "mamba_split_conv1d_scan_combined": SSD,
    "selective_state_update": UPDATE,
    "causal_conv1d_fn": "causal_conv1d",
    "causal_conv1d_update": "causal_conv1d",
}
# operation -> the function that must be there for it
NEEDED = {
    "selective_scan": "selective_scan_fn",
    "ssd": "mamba_chunk_scan_combined",
    "causal_conv1d": "causal_conv1d_fn",
    "any recurrence": "mamba_chunk_scan_combined",
}
INSTALL = "pip install --no-build-isolation mamba-ssm causal-conv1d, beside the CUDA toolkit that torch was built with"


def missing(operation: str, device_type: str) -> str | None:
    """Why mamba-ssm cannot run an operation on this kind of device; None where it can.

    Args:
        operation: "selective_scan", "ssd" or "causal_conv1d".
        device_type: "cuda", "cpu" or "meta" (a model without weights, that is only looked at).
    """
    if device_type not in ("cuda", "meta") and os.environ.get("TRITON_INTERPRET") != "1":
        return f"its kernels need CUDA tensors, these are on {device_type}"
    return _import_fault(NEEDED[operation])


@cache
def _import_fault(name: str) -> str | None:
    package = MODULES[name].partition(".")[0].replace("_", "-")
    try:
        function(name)
    except Exception as error:  # noqa: BLE001 - a broken binary raises anything: the reason is what is asked for
        return f"{package} cannot be used ({type(error).__name__}: {error}): {INSTALL}"
    return None


def function(name: str) -> Callable[..., Any]:
    """A kernel by its own name.

    Raises:
        ImportError: its package is not installed or cannot be loaded.
    """
    found = getattr(importlib.import_module(MODULES[name]), name)
    if found is None:  # causal_conv1d leaves None where its extension is absent
        raise ImportError(f"{MODULES[name]} has no {name}")
    return found
