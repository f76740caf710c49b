"""What the rounding certificates share: formats, what k roundings do, and the inputs of a linear recurrence.

Letters: B batch, L tokens, and any state axes behind them. All numbers are float64.
Source: Higham, Accuracy and Stability of Numerical Algorithms (2002), §2.2 and §3.1, for u, s and γ.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# unit roundoff u and smallest subnormal s
FORMATS = {"fp32": (2.0**-24, 2.0**-149), "bf16": (2.0**-8, 2.0**-133), "fp16": (2.0**-11, 2.0**-24)}
ULP = 2 * 2.0**-24  # of float32, relative to the number: 2u at most
REFERENCE = 8 * 2.0**-53  # the exact trajectory is itself a float64 loop: exp, two products, two sums, with room


class Inputs(NamedTuple):
    """What x_t = exp(ΔA)_t x_{t−1} + b_t is computed from.

    Attributes:
        log_decay: (B, L, …) Δ_t A ≤ 0; it may broadcast against the writes.
        write: (B, L, …) b_t.
        initial: (B, …) x_0.
    """

    log_decay: Tensor
    write: Tensor
    initial: Tensor

    def states(self) -> Tensor:
        """(B, L + 1, …) states x_0 … x_L of the float64 loop."""
        states = [self.initial]
        for t in range(self.write.shape[1]):
            states.append(self.log_decay[:, t].exp() * states[-1] + self.write[:, t])
        return torch.stack(states, dim=1)

    def off(self, exact: "Inputs") -> "Inputs":
        """How far they lie from the exact ones: rounded before, or changed by an adapter."""
        return Inputs(*((own - other).abs() for own, other in zip(self, exact, strict=True)))


def gamma(k: int, unit: float) -> float:
    """γ_k = k u / (1 − k u): what k roundings do at most, relative (Higham, lemma 3.1)."""
    return k * unit / (1 - k * unit)


def unbounded(e: Tensor) -> Tensor:
    """e, with ∞ where it is not a number: what a bound that has overflowed, times 0, can still say."""
    return torch.where(e.isnan(), torch.inf, e)
