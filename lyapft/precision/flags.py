"""torch's process-wide switches for float32 and half matmuls, set for one cell and put back after it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_cuda, _cudnn, _mkldnn = torch.backends.cuda.matmul, torch.backends.cudnn, torch.backends.mkldnn
REDUCED_SUMS = (
    "allow_fp16_reduced_precision_reduction",
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_accumulation",
)
# What set_float32_matmul_precision and cudnn.allow_tf32 write besides their own state, finer than they can put back.
FORMATS: tuple[Any, ...] = (_cuda, _mkldnn.matmul, _cudnn.conv, _cudnn.rnn)  # type: ignore[attr-defined]


@contextmanager
def matmul_flags(*, tf32: bool) -> Iterator[None]:
    """Float32 matmuls and convolutions in float32, or in TF32 on CUDA; half ones always with float32 sums.

    torch's own defaults are neither: cuDNN convolutions use TF32, and half matmuls on CUDA may sum in half.
    """
    matmul, cudnn = torch.get_float32_matmul_precision(), _cudnn.allow_tf32
    reduced = {name: getattr(_cuda, name) for name in REDUCED_SUMS}
    formats = [backend.fp32_precision for backend in FORMATS]
    try:
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        _cudnn.allow_tf32 = tf32
        for name in REDUCED_SUMS:
            setattr(_cuda, name, False)
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        _cudnn.allow_tf32 = cudnn
        for name, value in reduced.items():
            setattr(_cuda, name, value)
        for backend, value in zip(FORMATS, formats, strict=True):
            backend.fp32_precision = value
