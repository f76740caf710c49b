"""Half matmuls on a CPU without half arithmetic: operands rounded to half, summed in float32, rounded once.

That is what a tensor core does. torch's own half kernels give the same numbers on such a CPU, to one unit in the last
place, but take 7 to 19 times as long as float32. While `emulated_half` is open, the CPU kernels of the matmul ops look
at the dtype of their operands: half ones are widened (exactly), multiplied in float32 and the result is rounded to half
once, overflow to infinity (float16) and gradual underflow included; every other dtype goes to torch's kernel untouched.
The override sits below autograd and autocast: it serves forward and backward, mixed precision and half parameters.
Not covered: the `out=` and in-place variants, which neither autograd nor transformers calls.
"""

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lyapft.precision.attention import attention, attention_backward
from lyapft.precision.workspace import Workspace

HALF = (torch.bfloat16, torch.float16)
MATMULS: dict[str, Callable[..., Tensor]] = {
    "mm": torch.mm,
    "addmm": torch.addmm,
    "bmm": torch.bmm,
    "baddbmm": torch.baddbmm,
    "mv": torch.mv,
    "addmv": torch.addmv,
    "dot": torch.dot,
}
CONVOLUTIONS = ("convolution", "convolution_backward")
ATTENTIONS: dict[str, Callable[..., Any]] = {
    "_scaled_dot_product_flash_attention_for_cpu": attention,
    "_scaled_dot_product_flash_attention_for_cpu_backward": attention_backward,
}

Kernel = Callable[..., Any]

_lock = threading.Lock()
_open = 0
_library: torch.library.Library | None = None


def is_active() -> bool:
    """Whether half matmuls on the CPU are emulated right now."""
    return _library is not None


@contextmanager
def emulated_half() -> Iterator[None]:
    """Emulate half matmuls on the CPU, in every thread of the process, until the block ends, however it ends.

    Blocks may be nested or overlap; the last one to close puts torch's kernels back.
    """
    global _open, _library
    with _lock:
        if _library is None:
            _library = _override()
        _open += 1
    try:
        yield
    finally:
        with _lock:
            _open -= 1
            if _open == 0:
                # Deleting the library is the public way and does this, but only once nothing refers to it any more.
                _library._destroy()
                _library = None


def _override() -> torch.library.Library:
    """Register every emulating kernel; torch's own are found first, as they serve all other dtypes."""
    workspace = Workspace()
    kernels: dict[str, Kernel] = {}
    for name, function in MATMULS.items():
        kernels[name] = _matmul(function, _torch_kernel(name), workspace)
    for name in CONVOLUTIONS:
        kernels[name] = _widened(_torch_kernel(name))
    for name, function in ATTENTIONS.items():
        kernels[name] = _attention(function, _torch_kernel(name), workspace)
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*[Oo]verrid.*registered kernel")  # that is the intention
        for name, kernel in kernels.items():
            library.impl(name, kernel, "CPU", with_keyset=True)
    return library


def _torch_kernel(name: str) -> Kernel:
    call: Kernel = torch.library.get_kernel(f"aten::{name}", "CPU").call_boxed
    return call


def _matmul(function: Callable[..., Tensor], torch_kernel: Kernel, workspace: Workspace) -> Kernel:
    """Kernel of a product of the last two operands, to which the one before them, if any, is added."""

    def kernel(keys: Any, *operands: Tensor, **scalars: Any) -> Tensor:
        dtype = operands[0].dtype
        if dtype not in HALF or any(t.dtype != dtype for t in operands):  # torch refuses a mixture in its own words
            result: Tensor = torch_kernel(keys, *operands, **scalars)
            return result
        left, right = operands[-2:]
        shape = left.shape[:-1] + (right.shape[-1:] if right.dim() > 1 else ())
        wide = [workspace.widen(slot, t) for slot, t in enumerate(operands)]
        out = workspace.empty(len(wide), shape)
        return function(*wide, **scalars, out=out).to(dtype)

    return kernel


def _widened(torch_kernel: Kernel) -> Kernel:
    """Kernel that widens half tensors, calls torch's kernel on float32 and rounds what comes out."""

    def kernel(keys: Any, *arguments: Any) -> Any:
        dtypes = {a.dtype for a in arguments if isinstance(a, Tensor)}
        if len(dtypes) != 1 or not dtypes.issubset(HALF):
            return torch_kernel(keys, *arguments)
        (dtype,) = dtypes
        results = torch_kernel(keys, *(a.float() if isinstance(a, Tensor) else a for a in arguments))
        if isinstance(results, Tensor):
            return results.to(dtype)
        return tuple(None if r is None else r.to(dtype) for r in results)

    return kernel


def _attention(function: Callable[..., Any], torch_kernel: Kernel, workspace: Workspace) -> Kernel:
    def kernel(keys: Any, query_or_gradient: Tensor, *arguments: Any, **options: Any) -> Any:
        if query_or_gradient.dtype not in HALF:
            return torch_kernel(keys, query_or_gradient, *arguments, **options)
        return function(query_or_gradient, *arguments, **options, workspace=workspace)

    return kernel
