"""Random layers against their rounding certificate: what kernels compute, what was promised.

Letters: L tokens, D channels. A draw is a layer of `CHANNELS` channels with one state each, an input and an initial
state. Step sizes spread over five decades, so that 1 − ā reaches 1e-5 and below; inputs over ten, so that fp16 states
become subnormal, or overflow; a third of the layers has an A that an adapter has changed.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lyapft import scan
from lyapft.lyapunov.certificate import KERNELS, certificate
from lyapft.lyapunov.rounding import Inputs
from lyapft.lyapunov.ssd_certificate import KERNELS as SSD_KERNELS
from lyapft.lyapunov.ssd_certificate import ssd_certificate
from lyapft.scan.ssd import CHUNK

NAMES = [*KERNELS, *(f"ssd {name}" for name in SSD_KERNELS)]
CHANNELS = 4
LENGTHS = (16, 64, 256, 1024, 4096)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Draws(NamedTuple):
    """Layers side by side, float64: Δ (1, L, D), A and what an adapter made of it (D,), u (1, L, D), B (L,), x_0."""

    delta: Tensor
    A: Tensor
    adapted: Tensor
    inputs: Tensor
    B: Tensor
    initial: Tensor


def draw(layers: int, length: int, generator: torch.Generator) -> Draws:
    """Random layers: step sizes over five decades, inputs over ten, a third with an A that an adapter has changed."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    width = layers * CHANNELS
    step = 10 ** uniform(-5, 0, layers).repeat_interleave(CHANNELS)
    delta = step * (0.5 * normal(1, length, width)).exp()
    A = -(10 ** uniform(-0.5, 1.2, width))
    change = (uniform(0, 1, layers) < 1 / 3).repeat_interleave(CHANNELS) * 0.3 * normal(width)
    size = 10 ** uniform(-5, 5, layers).repeat_interleave(CHANNELS)
    started = (uniform(0, 1, layers) < 0.5).repeat_interleave(CHANNELS)
    initial = started * size * normal(1, width)
    return Draws(delta, A, A * change.exp(), size * normal(1, length, width), normal(length), initial)


def computed(kernel: str, delta: Tensor, A: Tensor, inputs: Tensor, B: Tensor, initial: Tensor) -> Tensor:
    """(1, L, D) states that a kernel really computes from inputs in its own format; ssd shows the last one only."""
    if kernel.startswith("ssd"):
        head = (inputs[..., None], delta, A, B[None, :, None, None], B[None, :, None, None], initial[..., None, None])
        return scan.ssd(*head, kernel=kernel.split()[1])[1].flatten(1)[:, None]
    if kernel in ("torch", "cpu"):
        ones = torch.ones_like(B)[None, :, None]
        return scan.selective_scan(
            inputs, delta, A[:, None], B[None, :, None], ones, initial[..., None], kernel=kernel
        )[0]  # one state a channel and C = 1: the output is the state
    name = kernel.split()[1]
    state, states = initial.to(DTYPES[name]), []
    for t in range(delta.shape[1]):
        state = torch.exp(delta[:, t] * A) * state + (delta[:, t] * inputs[:, t]) * B[t]
        state = state.to(DTYPES[name])
        states.append(state)
    return torch.stack(states, dim=1)


def _inputs(delta: Tensor, A: Tensor, inputs: Tensor, B: Tensor, initial: Tensor) -> Inputs:
    return Inputs(delta * A, delta * inputs * B[:, None], initial)


def bound_and_measure(kernel: str, draws: Draws) -> tuple[Tensor, Tensor]:
    """((1, L, D) certificate, measured deviation) of every state shown; not finite where the kernel overflowed."""
    dtype = DTYPES[kernel.split()[1]] if kernel.startswith("loop") else torch.float32
    exact = _inputs(draws.delta, draws.A, draws.inputs, draws.B, draws.initial)
    read = [t.to(dtype) for t in (draws.delta, draws.adapted, draws.inputs, draws.B)]
    initial = draws.initial.to(DTYPES[kernel.split()[1]] if kernel.startswith(("loop", "stored")) else dtype)
    given, states = _inputs(*(t.double() for t in (*read, initial))), exact.states()
    factor = float(read[3].abs().max())
    if kernel.startswith("ssd"):
        bound = ssd_certificate(SSD_KERNELS[kernel.split()[1]], exact, given, states, chunk=CHUNK, write_factor=factor)[
            :, -1:
        ]
    else:
        bound = certificate(KERNELS[kernel], exact, given, states, write_factor=factor)
    delta, A, inputs, B = read
    found = computed(kernel, delta, A, inputs, B, initial)
    return bound, (found.double() - states[:, -found.shape[1] :]).abs()


def run(kernel: str, layers: int, length: int, generator: torch.Generator) -> tuple[int, int, list[float]]:
    """(violations, overflows, ratio of each draw that measured a deviation) among `layers` draws."""
    found = bound_and_measure(kernel, draw(layers, length, generator))
    bound, measured = (t[0].unflatten(-1, (layers, CHANNELS)) for t in found)
    finite = measured.isfinite().all(2).all(0)
    violated = (~(measured <= bound).all(2).all(0) & finite).sum()
    top, worst = bound.amax((0, 2)), measured.amax((0, 2))
    kept = finite & (worst > 0)
    return int(violated), int((~finite).sum()), (top / worst)[kept].tolist()
