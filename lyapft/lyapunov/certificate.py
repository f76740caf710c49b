"""A bound on what rounding does to a recurrent state, from the exact trajectory and the arithmetic of the kernel.

Letters: B batch, L tokens, and any state axes behind them. All numbers here are float64.

The exact state follows x_t = ā_t x_{t−1} + b_t with ā_t = exp(Δ_t A); a kernel computes x̂_t with rounded ā, b,
products and sums, from inputs that may have been rounded or changed before. For e_t ≥ |x̂_t − x_t|, with nothing of
second order dropped:

    η_t = |computed decay − ā_t| ≤ ā_t (e^{|δ(ΔA)|} (1 + ε) − 1)                      ε of exp itself
    β_t = |computed write − b_t| ≤ |δb_t| + γ_w (|b_t| + |δb_t|)                      γ_k = k u / (1 − k u)
    e_t ≤ (ā_t + η_t) e_{t−1} + η_t |x_{t−1}| + β_t + γ_p m_t |x̂_{t−1}| + γ_s |b̂_t| + κ_t + s,    |x̂| ≤ |x| + e

m_t is the factor that is really multiplied, ā_t or its distance from 1, and κ_t what adding the product to the state
rounds away. Where ā_t + η_t > 1, that is 1 − ā below the unit roundoff, the bound grows exponentially and soon says
nothing: there the format may really stall. `KERNELS` says why each constant is what it is. Overflow is outside: exclude
and count it.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lyapft.lyapunov.rounding import FORMATS, REFERENCE, ULP, Inputs, gamma, unbounded

# Elementwise half operations of torch run in float32 and round once more: u of half plus that of the float32 result.
_DOUBLE_ROUNDING = 2.0**-23
_CPU_CHUNK = 16  # tokens after which the compiled scan folds what happened into its base
_BOUNDARY = (0.34, 0.36)  # |ΔA| between which a kernel may take either branch of its decay


@dataclass(frozen=True)
class Rounding:
    """The arithmetic of one step of a kernel.

    Attributes:
        unit, tiny: u and s of the format it computes in.
        argument: roundings of ΔA before the exponential.
        exponential: relative error of that function, ε.
        writes: roundings of b = Δ u B. products, sums: those that ā x̂ and b̂ go through in the step.
        near_one: decays close to 1 are kept as their distance from 1 and the product is added to the state.
        compensated: the sum is kept in two parts (the state at the start of a chunk, and the change since).
        underflow: what a decay may be off by absolutely: below it, it may be computed as 0.
        stored: u and s of the format in which the state waits for the next token, if narrower.
    """

    unit: float
    tiny: float
    argument: int = 1
    exponential: float = ULP
    writes: int = 2
    products: int = 2
    sums: int = 1
    near_one: bool = False
    compensated: bool = False
    underflow: float = 2.0**-149
    stored: tuple[float, float] = (0.0, 0.0)


def _loop(name: str) -> Rounding:
    """x = exp(Δ·A)·x + (Δ·u)·B, each operation rounded to the format: the loop of transformers and mamba's reference.

    One rounding of ΔA; exp within 1 ulp of float32 (SLEEF and MKL), then rounded to half; two roundings of the write;
    the product is rounded and then the sum, so ā x̂ passes two and b̂ one.
    """
    unit, tiny = FORMATS[name]
    if name == "fp32":
        return Rounding(unit, tiny)
    unit += _DOUBLE_ROUNDING
    return Rounding(unit, tiny, exponential=(1 + unit) * (1 + ULP) - 1)


# `scan/torch_scan.py`: expm1 within 1 ulp; h ← (b + e·h) + h, so e·h passes the product and two sums, b two sums, and
# the last sum rounds h itself (κ = u|x̂|). Far from 1 it is the loop.
_TORCH = Rounding(*FORMATS["fp32"], products=3, sums=2, near_one=True)
# The compiled scan, `lyapft/scan/cpu.py`: a rounded log₂e times A, then times Δ: three roundings of the argument;
# `simd.decay` is within 2e-7 ≤ 4u, and 0 below 2^-126.5. The factor is what the decay differs by from the power of two
# nearest to it, whose own product is exact: the distance from 1 while that is 1, less than ā beyond. h is rounded from
# base + change (one on the product's factor), the multiply-add may be two operations (products 3, sums 1), and the
# change is rounded when it is added to (κ = u|change|, in `_carry`).
_CPU = replace(_TORCH, argument=3, exponential=4 * 2.0**-24, sums=1, compensated=True, underflow=2.0**-126)

KERNELS: dict[str, Rounding] = {
    "loop fp32": _loop("fp32"),
    "loop bf16": _loop("bf16"),
    "loop fp16": _loop("fp16"),
    "stored bf16": replace(_loop("fp32"), stored=FORMATS["bf16"]),
    "stored fp16": replace(_loop("fp32"), stored=FORMATS["fp16"]),
    "torch": _TORCH,
    "cpu": _CPU,
}


def certificate(
    rounding: Rounding, exact: Inputs, given: Inputs, states: Tensor, *, write_factor: float = 1.0
) -> Tensor:
    """(B, L, …) upper bounds of |x̂_t − x_t|.

    Args:
        rounding: one of `KERNELS`.
        exact: the inputs of the exact trajectory. given: those that the kernel reads.
        states: `exact.states()`.
        write_factor: largest |B|: what an underflow of Δ u is multiplied with.
    """
    off = given.off(exact)
    e, bounds = off.initial, []
    base = states[:, 0].abs() + e
    for t in range(exact.write.shape[1]):
        before, after, b, given_off = (
            states[:, t].abs(),
            states[:, t + 1].abs(),
            exact.write[:, t].abs(),
            off.write[:, t],
        )
        decay, eta, factor, near = _decay(rounding, exact.log_decay[:, t], off.log_decay[:, t])
        floor = rounding.tiny * (1 + write_factor)
        beta = given_off + gamma(rounding.writes, rounding.unit) * (b + given_off) + floor
        state = before + e
        local = gamma(rounding.products, rounding.unit) * (factor + eta) * state
        local = local + gamma(rounding.sums, rounding.unit) * (b + beta) + 2 * rounding.tiny
        local = local + REFERENCE * (decay * before + b)
        e = unbounded((decay + eta) * e + eta * before + beta + local)
        base = base * (1.5 * (decay + eta)).clamp(max=1.0)  # the power of two is at most √2 ā, and at most 1
        e, base, seen = _carry(rounding, e, near, state, after, base, t)
        unit, tiny = rounding.stored
        e = e * (1 + unit) + unit * after + tiny
        bounds.append(seen * (1 + unit) + unit * after + tiny)
    return torch.stack(bounds, dim=1)


def _decay(rounding: Rounding, log_decay: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ā, η, the factor m that is multiplied, and 1 where the state itself is added to the product."""
    decay, distance = log_decay.exp(), -torch.expm1(log_decay)
    argument = gamma(rounding.argument, rounding.unit) * (log_decay.abs() + deviation) + rounding.tiny
    underflow = max(rounding.tiny, rounding.underflow)
    shift = torch.expm1(deviation + argument)  # relative change of ā by the argument alone
    far = decay * (shift + rounding.exponential * (1 + shift)) + underflow
    if not rounding.near_one:
        return decay, far, decay, torch.zeros_like(decay)
    low, high = _BOUNDARY
    slack = deviation + argument
    surely = log_decay.abs() + slack < low
    close = decay * shift + rounding.exponential * (distance + decay * shift) + underflow
    near = (log_decay.abs() - slack <= high).to(decay.dtype)
    return decay, torch.where(surely, close, far), torch.where(surely, distance, decay), near


def _carry(
    rounding: Rounding, e: Tensor, near: Tensor, state: Tensor, after: Tensor, base: Tensor, t: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(e, base, e as seen): with κ, what the state's own addition rounds away. state ≥ |x̂_{t−1}|, after = |x_t|.

    Compensated: only the change since the chunk began is rounded, |change| ≤ |x̂_t| + |base|, with e_t on both sides. At
    the end of a chunk the two parts are split anew, exactly if |base| ≥ |change|, else to within 2u |change|; states
    below 1e-36 become 0. What is seen is the sum of both parts, rounded.
    """
    unit = rounding.unit
    if not rounding.compensated:
        e = unbounded(e + near * unit * state)
        return e, base, e
    e = unbounded(e + unit * (after + base)) / (1 - unit)
    if (t + 1) % _CPU_CHUNK == 0:
        e = e + 2 * gamma(1, unit) * (after + e + base) + 2e-36
        base = (after + e) * (1 + unit)
    return e, base, e + unit * (after + e)
