"""`summary.stability_profile` in one pass over Δ, compiled by numba for float32 in CPU memory.

Letters: B batch, L tokens, C channels or heads.

y = −ΔA ≥ 0, and non-negative floats are ordered as their bits are: minima and comparisons run on integers, which a
compiler vectorises without being allowed to forget about NaN. Sums run in float64 and carry NaN on.
"""

# mypy: ignore-errors
# (numba types the kernel, and refuses what does not fit)

import numpy as np
import torch
from numba import types
from torch import Tensor

from lyapft.scan.compiled import Kernel, jit

_SIGNATURE = types.void(
    types.float32[:, :, ::1],
    types.float32[::1],
    types.int64[:, ::1],
    types.UniTuple(types.int32, 3),
    types.float32[:, ::1],
    types.int64[::1],
    types.float64[::1],
    types.float64[::1],
)


def _make(digest: int):
    @jit
    def kernel(delta_BLC, rate_C, mask_BL, edges, least_BL, tokens_B, lambda_B, numbers):
        digest  # noqa: B018
        B, L, C = delta_BLC.shape
        sums, row = np.empty(C), np.empty(C, np.float32)
        bits, least_bits = row.view(np.int32), least_BL.view(np.int32)
        wide, middle, narrow = edges
        numbers[:] = 0.0
        numbers[0] = numbers[2] = numbers[3] = -np.inf
        for b in range(B):
            sums[:] = 0.0
            bound = 0.0
            for t in range(L):
                if mask_BL[b, t] == 0:
                    continue
                for c in range(C):
                    row[c] = delta_BLC[b, t, c] * rate_C[c]
                least, in_wide, in_middle, in_narrow = np.int32(0x7FFFFFFF), np.int32(0), np.int32(0), np.int32(0)
                for c in range(C):
                    sums[c] += row[c]
                    y = bits[c]
                    least = min(least, y)
                    in_wide += np.int32(y < wide)
                    in_middle += np.int32(y < middle)
                    in_narrow += np.int32(y < narrow)
                least_bits[b, t] = least
                tokens_B[b] += 1
                bound -= least_BL[b, t]
                numbers[3] = max(numbers[3], -least_BL[b, t])
                numbers[4] += in_wide
                numbers[5] += in_middle
                numbers[6] += in_narrow
            total, slowest = 0.0, np.inf
            for c in range(C):
                total += sums[c]
                slowest = min(slowest, sums[c])
            if np.isnan(total):
                slowest = np.nan
            if tokens_B[b]:
                lambda_B[b] = -slowest / tokens_B[b]
                numbers[1] += lambda_B[b] / B
                numbers[0] = max(numbers[0], lambda_B[b]) if numbers[1] == numbers[1] else np.nan
                numbers[2] = max(numbers[2], bound / tokens_B[b])
        numbers[4:] /= max(1, tokens_B.sum() * C)

    return kernel


_kernel = Kernel("stability summary", _make, _SIGNATURE)


def profile(delta_BLC: Tensor, A_C: Tensor, mask_BL: Tensor, edges: tuple[float, ...]) -> tuple[Tensor, ...]:
    """`summary.FIELDS` (7,), log‖J_t‖ per token (B, L) with 0 at padding, λ and tokens per sequence (B,).

    Args:
        delta_BLC: float32 on the CPU, ≥ 0. A_C: float32, ≤ 0. mask_BL: 1 for real tokens, 0 for padding.
        edges: |ΔA| below which a pair is inside, from the widest zone to the narrowest.
    """
    B, L, _ = delta_BLC.shape
    least_BL, tokens_B, lambda_B, numbers = (
        np.zeros((B, L), np.float32),
        np.zeros(B, np.int64),
        np.zeros(B),
        np.zeros(7),
    )
    delta, mask = delta_BLC.detach().contiguous(), mask_BL.to(torch.int64).contiguous()
    bits = tuple(np.array(edges, np.float32).view(np.int32).tolist())
    rate = (0.0 - A_C.detach()).numpy()  # not the negative: that of 0 is the bits of a large number
    _kernel.prepare()(delta.numpy(), rate, mask.numpy(), bits, least_BL, tokens_B, lambda_B, numbers)
    log_norm_BL = np.subtract(0.0, least_BL)
    return tuple(torch.from_numpy(array) for array in (numbers, log_norm_BL, lambda_B, tokens_B))
