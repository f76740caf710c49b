"""The rounding certificates of the chunked state space duality kernels, at the ends of their chunks.

Letters: B batch, T tokens of a chunk; log decays are (B, L, …) and broadcast against writes (B, L, …). Float64.

With s the running sum of ΔA inside a chunk, a kernel computes

    x ← exp(s_T) x + Σ_j τ_j,     τ_j = exp(s_T − s_j) b_j,     b_j = Δ_j x_j B_j

s is summed in float64; subtracted and rounded once, an exponential is off by e^{u |argument|} (1 + ε). `KERNELS` has
what is otherwise in the compiled kernel. A term τ is rounded three times: as Δ x, times the exponential, times B (by a
fused multiply-add: twice). The sum is a matrix product of unknown order, whose additions round away E together.
Whatever the order, an addition rounds away

    at most u (M + E), M the sum of the positive or that of the negative terms, whichever is larger;
    at most its smaller summand: the other one is a number of the format.

Let R be the smallest terms, and k the number of the others. k − 1 additions join two sums that both hold some of the
others; what joins a sum of R alone to another is bounded by that sum, and each of R is in one. So for every k, and for
the best,

    E ≤ (k − 1) u (M + E) + (1 + 2 γ_n) Σ_R |τ|

instead of γ_n Σ|τ|: half of it where signs are mixed, less where the decay leaves few terms of any size. The last
product and the last sum round once each, the sum in proportion to the state that comes out. As in `certificate`,
nothing of second order is dropped.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lyapft.lyapunov.rounding import FORMATS, REFERENCE, ULP, Inputs, gamma, unbounded

UNIT, TINY = FORMATS["fp32"]


class Arithmetic(NamedTuple):
    """What tells the kernels apart.

    Attributes:
        arguments: roundings of the argument of an exponential.
        split: what keeping s as two float32 numbers costs, relative to the whole s of the chunk.
        exponential: relative error of the function.
        sums: roundings of the sum of the terms before the last one.
        underflow: what an exponential may be off by absolutely: below it, it may be computed as 0.
        flushed: magnitude below which a state becomes zero.
    """

    arguments: int = 1
    split: float = 0.0
    exponential: float = ULP
    sums: int = 0
    underflow: float = TINY
    flushed: float = 0.0


KERNELS = {
    # `scan/ssd.py`: s is subtracted in float64 where a state is concerned; exp within 1 ulp (SLEEF, MKL).
    "torch": Arithmetic(),
    # `scan/ssd_forward.py`: s is a sum of two float32 numbers, off by u² |s| each and by 64 roundings of float64; their
    # difference is rounded twice; exp2 is within 2e-7 <= 4u, 0 below 2^-126.5, and what is multiplied to it or added,
    # twice more. What is left of the state beside the nearest power of two is added to the terms, a sum that is rounded
    # once.
    "cpu": Arithmetic(2, 4 * UNIT**2, 6 * UNIT, 1, 2.0**-126, 1e-36),
}


def ssd_certificate(
    kernel: Arithmetic, exact: Inputs, given: Inputs, states: Tensor, *, chunk: int, write_factor: float = 1.0
) -> Tensor:
    """(B, ⌈L/chunk⌉, …) upper bounds of |x̂ − x| after each chunk; arguments as of `certificate`.

    Args:
        kernel: one of KERNELS. chunk: tokens per chunk of the kernel.
    """
    off, length, bounds = given.off(exact), exact.write.shape[1], []
    e = off.initial
    for start in range(0, length, chunk):
        end = min(start + chunk, length)
        part, before, after = slice(start, end), states[:, start].abs(), states[:, end].abs()
        log_decay, change = exact.log_decay[:, part], off.log_decay[:, part]
        sum_of_terms, wrong_sum = _sum(
            kernel, log_decay, change, exact.write[:, part], off.write[:, part], write_factor
        )
        argument = log_decay.sum(1)
        kept = argument.exp()
        eta = kept * _relative(kernel, argument, change.sum(1), argument) + kernel.underflow
        product = UNIT * (kept + eta) * (before + e) + TINY
        product = product + kernel.sums * UNIT * (sum_of_terms + wrong_sum) + kernel.flushed
        reference = (end - start) * REFERENCE * (kept * before + sum_of_terms)
        wrong = (kept + eta) * e + eta * before + wrong_sum + product + reference
        e = unbounded(wrong + UNIT * (after + wrong))
        bounds.append(e)
    return torch.stack(bounds, dim=1)


def _sum(
    kernel: Arithmetic, log_decay: Tensor, change: Tensor, write: Tensor, off: Tensor, write_factor: float
) -> tuple[Tensor, Tensor]:
    """Σ|τ| of the exact terms of a chunk, and a bound on what is wrong with their computed sum."""
    length = write.shape[1]
    after_token = _tail_sums(log_decay)
    weight = after_token.exp()
    relative = _relative(kernel, after_token, _tail_sums(change), log_decay.sum(1, keepdim=True))
    computed = (1 + relative) * (1 + UNIT) ** 3  # at most, per exact term
    exact, b = (weight * write.abs()).sum(1), write.abs() + off
    floor = TINY * length * (1 + 2 * write_factor) + kernel.underflow * b.sum(1)
    terms = (weight * (b * computed - write.abs())).sum(1) + floor
    return exact, terms + _additions(*(weight * computed * (x.clamp(min=0) + off) for x in (write, -write))) + floor


def _additions(positive: Tensor, negative: Tensor) -> Tensor:
    """E of terms at most as large as these (B, T, …), of which each is one or the other, or their sum."""
    length = positive.shape[1]
    largest = torch.maximum(positive.sum(1, keepdim=True), negative.sum(1, keepdim=True))
    ascending = (positive + negative).sort(dim=1).values
    rest = torch.cat((torch.zeros_like(ascending[:, :1]), ascending[:, :-1]), dim=1).cumsum(1).flip(1)  # k = 1 … T
    joins = UNIT * torch.arange(length, dtype=rest.dtype).view(1, -1, *[1] * (rest.dim() - 2))
    return ((joins * largest + (1 + 2 * gamma(length, UNIT)) * rest) / (1 - joins)).amin(1)


def _tail_sums(x: Tensor) -> Tensor:
    """Σ of what follows each token in the chunk."""
    return x.sum(1, keepdim=True) - x.cumsum(1)


def _relative(kernel: Arithmetic, argument: Tensor, change: Tensor, whole: Tensor) -> Tensor:
    """Relative error of a computed exponential whose argument was changed, rounded and passed to exp.

    whole: the sum of all arguments of the chunk.
    """
    rounded = kernel.arguments * UNIT * (1 + UNIT) * (argument.abs() + change) + kernel.split * (whole.abs() + change)
    return (1 + kernel.exponential) * torch.exp(change + rounded) - 1
