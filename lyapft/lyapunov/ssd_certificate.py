"""The rounding certificate of the chunked state space duality kernel (`scan/ssd.py`), at the ends of its chunks.

Letters: B batch, T tokens of a chunk; log decays are (B, L, …) and broadcast against writes (B, L, …). Float64.

With s the running sum of ΔA inside a chunk, the kernel computes

    x ← exp(s_T) x + Σ_j exp(s_T − s_j) b_j,     b_j = Δ_j x_j B_j

s is summed and subtracted in float64 and rounded once, so an exponential is off by e^{u |argument|} (1 + ε). A term of
the sum is rounded when Δ x and when its product with the exponential is formed, and passes at most T roundings of the
matrix product, whatever its order; the last sum and its product round the state twice and the sum once. As in
`certificate`, nothing of second order is dropped.
"""

import torch
from torch import Tensor

from lyapft.lyapunov.certificate import FORMATS, REFERENCE, ULP, gamma, unbounded

UNIT, TINY = FORMATS["fp32"]


def ssd_certificate(
    log_decay: Tensor,
    write: Tensor,
    states: Tensor,
    *,
    log_decay_deviation: Tensor | None = None,
    write_deviation: Tensor | None = None,
    initial_deviation: Tensor | None = None,
    write_factor: float = 1.0,
    chunk: int,
) -> Tensor:
    """(B, ⌈L/chunk⌉, …) upper bounds of |x̂ − x| after each chunk of `chunk` tokens; else as `certificate`."""
    changed = torch.zeros_like(log_decay) if log_decay_deviation is None else log_decay_deviation
    given = torch.zeros_like(write) if write_deviation is None else write_deviation
    e = torch.zeros_like(states[:, 0]) if initial_deviation is None else initial_deviation.clone()
    chunk, bounds = min(chunk, write.shape[1]), []
    for start in range(0, write.shape[1], chunk):
        part = slice(start, start + chunk)
        before, b, db = states[:, start].abs(), write[:, part].abs(), given[:, part]
        after_token = _tail_sums(log_decay[:, part])
        weight, relative = after_token.exp(), _relative(after_token, _tail_sums(changed[:, part]))
        relative = (1 + UNIT) ** 2 * (1 + relative) / (1 - chunk * UNIT) - 1
        total = (weight * b).sum(1)
        beta = (weight * ((b + db) * (1 + relative) - b)).sum(1)
        beta = beta + TINY * (chunk * (1 + 2 * write_factor) + (b + db).sum(1))
        argument, change = log_decay[:, part].sum(1), changed[:, part].sum(1)
        kept = argument.exp()
        eta = kept * _relative(argument, change) + TINY
        local = gamma(2, UNIT) * (kept + eta) * (before + e) + UNIT * (total + beta) + 2 * TINY
        local = local + chunk * REFERENCE * (kept * before + total)
        e = unbounded((kept + eta) * e + eta * before + beta + local)
        bounds.append(e)
    return torch.stack(bounds, dim=1)


def _tail_sums(x: Tensor) -> Tensor:
    """Σ of what follows each token in the chunk."""
    return x.sum(1, keepdim=True) - x.cumsum(1)


def _relative(argument: Tensor, change: Tensor) -> Tensor:
    """Relative error of a computed exponential whose argument was changed, rounded and passed to exp."""
    return (1 + ULP) * torch.exp(change + UNIT * (argument.abs() + change)) - 1
