"""A state that stops: x_t = ā x_{t−1} + b in a narrow format no longer moves where its change is below half a spacing.

The truth is x* = b / (1 − ā), whatever λ < 0 says of the distance to it. Here ā = e^{−Δ} and b = Δ as in a Mamba with
A = −1 and a constant input of 1, so that x* = Δ / (1 − e^{−Δ}) is close to 1. Remedies: a float32 state, stochastic
rounding of the stored state, and Kahan's compensated sum.
Source: Higham 2002, §4.3 (compensated sum); Croci et al. 2022 (stochastic rounding).
"""

import math
from typing import Any

import torch
from torch import Tensor

from lyapft.experiments.frame import Result, interval, track
from lyapft.lyapunov.summary import NEUTRAL_ZONE

FORMATS = {"bf16": torch.bfloat16, "fp16": torch.float16}
DIGITS = {"bf16": 8, "fp16": 11}  # of the significand
SMALLEST = {"bf16": -133, "fp16": -24}  # exponent of the smallest subnormal
METHODS = {
    "state": "state stored in the format",
    "decay": "state and decay in the format",
    "float32": "float32 state",
    "stochastic": "stochastic rounding",
    "kahan": "Kahan's sum",
}
POINTS = 200


def fixed_point(step: float) -> float:
    """x* of the exact recurrence.

    >>> round(fixed_point(0.001), 4)
    1.0005
    """
    return -step / math.expm1(-step)


def spacing(x: Tensor, name: str) -> Tensor:
    """Distance between neighbouring numbers of the format around |x|.

    >>> spacing(torch.tensor([1.0, 0.25], dtype=torch.float64), "bf16").log2()
    tensor([-7., -9.], dtype=torch.float64)
    """
    exponent = (torch.frexp(x).exponent - DIGITS[name]).clamp(min=SMALLEST[name])
    return torch.ldexp(torch.ones_like(x), exponent)


def stochastic(x: Tensor, name: str, generator: torch.Generator) -> Tensor:
    """x rounded up or down to the format with the probabilities that keep its mean; float64 in and out."""
    grid = spacing(x, name)
    down = torch.floor(x / grid)
    up = torch.rand(x.shape, generator=generator, dtype=x.dtype) < x / grid - down
    return (down + up) * grid


def predicted_stop(step: float, start: float, name: str) -> float:
    """Where a stored state stops, in closed form: the first number whose change is at most half a spacing.

    Between 2^k and 2^{k+1} the spacing is s = 2^{k+1−digits}. From below a state moves while b − (1 − ā) x > s/2, from
    above while (1 − ā) x − b > s/2; the first k in whose range that ends is where it stops.

    >>> predicted_stop(0.001, 0.0, "bf16"), predicted_stop(0.001, 2.0, "bf16")
    (0.25, 2.0)
    """
    keep, rising = -math.expm1(-step), start < fixed_point(step)
    k = math.floor(math.log2(start or step)) if rising else math.ceil(math.log2(start)) - 1
    while True:
        grid = 2.0 ** max(k + 1 - DIGITS[name], SMALLEST[name])
        if rising:
            stop = max(2.0**k, start, math.ceil((step - grid / 2) / keep / grid) * grid)
            inside = stop < 2.0 ** (k + 1)
        else:
            stop = min(2.0 ** (k + 1), start, math.floor((step + grid / 2) / keep / grid) * grid)
            inside = stop > 2.0**k
        if inside:
            return stop
        k += 1 if rising else -1


def trajectory(
    method: str, name: str, step: float, start: float, tokens: int, draws: int, generator: torch.Generator
) -> Tensor:
    """(tokens + 1, draws) states, float64; only stochastic rounding differs between draws."""
    dtype = torch.float32 if method == "float32" else FORMATS[name]
    decay, keep = math.exp(-step), -math.expm1(-step)
    if method == "decay":
        decay = float(torch.tensor(decay).to(dtype))
    x = torch.full((draws if method == "stochastic" else 1,), start, dtype=torch.float64)
    lost, states = torch.zeros_like(x), [x]
    for _ in range(tokens):
        if method == "stochastic":
            x = stochastic(decay * x + step, name, generator)
        elif method == "kahan":  # the change, less what the last addition lost, everything stored in the format
            change = ((step - keep * x) - lost).to(dtype).double()
            moved = (x + change).to(dtype).double()
            lost = ((moved - x) - change).to(dtype).double()
            x = moved
        else:
            x = (decay * x + step).to(dtype).double()
        states.append(x)
    return torch.stack(states)


def run(
    step: float,
    starts: list[float],
    tokens: int,
    draws: int,
    sweep: list[float],
    seed: int,
    progress: bool = False,
) -> Result:
    """One row per start, format and method: where the state ends after `tokens`, and what was known beforehand.

    `neutral_zone` is the share of the probe's number of that format, 1 where |ΔA| lies inside; `settled` is the mean of
    the last tenth of the tokens with its interval over draws; `error` its relative distance from the truth. The sweep
    over step sizes shows for each whether the neutral zone foretells the stop.
    """
    generator = torch.Generator().manual_seed(seed)
    shown = sorted({round(tokens * i / (POINTS - 1)) for i in range(POINTS)})
    rows, curves = [], []
    cases = [(start, name, method) for start in starts for name in FORMATS for method in METHODS]
    for start, name, method in track(cases, "states", progress):
        states = trajectory(method, name, step, start, tokens, draws, generator)
        rows.append({"start": start, "format": name, "method": METHODS[method], **_row(states, method, name, step)})
        curves.append(
            {"start": start, "format": name, "method": method, "x": shown, "y": states[shown].mean(1).tolist()}
        )
    swept = [
        {"format": name, "step": size, "relative": _last(name, size) / fixed_point(size),
         "inside": size < NEUTRAL_ZONE[name], "edge": NEUTRAL_ZONE[name]}
        for name in FORMATS for size in track(sweep, f"{name}: step sizes", progress)
    ]  # fmt: skip
    exact = [fixed_point(step) * -math.expm1(-step * t) for t in shown]
    return Result(rows, {"curves": curves, "sweep": swept, "step": step, "truth": fixed_point(step), "exact": exact})


def _last(name: str, step: float) -> float:
    """The stored state after twelve memories, from 0: by then the exact one is there to 6e-6."""
    return float(trajectory("state", name, step, 0.0, round(12 / step), 1, torch.Generator())[-1])


def _row(states: Tensor, method: str, name: str, step: float) -> dict[str, Any]:
    settled = interval(states[-max(1, len(states) // 10) :].mean(0).tolist())
    truth = fixed_point(step)
    return {
        "settled": settled.mean,
        "low": settled.low,
        "high": settled.high,
        "truth": truth,
        "error": settled.mean / truth - 1,
        "predicted": predicted_stop(step, float(states[0, 0]), name) if method == "state" else None,
        "neutral_zone": float(step < NEUTRAL_ZONE["fp32" if method == "float32" else name]),
        "lambda": -step,
    }
