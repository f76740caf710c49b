"""The theorem on random layers: a change ε of a Mamba's state or input changes its later states by O(ε e^{tζ}), ζ ≤ 0.

Letters: L tokens, E sizes of the change, R layers, D channels. A layer has Mamba-1's decays, one per channel, or
Mamba-2's, one for all channels of a head; states do not mix, so one a channel stands for all.
Source: Halloran et al. 2025, Theorem 1 and its check on random layers.
"""

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from lyapft.experiments.frame import Result, interval, track

UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
FORMATS = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FAMILIES = ("selective_scan", "ssd")
CHANNELS = 8
POINTS = 60  # tokens of a curve, evenly on a log axis
FEWEST = 8  # tokens above the floor that a slope is fitted to


def random_layers(family: str, layers: int, tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(log decays ΔA, writes ΔuB), (L, R, D) float64: Δ over four decades, A from −0.3 to −16."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)

    channels = CHANNELS if family == "selective_scan" else 1
    delta = 10 ** uniform(-4, 0, layers, 1) * uniform(0.5, 1.5, tokens, layers, channels)
    A = -(10 ** uniform(-0.5, 1.2, layers, channels))
    writes = delta * torch.randn(tokens, layers, CHANNELS, generator=generator, dtype=torch.float64)
    return (delta * A).expand_as(writes), writes


def deviations(log_decay_LRD: Tensor, write_LRD: Tensor, sizes_E: Tensor, dtype: torch.dtype, change: str) -> Tensor:
    """(L, E, R) largest deviation over channels, over ε, of two runs in `dtype` whose start or first input differs.

    Args:
        change: "state" or "input": what gets ε added in every channel, before the first token.
    """
    plain = torch.ones_like(write_LRD[0]).to(dtype)
    moved = (
        plain.double() + sizes_E[:, None, None] if change == "state" else plain.double().expand(len(sizes_E), -1, -1)
    )
    moved, first, found = moved.to(dtype), sizes_E[:, None, None] if change == "input" else 0.0, []
    for log_decay, write in zip(log_decay_LRD, write_LRD, strict=True):
        decay = log_decay.to(dtype).exp()
        plain = decay * plain + write.to(dtype)
        moved = decay * moved + (write + first).to(dtype)
        first = 0.0
        found.append((moved.double() - plain.double()).abs().amax(-1))
    return torch.stack(found) / sizes_E[:, None]


def rates(deviation_LER: Tensor, floor_E: Tensor) -> Tensor:
    """(E, R) ζ: least-squares slope of log deviation over tokens, until it meets the floor; NaN if that is too soon."""
    above = (deviation_LER > floor_E[:, None]).cumprod(0).double()
    t = torch.arange(len(above), dtype=torch.float64)[:, None, None]
    count = above.sum(0)
    centred = above * (t - (above * t).sum(0) / count.clamp(min=1))
    slope = (centred * deviation_LER.clamp(min=1e-300).log()).sum(0) / (centred**2).sum(0)
    return torch.where(count >= FEWEST, slope, torch.nan)


def run(layers: int, tokens: int, sizes: list[float], seed: int, progress: bool = False) -> Result:
    """One row per family, change and format, over `layers` random layers and all sizes of the change.

    zeta with its 95% interval over layers, the share of ζ ≤ 0 among `fitted` slopes, the largest deviation/ε of any
    token, and `broken`: the share of (ε, layer) in which the format leaves float64's exponential by more than a factor
    of two, with the median token at which it does.
    """
    generator, sizes_E = torch.Generator().manual_seed(seed), torch.tensor(sizes, dtype=torch.float64)
    drawn = {family: random_layers(family, layers, tokens, generator) for family in FAMILIES}
    shown = sorted({round(tokens ** (i / (POINTS - 1))) for i in range(POINTS)})
    rows, curves, parts = [], [], list(itertools.product(FAMILIES, ("state", "input"), FORMATS))
    for family, change, name in track(parts, "random layers", progress):
        found = deviations(*drawn[family], sizes_E, FORMATS[name], change)
        if name == "fp64":
            exact = found
        zeta = rates(found, 16 * UNIT[FORMATS[name]] / sizes_E)
        case = {"family": family, "change": change, "format": name}
        rows.append(case | _row(found, exact, zeta))
        curves.append(case | {"sizes": sizes, "tokens": shown} | _curves(found[[t - 1 for t in shown]], sizes_E, zeta))
    return Result(rows, {"curves": curves})


def _row(found_LER: Tensor, exact_LER: Tensor, zeta_ER: Tensor) -> dict[str, Any]:
    fitted = zeta_ER[zeta_ER.isfinite()]
    over_layers = interval(zeta_ER.nanmean(0).tolist())
    apart = (found_LER > 2 * exact_LER) | (2 * found_LER < exact_LER)
    broken = apart.any(0)
    first = apart.byte().argmax(0)[broken].double()
    return {
        "zeta": over_layers.mean,
        "zeta_low": over_layers.low,
        "zeta_high": over_layers.high,
        "fitted": len(fitted),
        "share_nonpositive": float((fitted <= 0).double().mean()) if len(fitted) else math.nan,
        "largest": float(found_LER.max()),
        "broken": float(broken.double().mean()),
        "broken_token": float(first.median()) if len(first) else math.nan,
    }


def _curves(found_LER: Tensor, sizes_E: Tensor, zeta_ER: Tensor) -> dict[str, Any]:
    """Per ε the deviation itself of the median layer and of the largest, and ζ of every layer: its mean over ε."""
    deviation_ELR = (found_LER * sizes_E[:, None]).transpose(0, 1)
    per_layer = zeta_ER.nanmean(0)
    return {
        "median": deviation_ELR.median(-1).values.tolist(),
        "largest": deviation_ELR.amax(-1).tolist(),
        "zeta": per_layer[per_layer.isfinite()].tolist(),
    }
