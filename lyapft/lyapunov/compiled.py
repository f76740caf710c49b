"""`summary.stability_profile` in one pass over Δ, compiled by numba for float32 in CPU memory.

Letters: B batch, L tokens, C channels or heads.

y = −ΔA ≥ 0, and non-negative floats are ordered as their bits are: minima and comparisons run on integers, which a
compiler vectorises without being allowed to forget about NaN. Sums run in float64 and carry NaN on.
"""

# mypy: ignore-errors
# (numba types the kernel, and refuses what does not fit)

from functools import cache

import numpy as np
import torch
from numba import types
from torch import Tensor

from lyapft.compiled import Kernel, jit

_SIGNATURE = types.boolean(
    types.float32[:, :, ::1],
    types.float32[:, ::1],
    types.int64[:, ::1],
    types.UniTuple(types.int32, 3),
    types.float32[:, ::1],
    types.float32[::1],
    types.float32[::1],
    types.int64[::1],
)


def _make():
    @jit
    def kernel(delta_BLC, A_CN, mask_BL, edges, log_norm_BL, lambda_B, numbers, tokens_B):
        B, L, C = delta_BLC.shape
        rate_C, sums_C, row_C, least = (
            np.empty(C, np.float32),
            np.empty(C),
            np.empty(C, np.float32),
            np.empty(1, np.int32),
        )
        bits_C, least_as_float = row_C.view(np.int32), least.view(np.float32)
        for c in range(C):
            slowest = A_CN[c].max()
            if not slowest <= 0:
                return False
            rate_C[c] = np.float32(0.0) - slowest  # not the negative: that of 0 has the bits of a large number
        wide, middle, narrow = edges
        inside_wide, inside_middle, inside_narrow, tokens = 0, 0, 0, 0
        worst, mean, worst_bound, one_step = -np.inf, 0.0, -np.inf, -np.inf
        for b in range(B):
            sums_C[:] = 0.0
            bound, real = 0.0, 0
            for t in range(L):
                log_norm_BL[b, t] = 0.0
                if mask_BL[b, t] == 0:
                    continue
                for c in range(C):
                    row_C[c] = delta_BLC[b, t, c] * rate_C[c]
                low, in_wide, in_middle, in_narrow = np.int32(0x7FFFFFFF), np.int32(0), np.int32(0), np.int32(0)
                for c in range(C):
                    sums_C[c] += row_C[c]
                    y = bits_C[c]
                    low = min(low, y)
                    in_wide += np.int32(y < wide)
                    in_middle += np.int32(y < middle)
                    in_narrow += np.int32(y < narrow)
                least[0] = low
                log_norm = np.float32(0.0) - least_as_float[0]
                log_norm_BL[b, t] = log_norm
                bound += log_norm
                one_step = max(one_step, log_norm)
                real += 1
                inside_wide += in_wide
                inside_middle += in_middle
                inside_narrow += in_narrow
            tokens_B[b] = real
            tokens += real
            total, slowest = 0.0, np.inf
            for c in range(C):
                total += sums_C[c]
                slowest = min(slowest, sums_C[c])
            exponent = np.nan if np.isnan(total) else -slowest / max(1, real)
            lambda_B[b] = exponent
            mean += exponent / B
            worst = max(worst, exponent)
            worst_bound = max(worst_bound, bound / max(1, real))
        pairs = max(1, tokens) * C
        numbers[0], numbers[1] = np.nan if np.isnan(mean) else worst, mean
        numbers[2], numbers[3] = worst_bound, one_step
        numbers[4], numbers[5], numbers[6] = inside_wide / pairs, inside_middle / pairs, inside_narrow / pairs
        return True

    return kernel


_kernel = Kernel("stability summary", _make, _SIGNATURE)


def profile(delta_BLC: Tensor, A: Tensor, mask_BL: Tensor, edges: tuple[float, ...]) -> tuple[Tensor, ...] | None:
    """`summary.FIELDS` (7,), log‖J_t‖ per token (B, L) with 0 at padding, λ and tokens per sequence (B,).

    Args:
        delta_BLC: float32 on the CPU, ≥ 0. A: float32, (C, N) or (C,). mask_BL: 1 for real tokens, 0 for padding.
        edges: |ΔA| below which a pair is inside, from the widest zone to the narrowest.
    Returns:
        None where an A is positive or not a number: states that grow are left to the reference.
    """
    B, L, _ = delta_BLC.shape
    A_CN = A.contiguous() if A.dim() == 2 else A.contiguous()[:, None]
    outputs = np.empty((B, L), np.float32), np.empty(B, np.float32), np.empty(7, np.float32), np.empty(B, np.int64)
    inputs = (delta_BLC.contiguous(), A_CN, mask_BL.to(torch.int64).contiguous())
    run = _kernel.prepare()
    if not run(*(tensor.detach().numpy() for tensor in inputs), _bits(edges), *outputs):
        return None
    log_norm_BL, lambda_B, numbers, tokens_B = (torch.from_numpy(array) for array in outputs)
    return numbers, log_norm_BL, lambda_B, tokens_B


@cache
def _bits(edges: tuple[float, ...]) -> tuple[int, ...]:
    return tuple(np.array(edges, np.float32).view(np.int32).tolist())
